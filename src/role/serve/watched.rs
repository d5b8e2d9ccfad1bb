//! What each connection is at, seen from the bytes that pass.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;

/// A body that is late may be slow rather than dead for this long before its connection makes room for
/// another.
const SLOW_AFTER: Duration = Duration::from_secs(1);

/// What a connection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The client has yet to send a request's head.
    Head,
    /// The client has yet to send a request's body.
    Body,
    /// The request is worked on.
    Work,
    /// The answer is being written.
    Answer,
    /// Between requests.
    Idle,
}

/// How long a client may take for its part.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a request's line and headers, from the connection's or their own first byte.
    pub head: Duration,
    /// Between requests.
    pub idle: Duration,
    /// To take any part of an answer.
    pub write: Duration,
    /// To take a whole answer.
    pub answer: Duration,
}

/// What one connection is at, and since when.
#[derive(Debug)]
pub struct Watch(Mutex<State>);

#[derive(Debug)]
struct State {
    phase: Phase,
    since: Instant,
    /// Since when the client has taken nothing of what is to be written.
    stuck: Option<Instant>,
}

impl Default for Watch {
    fn default() -> Self {
        Self(Mutex::new(State { phase: Phase::Head, since: Instant::now(), stuck: None }))
    }
}

impl Watch {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, phase: Phase) {
        let mut state = self.state();
        (state.phase, state.since) = (phase, Instant::now());
    }

    /// Bytes came.
    fn received(&self) {
        let mut state = self.state();
        if state.phase == Phase::Idle {
            (state.phase, state.since) = (Phase::Head, Instant::now());
        }
    }

    /// Something was to be written, and the client took it or did not.
    fn wrote(&self, taken: bool) {
        let mut state = self.state();
        state.stuck = if taken { None } else { state.stuck.or_else(|| Some(Instant::now())) };
    }

    /// The body is waited for, or worked with. How long a request takes counts from its head.
    fn body(&self, waits: bool) {
        let mut state = self.state();
        if matches!(state.phase, Phase::Body | Phase::Work) {
            state.phase = if waits { Phase::Body } else { Phase::Work };
        }
    }

    /// A request's head is there.
    pub fn begin(&self) {
        self.enter(Phase::Work);
    }

    /// Whether the client has yet to send the rest of its request.
    pub fn waits_for_body(&self) -> bool {
        self.state().phase == Phase::Body
    }

    /// When the client's time is up, if it is the client that is waited for. A body's time is the request's.
    pub fn due(&self, patience: &Patience) -> Option<Instant> {
        let state = self.state();
        if let Some(stuck) = state.stuck {
            return Some((stuck + patience.write).min(state.since + patience.answer));
        }
        match state.phase {
            Phase::Head => Some(state.since + patience.head),
            Phase::Idle => Some(state.since + patience.idle),
            Phase::Body | Phase::Work | Phase::Answer => None,
        }
    }

    /// Rank for making room, lowest first; none if the client is not what is waited for.
    pub fn dispensable(&self, now: Instant) -> Option<(u8, Instant)> {
        let state = self.state();
        let late = |since: Instant| (now.duration_since(since) >= SLOW_AFTER).then_some((2, since));
        if let Some(stuck) = state.stuck {
            return late(stuck);
        }
        match state.phase {
            Phase::Idle => Some((0, state.since)),
            Phase::Head => Some((1, state.since)),
            Phase::Body => late(state.since),
            Phase::Work | Phase::Answer => None,
        }
    }
}

/// A connection's bytes.
pub struct Stream {
    inner: TcpStream,
    watch: Arc<Watch>,
}

impl Stream {
    /// Tells `watch` of what passes.
    pub fn new(inner: TcpStream, watch: Arc<Watch>) -> Self {
        Self { inner, watch }
    }

    fn told<T>(&self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        self.watch.wrote(written.is_ready());
        written
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.watch.received();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.told(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.told(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// A request's body as it comes in.
struct Request {
    inner: Incoming,
    watch: Arc<Watch>,
}

impl HttpBody for Request {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(context);
        self.watch.body(frame.is_pending());
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// An answer's body as it goes out; when it is dropped, the next request is waited for. It goes out in
/// pieces, so that it is not dropped before the client has taken most of it.
struct Answer {
    inner: Body,
    rest: Bytes,
    watch: Arc<Watch>,
    _room: Option<Room>,
}

/// What an answer's bytes take of the memory that all answers may take together, until they have gone out.
pub type Room = Arc<OwnedSemaphorePermit>;

/// Bytes of a piece.
const PIECE: usize = 64 * 1024;

impl Drop for Answer {
    fn drop(&mut self) {
        self.watch.enter(Phase::Idle);
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            let Some(frame) = ready!(Pin::new(&mut self.inner).poll_frame(context)) else {
                return Poll::Ready(None);
            };
            match frame?.into_data() {
                Ok(data) => self.rest = data,
                Err(other) => return Poll::Ready(Some(Ok(other))),
            }
        }
        let length = self.rest.len().min(PIECE);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (mut hint, rest) = (self.inner.size_hint(), self.rest.len() as u64);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(hint.lower() + rest);
        hint
    }
}

/// A request's body that tells `watch` when it is waited for.
pub fn request(inner: Incoming, watch: &Arc<Watch>) -> Body {
    Body::new(Request { inner, watch: Arc::clone(watch) })
}

/// An answer that tells `watch` when it has been taken, and then gives its room back.
pub fn answer(response: Response, watch: &Arc<Watch>) -> Response {
    watch.enter(Phase::Answer);
    let (mut parts, inner) = response.into_parts();
    let room = parts.extensions.remove::<Room>();
    let answer = Answer { inner, rest: Bytes::new(), watch: Arc::clone(watch), _room: room };
    Response::from_parts(parts, Body::new(answer))
}
