//! Generated types ⇄ domain.

use tonic::codec::{DecodeBuf, Decoder};

/// Reads requests with prost.
#[derive(Debug)]
pub struct Codec<Out, In>(std::marker::PhantomData<(Out, In)>);

impl<Out, In> Default for Codec<Out, In> {
    fn default() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<Out, In> tonic::codec::Codec for Codec<Out, In>
where
    Out: prost::Message + Send + 'static,
    In: prost::Message + Default + Send + 'static,
{
    type Encode = Out;
    type Decode = In;
    type Encoder = tonic_prost::ProstEncoder<Out>;
    type Decoder = CheckedDecoder<In>;

    fn encoder(&mut self) -> Self::Encoder {
        tonic_prost::ProstEncoder::new(Default::default())
    }

    fn decoder(&mut self) -> Self::Decoder {
        CheckedDecoder(std::marker::PhantomData)
    }
}

/// Decodes one type of request.
#[derive(Debug)]
pub struct CheckedDecoder<In>(std::marker::PhantomData<In>);

impl<In: prost::Message + Default> Decoder for CheckedDecoder<In> {
    type Item = In;
    type Error = tonic::Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<In>, tonic::Status> {
        match In::decode(buffer) {
            Ok(message) => Ok(Some(message)),
            Err(error) => Err(tonic::Status::invalid_argument(error.to_string())),
        }
    }
}
