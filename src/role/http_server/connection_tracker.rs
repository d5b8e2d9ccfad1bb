//! Tracks the phase of each connection by the bytes that are read and written.

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

/// A client that is late with a body or a read may be slow. Its connection may be closed for another client
/// only after this time.
const SLOW_AFTER: Duration = Duration::from_secs(1);

/// The phase of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The client still has to send a request's head.
    Head,
    /// The client still has to send a request's body.
    Body,
    /// The server works on the request.
    Work,
    /// The server writes the response.
    Answer,
    /// Between requests.
    Idle,
}

/// Timeouts of a client.
#[derive(Clone, Copy, Debug)]
pub struct ClientTimeouts {
    /// For sending a request's line and headers, from the start of the connection or their first byte.
    pub head: Duration,
    /// Between requests.
    pub idle: Duration,
    /// For reading any part of a response.
    pub write: Duration,
    /// For reading a whole response.
    pub answer: Duration,
}

/// The phase of one connection, and since when.
#[derive(Debug)]
pub struct ConnectionTracker(Mutex<State>);

#[derive(Debug)]
struct State {
    phase: Phase,
    since: Instant,
    /// Since when the client has read nothing although bytes are waiting.
    stuck: Option<Instant>,
}

impl Default for ConnectionTracker {
    fn default() -> Self {
        Self(Mutex::new(State { phase: Phase::Head, since: Instant::now(), stuck: None }))
    }
}

impl ConnectionTracker {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, phase: Phase) {
        let mut state = self.state();
        (state.phase, state.since) = (phase, Instant::now());
    }

    /// Notes that bytes were received.
    fn received(&self) {
        let mut state = self.state();
        if state.phase == Phase::Idle {
            (state.phase, state.since) = (Phase::Head, Instant::now());
        }
    }

    /// Notes an attempt to write; `taken` says whether the socket accepted bytes.
    fn wrote(&self, taken: bool) {
        let mut state = self.state();
        state.stuck = if taken { None } else { state.stuck.or_else(|| Some(Instant::now())) };
    }

    /// Notes whether the server waits for the body. A request's time counts from its head.
    fn body(&self, waits: bool) {
        let mut state = self.state();
        if matches!(state.phase, Phase::Body | Phase::Work) {
            state.phase = if waits { Phase::Body } else { Phase::Work };
        }
    }

    /// Notes that a request's head has arrived.
    pub fn begin(&self) {
        self.enter(Phase::Work);
    }

    /// Whether the client still has to send the rest of its request.
    pub fn waits_for_body(&self) -> bool {
        self.state().phase == Phase::Body
    }

    /// When the client's timeout ends, if the server waits for the client. A body has the request's timeout.
    pub fn due(&self, timeouts: &ClientTimeouts) -> Option<Instant> {
        let state = self.state();
        if let Some(stuck) = state.stuck {
            return Some((stuck + timeouts.write).min(state.since + timeouts.answer));
        }
        match state.phase {
            Phase::Head => Some(state.since + timeouts.head),
            Phase::Idle => Some(state.since + timeouts.idle),
            Phase::Body | Phase::Work | Phase::Answer => None,
        }
    }

    /// Rank for closing the connection, lowest first; none if the server does not wait for the client.
    pub fn eviction_rank(&self, now: Instant) -> Option<(u8, Instant)> {
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

/// A TCP stream that reports reads and writes.
pub struct TrackedStream {
    inner: TcpStream,
    tracker: Arc<ConnectionTracker>,
}

impl TrackedStream {
    /// A stream that reports to `tracker`.
    pub fn new(inner: TcpStream, tracker: Arc<ConnectionTracker>) -> Self {
        Self { inner, tracker }
    }

    fn told<T>(&self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        self.tracker.wrote(written.is_ready());
        written
    }
}

impl AsyncRead for TrackedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.tracker.received();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TrackedStream {
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

/// A request's body that reports when the server waits for it.
struct Request {
    inner: Incoming,
    tracker: Arc<ConnectionTracker>,
}

impl HttpBody for Request {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(context);
        self.tracker.body(frame.is_pending());
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A response's body. Dropping it makes the connection idle. It is sent in pieces, so that it is not dropped
/// before the client has read most of it.
struct Answer {
    inner: Body,
    rest: Bytes,
    tracker: Arc<ConnectionTracker>,
    _room: Option<MemoryReservation>,
}

/// A response's share of the memory for all responses. It is released when the response was sent.
pub type MemoryReservation = Arc<OwnedSemaphorePermit>;

/// Bytes in a piece.
const PIECE: usize = 64 * 1024;

impl Drop for Answer {
    fn drop(&mut self) {
        self.tracker.enter(Phase::Idle);
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

/// A request's body that tells `tracker` when the server waits for it.
pub fn request(inner: Incoming, tracker: &Arc<ConnectionTracker>) -> Body {
    Body::new(Request { inner, tracker: Arc::clone(tracker) })
}

/// A response that tells `tracker` when the client has read it, and then releases its memory share.
pub fn answer(response: Response, tracker: &Arc<ConnectionTracker>) -> Response {
    tracker.enter(Phase::Answer);
    let (mut parts, inner) = response.into_parts();
    let room = parts.extensions.remove::<MemoryReservation>();
    let answer = Answer { inner, rest: Bytes::new(), tracker: Arc::clone(tracker), _room: room };
    Response::from_parts(parts, Body::new(answer))
}
