//! A client's connection that gathers what is written to it for a moment. Knows neither gRPC nor HTTP.
//!
//! h2 writes to its socket as soon as it has a DATA frame of 256 bytes or more: the trailers, which end
//! a call, then take a write of their own, and wake the client a second time; and so do the answers to
//! its other calls. A [`Socket`] keeps what it is given until its task is polled the next time, after
//! all other tasks that are ready now, and writes it at once then.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

use crate::workers::Place;

/// Bytes that are kept, at most: two frames of the usual size, and what comes around them.
const KEPT_MAX: usize = 40 << 10;
/// Bytes of room that an idle connection holds on to, at most.
const IDLE_BYTES_MAX: usize = 4 << 10;

/// A connection that writes when its task is polled again.
pub struct Socket<S> {
    stream: S,
    kept: Vec<u8>,
    /// How much of it has been written.
    written: usize,
    /// Whether the stream took nothing when it was last written to. It wakes the task by itself then.
    is_full: bool,
    _place: Option<Place>,
}

impl<S> Socket<S> {
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            kept: Vec::new(),
            written: 0,
            is_full: false,
            _place: None,
        }
    }

    /// Has this place for as long as it is there.
    pub fn at(self, place: Place) -> Self {
        let _place = Some(place);
        Self { _place, ..self }
    }

    fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Takes note of bytes that were written, and returns how many of them had not been kept.
    fn advance(&mut self, written: usize) -> usize {
        let left = self.kept.len() - self.written;
        if written < left {
            self.written += written;
            return 0;
        }
        self.written = 0;
        self.kept.clear();
        self.kept.shrink_to(IDLE_BYTES_MAX);
        written - left
    }
}

impl<S: AsyncWrite + Unpin> Socket<S> {
    /// Writes what is kept.
    fn poll_kept(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let kept = &self.kept[self.written..];
            let polled = Pin::new(&mut self.stream).poll_write(context, kept);
            self.is_full = polled.is_pending();
            self.advance(some(ready!(polled)?)?);
        }
        Poll::Ready(Ok(()))
    }
}

/// A socket that takes nothing, and does not say that it will, is broken.
fn some(written: usize) -> io::Result<usize> {
    match written {
        0 => Err(io::ErrorKind::WriteZero.into()),
        written => Ok(written),
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.kept.len() + bytes.len() <= KEPT_MAX {
            self.kept.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        while !self.is_empty() {
            let Self {
                stream,
                kept,
                written,
                ..
            } = &mut *self;
            let both = [IoSlice::new(&kept[*written..]), IoSlice::new(bytes)];
            let written = ready!(Pin::new(stream).poll_write_vectored(context, &both))?;
            let of_bytes = self.advance(some(written)?);
            if of_bytes > 0 {
                return Poll::Ready(Ok(of_bytes));
            }
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        false
    }

    /// Has what is kept written when the task is polled again, by [`poll_read`](AsyncRead::poll_read):
    /// whoever serves a connection reads from it each time.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_full {
            return self.poll_kept(context);
        }
        if !self.is_empty() {
            context.waker().wake_by_ref();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_kept(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A socket that is full does not keep its peer from being heard: it wakes the task again.
        if let Poll::Ready(Err(error)) = self.poll_kept(context) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

/// Nobody asks who is at the other end.
impl<S> Connected for Socket<S> {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::{Wake, Waker};
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    /// Polls the connection for what its client says, which is nothing.
    fn poll(socket: &mut Socket<DuplexStream>) {
        let mut bytes = [0; 8];
        let mut buffer = ReadBuf::new(&mut bytes);
        let mut context = Context::from_waker(Waker::noop());
        let polled = Pin::new(socket).poll_read(&mut context, &mut buffer);
        assert!(polled.is_pending());
    }

    #[tokio::test]
    async fn what_is_written_goes_out_when_the_task_is_polled_again_and_all_at_once() {
        let (ours, mut theirs) = duplex(1 << 20);
        let mut socket = Socket::new(ours);
        for part in [b"head", b"body", b"tail"] {
            socket.write_all(part).await.unwrap();
            socket.flush().await.unwrap();
        }
        let mut bytes = [0; 64];
        let nothing = tokio::time::timeout(Duration::ZERO, theirs.read(&mut bytes)).await;
        assert!(nothing.is_err());
        poll(&mut socket);
        assert_eq!(theirs.read(&mut bytes).await.unwrap(), 12);
        assert_eq!(&bytes[..12], b"headbodytail");
    }

    #[tokio::test]
    async fn nothing_is_lost_where_the_client_takes_little_at_a_time() {
        let (ours, mut theirs) = duplex(7);
        let mut socket = Socket::new(ours);
        let sent: Vec<u8> = (0..3 * KEPT_MAX).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let sending = async move {
            for part in sent.chunks(1_000) {
                socket.write_all(part).await.unwrap();
                socket.flush().await.unwrap();
            }
            assert!(socket.kept.len() <= KEPT_MAX);
            socket.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let (_, read) = tokio::join!(sending, theirs.read_to_end(&mut received));
        read.unwrap();
        assert!(received == expected);
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn a_flush_has_the_task_polled_again_if_there_is_something_to_write() {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = Context::from_waker(&waker);
        let (ours, _theirs) = duplex(64);
        let mut socket = Socket::new(ours);
        for is_something in [false, true] {
            if is_something {
                socket.write_all(b"x").await.unwrap();
            }
            assert!(Pin::new(&mut socket).poll_flush(&mut context).is_ready());
            assert_eq!(woken.0.load(Ordering::Relaxed), is_something);
        }
    }

    /// Else a task would be polled without a pause, as long as its client takes nothing.
    #[tokio::test]
    async fn where_the_client_takes_nothing_the_task_waits_until_it_does() {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = Context::from_waker(&waker);
        let (ours, mut theirs) = duplex(4);
        let mut socket = Socket::new(ours);
        socket.write_all(b"123456").await.unwrap();
        poll(&mut socket);
        assert!(Pin::new(&mut socket).poll_flush(&mut context).is_pending());
        assert!(!woken.0.load(Ordering::Relaxed));
        let mut bytes = [0; 4];
        theirs.read_exact(&mut bytes).await.unwrap();
        assert!(woken.0.load(Ordering::Relaxed));
        assert!(Pin::new(&mut socket).poll_flush(&mut context).is_ready());
        theirs.read_exact(&mut bytes[..2]).await.unwrap();
        assert_eq!(&bytes, b"5634");
    }
}
