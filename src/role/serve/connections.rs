//! Connections of clients: how many, and how long each may keep others waiting.
//!
//! A connection costs a file of the process, and the process has few. So there is a bound on them, each
//! part of a request has its time, and when all connections are taken, the client that has waited longest
//! makes room for the next one: whoever sends nothing can't keep others out.

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

use super::watched::{self, Patience, Stream, Watch};

/// Connections unless the settings say otherwise, if the limit on open files has room for them.
const CONNECTIONS: usize = 512;

/// Never fewer than these, whatever the limit on open files.
const FEWEST: usize = 16;

/// Files that the process opens beside clients' connections and the database's: logs, the model, the
/// runtime's own, connections to embedder, queue and index.
const OTHER_FILES: usize = 64;

/// Connections that are being closed and still hold their file.
const CLOSING: usize = 8;

/// A request's line and headers at most; more is answered 431.
const HEAD_BYTES: usize = 64 * 1024;

/// How often clients whose time is up are looked for.
const SWEEP_EVERY: Duration = Duration::from_millis(250);

/// Pause after a connection could not be taken.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often it is told that connections can't be taken.
const TELL_EVERY: Duration = Duration::from_mins(1);

/// How long a request's head is waited for while the server stops.
const HEAD_AT_STOP: Duration = Duration::from_millis(500);

/// The address at a connection's other end.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// How many connections, and how long a client may take.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Connections at once.
    pub connections: usize,
    /// How long a client may take for its part.
    pub patience: Patience,
}

impl Bounds {
    /// The bounds of a server that may have `wanted` connections (0: as many as fit) beside `other` ones to
    /// its database.
    #[must_use]
    pub fn new(wanted: usize, other: usize) -> Self {
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(usize::MAX, |(soft, _)| soft as usize);
        let room = files.saturating_sub(OTHER_FILES + CLOSING + other).max(FEWEST);
        if wanted > room {
            tracing::warn!(
                wanted,
                room,
                "serve.max_connections is more than the limit on open files (ulimit -n) leaves; serving fewer at once"
            );
        }
        Self {
            connections: room.min(if wanted == 0 { CONNECTIONS } else { wanted }),
            patience: Patience {
                head: Duration::from_secs(10),
                // Longer than a proxy keeps a connection that it does not use: nginx 60 s.
                idle: Duration::from_secs(75),
                write: Duration::from_secs(15),
                answer: Duration::from_mins(2),
            },
        }
    }
}

/// Answers requests until `stop`, then until those under way are answered. Dropping it closes every
/// connection.
pub async fn serve(listener: TcpListener, router: Router, bounds: Bounds, stop: CancellationToken) {
    let clients = Clients::default();
    let mut tasks = JoinSet::new();
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told: Option<Instant> = None;
    loop {
        let now = Instant::now();
        let room = tasks.len() < bounds.connections
            || (tasks.len() < bounds.connections + CLOSING && clients.dispensable(now).is_some());
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            _ = sweep.tick() => clients.sweep(&bounds.patience),
            Some(_) = tasks.join_next() => {}
            accepted = listener.accept(), if room => match accepted {
                Ok((stream, peer)) => {
                    if clients.count() >= bounds.connections {
                        clients.make_room();
                    }
                    let client = clients.join();
                    tasks.spawn(converse(stream, peer, router.clone(), client, stop.clone()));
                }
                Err(error) if is_clients(&error) => {}
                Err(error) => {
                    if told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
                        told = Some(Instant::now());
                        tracing::warn!(%error, "cannot take a connection; trying again (more open files: ulimit -n)");
                    }
                    clients.make_room();
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                    }
                }
            },
        }
    }
    drop(listener);
    let patience = Patience { head: HEAD_AT_STOP, ..bounds.patience };
    while !tasks.is_empty() {
        tokio::select! {
            _ = sweep.tick() => clients.sweep(&patience),
            _ = tasks.join_next() => {}
        }
    }
}

/// Whether a connection failed, rather than the taking of connections.
fn is_clients(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Answers one connection's requests.
async fn converse(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    client: Client,
    stop: CancellationToken,
) {
    // An answer goes out in one piece anyway.
    let _ = stream.set_nodelay(true);
    let watch = &client.watch;
    let service = service_fn(|request: hyper::Request<Incoming>| {
        watch.begin();
        let mut request = request.map(|body| watched::request(body, watch));
        request.extensions_mut().insert(Peer(peer));
        request.extensions_mut().insert(Arc::clone(watch));
        let answer = TowerToHyperService::new(router.clone()).call(request);
        async move {
            let Ok(response) = answer.await;
            Ok::<_, Infallible>(watched::answer(response, watch))
        }
    });
    let connection = http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(Stream::new(stream, Arc::clone(watch))), service);
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
struct Clients(Arc<Mutex<Members>>);

#[derive(Default)]
struct Members {
    next: u64,
    by_id: HashMap<u64, (Arc<Watch>, CancellationToken)>,
}

impl Clients {
    fn members(&self) -> std::sync::MutexGuard<'_, Members> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self) -> Client {
        let mut members = self.members();
        members.next += 1;
        let (id, watch, close) = (members.next, Arc::<Watch>::default(), CancellationToken::new());
        members.by_id.insert(id, (Arc::clone(&watch), close.clone()));
        Client { id, watch, close, all: self.clone() }
    }

    fn count(&self) -> usize {
        self.members().by_id.len()
    }

    /// The client that is missed least, if any of them is only waited for.
    fn dispensable(&self, now: Instant) -> Option<u64> {
        let members = self.members();
        let ranked = members.by_id.iter().filter_map(|(id, (watch, _))| Some((watch.dispensable(now)?, *id)));
        ranked.min().map(|(_, id)| id)
    }

    fn make_room(&self) {
        if let Some(id) = self.dispensable(Instant::now())
            && let Some((_, close)) = self.members().by_id.remove(&id)
        {
            close.cancel();
        }
    }

    /// Closes the connections of clients whose time is up.
    fn sweep(&self, patience: &Patience) {
        let now = Instant::now();
        for (watch, close) in self.members().by_id.values() {
            if watch.due(patience).is_some_and(|due| due <= now) {
                close.cancel();
            }
        }
    }
}

/// One of the connections, until it is dropped.
struct Client {
    id: u64,
    watch: Arc<Watch>,
    close: CancellationToken,
    all: Clients,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.all.members().by_id.remove(&self.id);
    }
}
