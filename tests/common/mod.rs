//! What the themes of tests share: a database of its own for each test, and the executable.

// Each theme uses its own part of this.
#![allow(dead_code)]

pub mod python;
pub mod source;
pub mod steps;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use futures::SinkExt as _;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use refarch::backend::embedded::{Cluster, ClusterOptions};
use tokio::process::Command;
use tokio::sync::{Mutex, mpsc};
use tokio_postgres::{AsyncMessage, Client, CopyInSink, NoTls};

/// How often [`eventually`] looks.
const POLL: Duration = Duration::from_millis(20);

/// The test binary's use of the cluster that all test processes share; it ends with the last
/// database in use.
static CLUSTER: Mutex<Weak<Cluster>> = Mutex::const_new(Weak::new());

/// A database that is one test's own, and dropped with it.
pub struct Database {
    name: String,
    cluster: Arc<Cluster>,
}

impl Database {
    /// Creates an empty database.
    pub async fn create() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let cluster = shared_cluster().await;
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("test_{}_{}_{count}", std::process::id(), since.as_micros());
        let client = connect(cluster.url().expose()).await;
        client.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        Self { name, cluster }
    }

    /// The database's name, unique among tests: a safe suffix for roles and slots.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Connection string, for tokio-postgres and `DATABASE_URL`.
    pub fn url(&self) -> String {
        self.cluster.url().expose().replace("dbname=refarch", &format!("dbname={}", self.name))
    }

    /// A connection of its own.
    pub async fn client(&self) -> Client {
        connect(&self.url()).await
    }

    /// A connection that listens on a channel, and what it hears.
    pub async fn listener(&self, channel: &str) -> (Client, mpsc::UnboundedReceiver<AsyncMessage>) {
        let (client, mut connection) = tokio_postgres::connect(&self.url(), NoTls).await.unwrap();
        let (sender, notifications) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                let _ = sender.send(message);
            }
        });
        client.batch_execute(&format!("LISTEN {channel}")).await.unwrap();
        (client, notifications)
    }

    /// The executable, with this database configured.
    pub fn refarch(&self) -> Command {
        let mut command = refarch();
        command.env("DATABASE_URL", self.url());
        command
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let url = self.cluster.url().expose().to_owned();
        let sql = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        // A thread of its own, because this one may be running the test's runtime.
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { connect(&url).await.batch_execute(&sql).await.unwrap() });
        });
        if dropped.join().is_err() {
            eprintln!("cannot drop the test's database {}", self.name);
        }
    }
}

async fn shared_cluster() -> Arc<Cluster> {
    let mut shared = CLUSTER.lock().await;
    if let Some(cluster) = shared.upgrade() {
        return cluster;
    }
    let extra = [
        // Nothing in it outlives a crash of the machine; tests of durability have clusters of their own.
        ("fsync", "off"),
        ("full_page_writes", "off"),
        // Several tests at once, each with several roles and their pools.
        ("max_connections", "400"),
        // One test replicates a table, to show that capture does not see replicated changes.
        ("wal_level", "logical"),
    ];
    let options = ClusterOptions {
        dir: Path::new(env!("CARGO_TARGET_TMPDIR")).join("postgres"),
        extra: extra.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        ..ClusterOptions::in_runtime_dir(&runtime_dir())
    };
    let cluster = Arc::new(Cluster::join(options).await.unwrap());
    drop_abandoned(cluster.url().expose()).await;
    *shared = Arc::downgrade(&cluster);
    cluster
}

/// Drops the databases of test processes that were killed.
async fn drop_abandoned(url: &str) {
    let client = connect(url).await;
    let rows = client.query(r"SELECT datname FROM pg_database WHERE datname LIKE 'test\_%'", &[]).await;
    for row in rows.unwrap() {
        let name: &str = row.get(0);
        let pid = name.split('_').nth(1).and_then(|pid| pid.parse().ok()).map(Pid::from_raw);
        if pid.is_some_and(|pid| kill(pid, None).is_err()) {
            // Another process may be dropping it too.
            let _ = client.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await;
        }
    }
}

/// A connection whose task ends with its client.
pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Runs statements. Fails if one of them fails.
pub async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// The single number that a query returns.
pub async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

/// The runtime folder that `scripts/setup` fills: the model and PostgreSQL's binaries.
pub fn runtime_dir() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(".refarch");
    assert!(dir.join("runtime/postgres/bin").is_dir(), "run scripts/setup first, or scripts/test");
    dir
}

/// The executable (`TESTED_REFARCH` names another build of it, such as a release build for large runs),
/// with nothing of our environment that could change what it does.
pub fn refarch() -> Command {
    let built = std::env::var_os("TESTED_REFARCH").unwrap_or_else(|| env!("CARGO_BIN_EXE_refarch").into());
    let mut command = Command::new(built);
    command.env_clear().env("REFARCH_RUNTIME_DIR", runtime_dir()).kill_on_drop(true);
    for name in ["PATH", "HOME"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // No refarch.toml there.
    command.current_dir(env!("CARGO_TARGET_TMPDIR"));
    command
}

/// The Chromium for browser tests: `CHROMIUM`, which `scripts/test` sets, or one on the PATH. A
/// missing one fails the test: a browser test that did not run has shown nothing.
pub fn browser() -> PathBuf {
    if let Some(path) = std::env::var_os("CHROMIUM").filter(|path| !path.is_empty()) {
        return path.into();
    }
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    let dirs: Vec<_> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    let found = names.iter().flat_map(|name| dirs.iter().map(move |dir| dir.join(name)));
    found.into_iter().find(|path| path.is_file()).expect(
        "browser tests need a Chromium: run scripts/test, install Debian's chromium, or set CHROMIUM to its path",
    )
}

/// Says why a test cannot run here, on the real standard error: the harness keeps a passing test's output to itself.
/// Where `CI` is set it fails the test: a test that did not run has shown nothing.
pub fn cannot_run(why: &str) {
    let thread = std::thread::current();
    let said = format!("NOT RUN: {}: {why}\n", thread.name().unwrap_or("a test"));
    let _ = std::io::stderr().write_all(said.as_bytes());
    assert!(std::env::var_os("CI").is_none_or(|ci| ci.is_empty()), "{said}");
}

/// A loopback port that was free just now.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// Waits until a condition holds, and fails with its name if that takes too long.
pub async fn eventually(what: &str, timeout: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < timeout, "not within {timeout:?}: {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// Whether a listener has been rung since the last call. A round trip to the server fetches what was
/// committed before it, so nothing has to be waited for.
pub async fn was_notified(
    listener: &Client,
    notifications: &mut mpsc::UnboundedReceiver<AsyncMessage>,
) -> bool {
    listener.batch_execute("SELECT 1").await.unwrap();
    let mut notified = false;
    while let Ok(message) = notifications.try_recv() {
        notified |= matches!(message, AsyncMessage::Notification(_));
    }
    notified
}

/// Sends lines into a COPY and ends it.
pub async fn copy(sink: CopyInSink<bytes::Bytes>, lines: impl Iterator<Item = String>) {
    let mut sink = std::pin::pin!(sink);
    let text: String = lines.collect();
    sink.send(bytes::Bytes::from(text)).await.unwrap();
    sink.finish().await.unwrap();
}
