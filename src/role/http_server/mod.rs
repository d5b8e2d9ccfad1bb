//! The HTTP server of the page and of the admin endpoint: the number of its connections, and how long a client may
//! be slow.
//!
//! Each connection uses a file descriptor, and a process has few. So the number of connections is limited,
//! and each part of a request has a timeout. When all connections are taken, the connection that has waited
//! longest for its client is closed for the next client. So a client that sends nothing cannot keep others
//! out.

mod connection_tracker;
pub mod hosts;

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use nix::sys::resource::{Resource, getrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use connection_tracker::TrackedStream;

pub use connection_tracker::{ClientTimeouts, ConnectionTracker, MemoryReservation};

/// Default number of connections, if the limit on open files allows as many.
const DEFAULT_CONNECTIONS: usize = 512;

/// Fewest connections, whatever the limit on open files.
const MIN_CONNECTIONS: usize = 16;

/// Files that the process opens beside the connections of clients and to the database: logs, the model, the
/// runtime's files, connections to embedder, queue and index.
const OTHER_FILES: usize = 64;

/// Connections that are closing and still hold their file.
const CLOSING: usize = 8;

/// Most bytes of a request's line and headers. A larger head is answered with 431.
const HEAD_BYTES: usize = 64 * 1024;

/// How often connections are checked for timeouts.
const SWEEP_EVERY: Duration = Duration::from_millis(250);

/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Least time between two warnings that connections cannot be accepted.
const WARNING_INTERVAL: Duration = Duration::from_mins(1);

/// Timeout of a request's head while the server stops.
const STOP_HEAD_TIMEOUT: Duration = Duration::from_millis(500);

/// The address at a connection's other end.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// Limits on connections.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Connections at once.
    pub connections: usize,
    /// Timeouts of a client.
    pub timeouts: ClientTimeouts,
}

impl ConnectionLimits {
    /// Limits for a server that wants `wanted` connections of clients (0: the default) and has `other`
    /// connections to its database. The limit on open files may reduce the number.
    #[must_use]
    pub fn new(wanted: usize, other: usize) -> Self {
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(usize::MAX, |(soft, _)| soft as usize);
        let room = files.saturating_sub(OTHER_FILES + CLOSING + other).max(MIN_CONNECTIONS);
        if wanted > room {
            tracing::warn!(
                wanted,
                room,
                "serve.max_connections is above the limit on open files (ulimit -n); using fewer connections"
            );
        }
        Self {
            connections: room.min(if wanted == 0 { DEFAULT_CONNECTIONS } else { wanted }),
            timeouts: ClientTimeouts {
                head: Duration::from_secs(10),
                // Longer than a proxy keeps an unused connection: nginx 60 s.
                idle: Duration::from_secs(75),
                write: Duration::from_secs(15),
                answer: Duration::from_mins(2),
            },
        }
    }
}

/// Serves requests until `stop`, then finishes the requests that were begun. Dropping the future closes every
/// connection.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connection_limits: ConnectionLimits,
    stop: CancellationToken,
) {
    let clients = Clients::default();
    let mut tasks = JoinSet::new();
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_warning: Option<Instant> = None;
    loop {
        let now = Instant::now();
        let room = tasks.len() < connection_limits.connections
            || (tasks.len() < connection_limits.connections + CLOSING
                && clients.eviction_candidate(now).is_some());
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            _ = sweep.tick() => clients.sweep(&connection_limits.timeouts),
            Some(_) = tasks.join_next() => {}
            accepted = listener.accept(), if room => match accepted {
                Ok((stream, peer)) => {
                    if clients.count() >= connection_limits.connections {
                        clients.evict_one();
                    }
                    let client = clients.join();
                    tasks.spawn(serve_connection(stream, peer, router.clone(), client, stop.clone()));
                }
                Err(error) if is_client_error(&error) => {}
                Err(error) => {
                    if last_warning.is_none_or(|last_warning| last_warning.elapsed() >= WARNING_INTERVAL) {
                        last_warning = Some(Instant::now());
                        tracing::warn!(%error, "cannot accept a connection; trying again (too many open files? raise ulimit -n)");
                    }
                    clients.evict_one();
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                    }
                }
            },
        }
    }
    drop(listener);
    let timeouts = ClientTimeouts { head: STOP_HEAD_TIMEOUT, ..connection_limits.timeouts };
    while !tasks.is_empty() {
        tokio::select! {
            _ = sweep.tick() => clients.sweep(&timeouts),
            _ = tasks.join_next() => {}
        }
    }
}

/// Whether only this one connection failed, not the listener.
fn is_client_error(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Serves the requests of one connection.
async fn serve_connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    client: Client,
    stop: CancellationToken,
) {
    // Small packets need no delay: a response is written in one piece.
    let _ = stream.set_nodelay(true);
    let tracker = &client.tracker;
    let service = service_fn(|request: hyper::Request<Incoming>| {
        tracker.begin();
        let mut request = request.map(|body| connection_tracker::request(body, tracker));
        request.extensions_mut().insert(Peer(peer));
        request.extensions_mut().insert(Arc::clone(tracker));
        let answer = TowerToHyperService::new(router.clone()).call(request);
        async move {
            let Ok(response) = answer.await;
            Ok::<_, Infallible>(connection_tracker::answer(response, tracker))
        }
    });
    let connection = http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(TrackedStream::new(stream, Arc::clone(tracker))), service);
    let mut connection = std::pin::pin!(connection);
    let mut stopping = false;
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            () = client.close.cancelled() => return,
            () = stop.cancelled(), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// All connections.
#[derive(Clone, Default)]
struct Clients(Arc<Mutex<ConnectionTable>>);

#[derive(Default)]
struct ConnectionTable {
    next: u64,
    by_id: HashMap<u64, (Arc<ConnectionTracker>, CancellationToken)>,
}

impl Clients {
    fn table(&self) -> std::sync::MutexGuard<'_, ConnectionTable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self) -> Client {
        let mut table = self.table();
        table.next += 1;
        let (id, tracker, close) =
            (table.next, Arc::<ConnectionTracker>::default(), CancellationToken::new());
        table.by_id.insert(id, (Arc::clone(&tracker), close.clone()));
        Client { id, tracker, close, all: self.clone() }
    }

    fn count(&self) -> usize {
        self.table().by_id.len()
    }

    /// The connection to close first, of those that wait for their client.
    fn eviction_candidate(&self, now: Instant) -> Option<u64> {
        let table = self.table();
        let ranked =
            table.by_id.iter().filter_map(|(id, (tracker, _))| Some((tracker.eviction_rank(now)?, *id)));
        ranked.min().map(|(_, id)| id)
    }

    fn evict_one(&self) {
        if let Some(id) = self.eviction_candidate(Instant::now())
            && let Some((_, close)) = self.table().by_id.remove(&id)
        {
            close.cancel();
        }
    }

    /// Closes the connections whose timeout has passed.
    fn sweep(&self, timeouts: &ClientTimeouts) {
        let now = Instant::now();
        for (tracker, close) in self.table().by_id.values() {
            if tracker.due(timeouts).is_some_and(|due| due <= now) {
                close.cancel();
            }
        }
    }
}

/// One connection. Dropping it removes it from the list.
struct Client {
    id: u64,
    tracker: Arc<ConnectionTracker>,
    close: CancellationToken,
    all: Clients,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.all.table().by_id.remove(&self.id);
    }
}
