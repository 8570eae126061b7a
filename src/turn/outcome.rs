//! How a turn ended, as bytes for its record.

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::{error::Error, store};

pub fn write(outcome: &impl Serialize) -> Bytes {
    // The types that are written have nothing that JSON cannot say.
    serde_json::to_vec(outcome).unwrap_or_default().into()
}

pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let corrupt = || store::Error::Corrupt("the outcome of a turn".to_owned());
    serde_json::from_slice(bytes).map_err(|_| corrupt().into())
}
