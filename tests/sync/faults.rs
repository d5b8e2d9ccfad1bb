//! Real processes under faults: an index that is away, a change that is refused, and
//! everybody killed at once.
//!
//! Sizes are small enough for the suite; the environment makes them large: `REFARCH_ROWS` and
//! `REFARCH_STORM_S`. Each test prints what it saw.

mod hidden;
mod refused;

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use refarch::double::pinecone::{PineconeDouble, PineconeFaults};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::common::{self, Database, eventually};

/// Longer than anything here takes on a busy machine, for a thousand rows.
const TIMEOUT: Duration = Duration::from_mins(3);

/// Length of the model's vectors.
const DIMENSIONS: usize = 384;

/// More than a change's tries that may be left unfinished, with those that are made alone.
const RESTARTS: i32 = 14;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn lost_after(rows: u64) -> Duration {
    TIMEOUT + Duration::from_millis(rows * 60)
}

/// A database whose index is a double of Pinecone's.
struct Remote {
    database: Database,
    double: PineconeDouble,
    env: Vec<(String, String)>,
}

impl Remote {
    async fn start(extra: &[(&str, &str)]) -> Self {
        let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
        let host = double.url();
        let set = [
            ("REFARCH_INDEX_KIND", "pinecone"),
            ("REFARCH_INDEX_HOST", &host),
            ("REFARCH_INDEX_API_KEY", "test"),
            ("REFARCH_INDEX_TIMEOUT_MS", "1000"),
            ("REFARCH_INDEXER_LEASE_MS", "4000"),
            ("REFARCH_INDEXER_SETTLE_MS", "3000"),
        ];
        let env = set.iter().chain(extra).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Self { database: Database::create().await, double, env }
    }

    fn refarch(&self, args: &[&str]) -> Command {
        let mut command = self.database.refarch();
        command.args(args).envs(self.env.iter().map(|(k, v)| (k, v)));
        command
    }

    async fn run(&self, args: &[&str]) -> (i32, String) {
        let output = self.refarch(args).output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        (output.status.code().unwrap(), text)
    }

    async fn json(&self, args: &[&str]) -> Value {
        let (_, text) = self.run(args).await;
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"))
    }

    fn spawn(&self, args: &[&str]) -> Child {
        self.refarch(args).spawn().unwrap()
    }

    async fn status(&self) -> Value {
        self.json(&["status", "--json"]).await
    }

    /// Waits until nothing is under way, attempts included.
    async fn drained(&self, rows: u64) {
        let client = self.database.client().await;
        eventually("everything to be applied", lost_after(rows), async || {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let open = client.query_one("SELECT count(*) FROM refarch.attempt", &[]).await.unwrap();
            open.get::<_, i64>(0) == 0 && outstanding(&self.status().await) == 0
        })
        .await;
    }
}

fn outstanding(status: &Value) -> u64 {
    let at = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64).unwrap();
    at("/pending")
        + ["live", "bulk"]
            .iter()
            .map(|lane| at(&format!("/queue/{lane}/visible")) + at(&format!("/queue/{lane}/in_flight")))
            .sum::<u64>()
}

fn assert_clean(verified: &Value, rows: u64) {
    for key in ["missing", "stale", "orphaned", "undecided", "vector_mismatch", "dead_letters"] {
        assert_eq!(verified[key], 0, "{verified}");
    }
    assert_eq!(verified["rows"], rows, "{verified}");
}

async fn stop(child: Child) {
    let mut child = child;
    kill(Pid::from_raw(child.id().unwrap() as i32), Signal::SIGTERM).unwrap();
    assert!(child.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_outage_leaves_no_dead_letter() {
    let rows = number("REFARCH_ROWS", 300);
    let storm = Duration::from_secs(number("REFARCH_STORM_S", 5));
    let remote = Remote::start(&[]).await;
    assert_eq!(remote.run(&["migrate"]).await.0, 0);
    let roles = [remote.spawn(&["listen"]), remote.spawn(&["embed", "--workers", "2"])];
    let noted = async || !remote.double.snapshot("refarch-notes").is_empty();
    eventually("the indexer to have claimed the index", TIMEOUT, noted).await;
    remote.double.set_faults(PineconeFaults {
        unavailable: 0.5,
        rate_limited: 0.5,
        ..PineconeFaults::default()
    });
    let before = remote.double.counts().requests;
    let began = Instant::now();
    assert_eq!(remote.run(&["generate", "--load", "--count", &rows.to_string()]).await.0, 0);
    // The work is tried, and none of it goes through.
    eventually("the index to be asked", TIMEOUT, async || remote.double.counts().requests > before + 5).await;
    while began.elapsed() < storm {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(remote.double.snapshot("").len(), 0);
    }
    let during = remote.status().await;
    assert_eq!(during["dead_letters"], 0, "{during}");
    let requests = remote.double.counts();
    println!("{rows} rows, {} s of 503 and 429: {requests:?}, dead letters 0", began.elapsed().as_secs());

    remote.double.set_faults(PineconeFaults::default());
    let over = Instant::now();
    remote.drained(rows).await;
    println!("drained {:.1} s after it was over", over.elapsed().as_secs_f64());
    let verified = remote.json(&["verify", "--json"]).await;
    println!("{verified}");
    assert_clean(&verified, rows);
    for role in roles {
        stop(role).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_change_is_the_only_dead_letter() {
    let rows = number("REFARCH_ROWS", 600);
    let source = [
        ("REFARCH_SOURCE_TABLE", "public.item"),
        ("REFARCH_SOURCE_TEXT", "title"),
        ("REFARCH_SOURCE_METADATA", "title,attributes"),
    ];
    let remote = Remote::start(&source).await;
    let client = remote.database.client().await;
    client
        .batch_execute("CREATE TABLE item (id bigint PRIMARY KEY, title text, attributes jsonb)")
        .await
        .unwrap();
    assert_eq!(remote.run(&["migrate"]).await.0, 0);
    let roles = [remote.spawn(&["listen"]), remote.spawn(&["embed", "--workers", "2"])];
    let began = Instant::now();
    // Metadata is flat at Pinecone: a nested object is refused, and the whole request with it.
    let poison = i64::try_from(rows / 2).unwrap();
    client
        .execute(
            "INSERT INTO item SELECT n, 'a chair of kind ' || n, \
             CASE n WHEN $2::bigint THEN '{\"size\": {\"width\": 3}}'::jsonb ELSE '\"plain\"'::jsonb END \
             FROM generate_series(1, $1::bigint) n",
            &[&i64::try_from(rows).unwrap(), &poison],
        )
        .await
        .unwrap();
    remote.drained(rows).await;
    let took = began.elapsed();
    let letters = remote.run(&["redrive", "--json"]).await.1;
    let letters: Vec<Value> = letters.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0]["ids"], serde_json::json!([poison.to_string()]));
    assert_eq!((&letters[0]["reason"], &letters[0]["tries"]), (&"refused".into(), &1.into()));
    assert!(letters[0]["error"].as_str().unwrap().contains("400"), "{letters:?}");
    assert_eq!(remote.double.snapshot("").len() as u64, rows - 1);
    println!(
        "{rows} rows with one refused: {} in sync after {:.1} s; {}",
        rows - 1,
        took.as_secs_f64(),
        letters[0]
    );
    let verified = remote.json(&["verify", "--json"]).await;
    assert_eq!((&verified["missing"], &verified["dead_letters"]), (&1.into(), &1.into()), "{verified}");

    // Mended behind the capture's back, so that only the dead letter tells of it.
    client
        .batch_execute(&format!(
            "SET session_replication_role = replica; UPDATE item SET attributes = '\"mended\"' WHERE id = {poison}"
        ))
        .await
        .unwrap();
    assert_eq!(remote.run(&["redrive", "--all"]).await.0, 0);
    remote.drained(rows).await;
    let verified = remote.json(&["verify", "--json"]).await;
    println!("{verified}");
    assert_clean(&verified, rows);
    for role in roles {
        stop(role).await;
    }
}

/// Processes whose working directory is under a folder.
fn processes_under(dir: &Path) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let cwd = std::fs::read_link(entry.path().join("cwd"));
        if cwd.is_ok_and(|cwd| cwd.starts_with(dir)) && pid != std::process::id() as i32 {
            found.push(Pid::from_raw(pid));
        }
    }
    found
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn killing_every_process_during_a_load_loses_nothing() {
    let rows = number("REFARCH_ROWS", 400);
    let dir = tempfile::tempdir().unwrap();
    // The server runs as another user when this is root.
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let runtime = dir.path().canonicalize().unwrap().join("project");
    std::fs::create_dir_all(&runtime).unwrap();
    std::os::unix::fs::symlink(common::runtime_dir().join("runtime"), runtime.join("runtime")).unwrap();
    let refarch = |args: &[&str]| {
        let mut command = common::refarch();
        command.current_dir(&runtime).env("REFARCH_RUNTIME_DIR", &runtime);
        // What the dead held is handed out again after this long.
        command.env("REFARCH_QUEUE_VISIBILITY_S", "4");
        command.args(args);
        command
    };
    let json = async |args: &[&str]| -> Value {
        let output = refarch(args).output().await.unwrap();
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{args:?}: {error}: {}", String::from_utf8_lossy(&output.stderr)))
    };
    let count = rows.to_string();
    // The roles as a user starts them, each on its own.
    assert!(refarch(&["migrate"]).status().await.unwrap().success());
    let spawn = |args: &[&str]| refarch(args).spawn().unwrap();
    let mut roles = vec![
        spawn(&["listen"]),
        spawn(&["embed", "--workers", "2"]),
        spawn(&["serve", "--bind", "127.0.0.1:0"]),
    ];
    let load = refarch(&["generate", "--load", "--count", &count]).status().await.unwrap();
    assert!(load.success());
    let times = 3;
    for time in 1..=times {
        let share = rows * time / (times + 1);
        eventually("a share to be in sync", lost_after(rows), async || {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let status = json(&["status", "--json"]).await;
            status["indexed"].as_u64().unwrap() >= share
        })
        .await;
        // The server's processes work in its data directory, under ours.
        let killed = processes_under(&runtime);
        for pid in &killed {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        for role in &mut roles {
            let _ = role.wait().await;
        }
        println!("killed {} processes with at least {share} of {rows} rows indexed", killed.len());
        assert!(killed.len() > 5, "the database must be among them");
        roles = vec![
            spawn(&["listen"]),
            spawn(&["embed", "--workers", "2"]),
            spawn(&["serve", "--bind", "127.0.0.1:0"]),
        ];
    }
    eventually("everything to be applied", lost_after(rows), async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        outstanding(&json(&["status", "--json"]).await) == 0
    })
    .await;
    let verified = json(&["verify", "--json"]).await;
    println!("{verified}");
    assert_clean(&verified, rows);
    for role in roles {
        stop(role).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_chaos_run_with_every_fault_converges() {
    // They wait most of the time.
    tokio::join!(drill("pinecone"), drill("pgvector"));
}

async fn drill(index: &str) {
    let minutes = std::env::var("REFARCH_CHAOS_MINUTES").unwrap_or_else(|_| "0.4".into());
    let args =
        ["chaos", "--products", "150", "--minutes", &minutes, "--seed", "7", "--index", index, "--json"];
    // What the user keeps in step, and under which names, is not the drill's.
    let mut command = common::refarch();
    command.args(args);
    // What operators do is healed by the continuous proof only.
    if !refarch::config::DEFAULTS.contains("\nperiod_h = ") {
        command.args(["--faults", "kill,freeze,restart,cut,duplicate,delay,hurry,storm,truncate"]);
    }
    command.env("REFARCH_QUEUE_NAME", "other").env("REFARCH_SOURCE_TABLE", "public.other");
    let output = command.output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{error}");
    let outcome: Value = serde_json::from_str(&text).unwrap();
    println!("{outcome}");
    assert!(outcome["faults"]["kills"].as_u64().unwrap() > 0, "{outcome}");
    assert!(outcome["written"]["updated"].as_u64().unwrap() > 0, "{outcome}");
    assert_eq!(outcome["written"]["writes_failed"], 0, "the application does not know of us: {outcome}");
    for key in ["missing", "stale", "orphaned", "undecided", "dead_letters", "table_differs", "index_differs"]
    {
        assert_eq!(outcome[key], 0, "{outcome}");
    }
}

/// How the embedding server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServerBehaviour {
    Well,
    Status(u16),
    /// Accepts the request and never answers.
    Hanging,
    /// Says nothing to what is not the greeting.
    HangingAfterTheGreeting,
    /// Fails at what is no harmless text, so many times.
    FailingAtChairs(u32),
    /// Says nothing to what is no harmless text.
    HangingAtChairs,
    /// Answers a request with a forbidden word in it like this.
    Filtering(u16),
}

/// An embedding server of `OpenAI`'s protocol, with vectors of eight numbers, in a mood.
#[derive(Clone)]
struct Texts {
    behaviour: Arc<Mutex<ServerBehaviour>>,
    requests: Arc<AtomicU64>,
    /// Requests that were not answered.
    hung: Arc<AtomicU64>,
    url: String,
}

impl Texts {
    async fn start(behaviour: ServerBehaviour) -> Self {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let texts = Self {
            behaviour: Arc::new(Mutex::new(behaviour)),
            requests: Arc::default(),
            hung: Arc::default(),
            url,
        };
        let answer = texts.clone();
        let router = axum::Router::new().fallback(move |body: axum::body::Bytes| {
            let answer = answer.clone();
            async move { answer.answer(&body).await }
        });
        tokio::spawn(async move { axum::serve(listener, router).await });
        texts
    }

    async fn answer(&self, body: &[u8]) -> (axum::http::StatusCode, String) {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let mut behaviour = *self.behaviour.lock().unwrap();
        if behaviour == ServerBehaviour::HangingAtChairs {
            let is_chair = String::from_utf8_lossy(body).contains("a chair");
            behaviour = if is_chair { ServerBehaviour::Hanging } else { ServerBehaviour::Well };
        }
        if behaviour == ServerBehaviour::HangingAfterTheGreeting {
            let is_greeting = String::from_utf8_lossy(body).contains("refarch");
            behaviour = if is_greeting { ServerBehaviour::Well } else { ServerBehaviour::Hanging };
        }
        if let ServerBehaviour::Filtering(status) = behaviour {
            let is_forbidden = String::from_utf8_lossy(body).contains("forbidden");
            behaviour = if is_forbidden { ServerBehaviour::Status(status) } else { ServerBehaviour::Well };
        }
        if let ServerBehaviour::FailingAtChairs(times) = behaviour {
            behaviour = ServerBehaviour::Well;
            if String::from_utf8_lossy(body).contains("a chair") && times > 0 {
                self.set(ServerBehaviour::FailingAtChairs(times - 1));
                behaviour = ServerBehaviour::Status(500);
            }
        }
        match behaviour {
            ServerBehaviour::Hanging => {
                self.hung.fetch_add(1, Ordering::SeqCst);
                std::future::pending().await
            }
            ServerBehaviour::Status(status) => (
                axum::http::StatusCode::from_u16(status).unwrap(),
                r#"{"error": {"message": "the double is in a mood"}}"#.into(),
            ),
            // The others were told apart above.
            _ => {
                let body: Value = serde_json::from_slice(body).unwrap();
                let count = body["input"].as_array().unwrap().len();
                let vectors: Vec<Value> = (0..count)
                    .map(|at| serde_json::json!({ "index": at, "embedding": [1, 2, 3, 4, 5, 6, 7, at] }))
                    .collect();
                (axum::http::StatusCode::OK, serde_json::json!({ "data": vectors }).to_string())
            }
        }
    }

    fn set(&self, behaviour: ServerBehaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }

    fn hung(&self) -> u64 {
        self.hung.load(Ordering::SeqCst)
    }
}

/// A database whose table `item` is embedded by such a server into pgvector.
struct UnreliableEmbedder {
    database: Database,
    texts: Texts,
    client: tokio_postgres::Client,
}

impl UnreliableEmbedder {
    async fn start(behaviour: ServerBehaviour) -> Self {
        Self::over("CREATE TABLE item (id bigint PRIMARY KEY, title text)", behaviour).await
    }

    async fn over(table: &str, behaviour: ServerBehaviour) -> Self {
        let database = Database::create().await;
        let texts = Texts::start(behaviour).await;
        let client = database.client().await;
        client.batch_execute(table).await.unwrap();
        let moody = Self { database, texts, client };
        assert!(moody.refarch(&["migrate"]).status().await.unwrap().success());
        moody
    }

    fn refarch(&self, args: &[&str]) -> Command {
        let mut command = self.database.refarch();
        command.args(args).envs([
            ("REFARCH_SOURCE_TABLE", "public.item"),
            ("REFARCH_SOURCE_TEXT", "title"),
            ("REFARCH_SOURCE_METADATA", "title"),
            ("REFARCH_EMBEDDER_KIND", "openai"),
            ("REFARCH_EMBEDDER_MODEL", "double"),
            ("REFARCH_EMBEDDER_DIMENSIONS", "8"),
            ("REFARCH_EMBEDDER_URL", &self.texts.url),
            ("REFARCH_RUNTIME_GRACE_S", "0"),
        ]);
        command
    }

    async fn rows(&self, count: i64) {
        let sql = "INSERT INTO item SELECT n, 'a chair of kind ' || n FROM generate_series(1, $1::bigint) n";
        self.client.execute(sql, &[&count]).await.unwrap();
    }

    async fn status(&self) -> Value {
        let output = self.refarch(&["status", "--json"]).output().await.unwrap();
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    async fn relay(&self) {
        assert!(self.refarch(&["listen", "--until-idle"]).status().await.unwrap().success());
    }

    /// The table of the vectors.
    async fn index(&self) -> String {
        let sql = "SELECT id FROM refarch.target WHERE state = 'active'";
        let generation: i32 = self.client.query_one(sql, &[]).await.unwrap().get(0);
        format!("refarch.vector_{generation}")
    }

    /// Vectors that the index holds.
    async fn vectors(&self) -> i64 {
        let sql = format!("SELECT count(*) FROM {}", self.index().await);
        self.client.query_one(&sql, &[]).await.unwrap().get(0)
    }

    fn working(&self) -> [Child; 2] {
        [self.refarch(&["listen"]).spawn().unwrap(), self.refarch(&["embed"]).spawn().unwrap()]
    }

    /// Kinds of the faults that workers have told of, however the rest of the database is.
    async fn kinds(&self) -> Vec<String> {
        let sql = "SELECT DISTINCT kind FROM refarch.fault ORDER BY 1";
        self.client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    }

    /// Changes in the dead-letter queue.
    async fn dead(&self) -> i64 {
        self.client.query_one("SELECT count(*) FROM pgmq.q_refarch_dead", &[]).await.unwrap().get(0)
    }

    /// Makes messages in flight visible at once.
    async fn release(&self) {
        let sql = "UPDATE pgmq.q_refarch_live SET vt = now(); UPDATE pgmq.q_refarch_bulk SET vt = now()";
        self.client.batch_execute(sql).await.unwrap();
    }

    async fn all_applied(&self, rows: i64) {
        eventually("every row to be applied", lost_after(rows as u64), async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            self.vectors().await == rows && outstanding(&self.status().await) == 0
        })
        .await;
    }

    async fn faults(&self) -> Vec<Value> {
        self.status().await["faults"].as_array().expect("a list of faults").clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_every_text_is_one_fault_and_no_dead_letter() {
    let rows = 300;
    let moody = UnreliableEmbedder::start(ServerBehaviour::Status(400)).await;
    moody.rows(rows).await;
    let roles = [moody.refarch(&["listen"]).spawn().unwrap(), moody.refarch(&["embed"]).spawn().unwrap()];
    eventually("many requests to be refused", TIMEOUT, async || moody.texts.requests() > 14).await;
    assert_eq!(moody.dead().await, 0);
    eventually("the fault to be shown", TIMEOUT, async || moody.faults().await.len() == 1).await;
    let faults = moody.faults().await;
    assert!(faults[0]["message"].as_str().unwrap().contains("400"), "{faults:?}");
    let text = moody.refarch(&["status"]).output().await.unwrap().stdout;
    assert!(String::from_utf8(text).unwrap().contains("400 Bad Request"));
    // Of a wrong key, too: the process stays, and goes on when the server is mended.
    for status in [401, 404] {
        moody.texts.set(ServerBehaviour::Status(status));
        let before = moody.texts.requests();
        eventually("another request", TIMEOUT, async || moody.texts.requests() > before).await;
    }
    eventually("the fault to say what it is now", TIMEOUT, async || {
        let faults = moody.faults().await;
        faults.len() == 1 && faults[0]["message"].as_str().unwrap().contains("404")
    })
    .await;
    moody.texts.set(ServerBehaviour::Well);
    moody.all_applied(rows).await;
    assert_eq!(moody.dead().await, 0);
    eventually("the fault to be gone", TIMEOUT, async || moody.faults().await.is_empty()).await;
    // It ends, too, when what was held is taken away: nothing is embedded for a delete.
    moody.texts.set(ServerBehaviour::Status(400));
    moody.client.batch_execute("UPDATE item SET title = 'other' WHERE id = 7").await.unwrap();
    eventually("another fault", TIMEOUT, async || moody.faults().await.len() == 1).await;
    moody.client.batch_execute("DELETE FROM item WHERE id = 7").await.unwrap();
    eventually("the fault to be gone", TIMEOUT, async || moody.faults().await.is_empty()).await;
    assert_eq!((moody.dead().await, moody.vectors().await), (0, rows - 1));
    for role in roles {
        stop(role).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_starts_with_a_wrong_key_leave_no_dead_letter() {
    let moody = UnreliableEmbedder::start(ServerBehaviour::Status(401)).await;
    moody.rows(3).await;
    moody.relay().await;
    for _ in 0..RESTARTS {
        // A command that works until nothing is left tells by its exit code that it cannot.
        let output = moody.refarch(&["embed", "--until-idle"]).output().await.unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stderr).contains("401"));
        moody.release().await;
    }
    assert_eq!(moody.dead().await, 0);
    moody.texts.set(ServerBehaviour::Well);
    assert!(moody.refarch(&["embed", "--until-idle"]).status().await.unwrap().success());
    assert_eq!((moody.vectors().await, moody.dead().await), (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn restarts_during_a_healthy_change_leave_no_dead_letter() {
    let killed_by = async |signal: Signal| {
        let moody = UnreliableEmbedder::start(ServerBehaviour::HangingAfterTheGreeting).await;
        moody.rows(2).await;
        moody.relay().await;
        let receives = async || -> i32 {
            let sql = "SELECT max(read_ct) FROM pgmq.q_refarch_live";
            moody.client.query_one(sql, &[]).await.unwrap().get(0)
        };
        for time in 1..=RESTARTS {
            let before = moody.texts.hung();
            let mut embed = moody.refarch(&["embed"]).spawn().unwrap();
            eventually("the change to be received", TIMEOUT, async || receives().await >= time).await;
            eventually("a text to be sent", TIMEOUT, async || moody.texts.hung() > before).await;
            kill(Pid::from_raw(embed.id().unwrap() as i32), signal).unwrap();
            embed.wait().await.unwrap();
            moody.release().await;
        }
        assert_eq!(moody.dead().await, 0, "{signal}");
        if signal == Signal::SIGTERM {
            let tries = "SELECT coalesce(max(tries), 0) FROM refarch.ledger";
            let tries: i32 = moody.client.query_one(tries, &[]).await.unwrap().get(0);
            assert_eq!(tries, 0, "what a stop interrupts is not counted");
        }
        moody.texts.set(ServerBehaviour::Well);
        assert!(moody.refarch(&["embed", "--until-idle"]).status().await.unwrap().success());
        assert_eq!((moody.vectors().await, moody.dead().await), (2, 0), "{signal}");
    };
    tokio::join!(killed_by(Signal::SIGTERM), killed_by(Signal::SIGKILL));
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_tries_of_other_workers_are_no_failures_of_a_change() {
    // Two failures, of four requests each.
    let moody = UnreliableEmbedder::start(ServerBehaviour::FailingAtChairs(8)).await;
    moody.rows(1).await;
    moody.relay().await;
    let sql = "INSERT INTO refarch.ledger (target, id, tries) SELECT id, '1', 9 FROM refarch.target; \
               UPDATE pgmq.q_refarch_live SET read_ct = 9";
    moody.client.batch_execute(sql).await.unwrap();
    assert!(moody.refarch(&["embed", "--until-idle"]).status().await.unwrap().success());
    assert_eq!((moody.vectors().await, moody.dead().await), (1, 0));
    // But one that always fails is given up, however it is counted.
    moody.texts.set(ServerBehaviour::FailingAtChairs(u32::MAX));
    moody.client.batch_execute("UPDATE item SET title = 'a chair again'").await.unwrap();
    moody.relay().await;
    assert!(moody.refarch(&["embed", "--until-idle"]).status().await.unwrap().success());
    assert_eq!(moody.dead().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_change_that_kills_every_worker_is_dead_lettered() {
    let moody = UnreliableEmbedder::start(ServerBehaviour::HangingAtChairs).await;
    moody.client.batch_execute("INSERT INTO item VALUES (1, 'a chair'), (2, 'a stool')").await.unwrap();
    moody.relay().await;
    let sql = "UPDATE pgmq.q_refarch_live SET read_ct = 9; \
               INSERT INTO refarch.ledger (target, id, tries) SELECT id, '1', 9 FROM refarch.target";
    moody.client.batch_execute(sql).await.unwrap();
    let tries = async || -> i32 {
        let sql = "SELECT tries FROM refarch.ledger WHERE id = '1'";
        moody.client.query_one(sql, &[]).await.unwrap().get(0)
    };
    for left in 10..=13 {
        let mut embed = moody.refarch(&["embed"]).spawn().unwrap();
        eventually("a try to be counted", TIMEOUT, async || tries().await == left).await;
        embed.kill().await.unwrap();
        // A killed worker may be about to count a try, or to take a count back.
        let sql = "UPDATE refarch.ledger SET tries = $1 WHERE id = '1'";
        moody.client.execute(sql, &[&left]).await.unwrap();
        assert_eq!(moody.dead().await, 0, "after {left}");
        moody.release().await;
    }
    assert!(moody.refarch(&["embed", "--until-idle"]).status().await.unwrap().success());
    assert_eq!((moody.vectors().await, moody.dead().await), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_another_build_or_source_is_put_back_and_reported() {
    let moody = UnreliableEmbedder::start(ServerBehaviour::Well).await;
    moody.rows(1).await;
    moody.relay().await;
    for body in [
        r#"{"v": 2, "source": "products", "what": "nobody knows yet"}"#,
        r#"{"v": 1, "source": "other", "lane": "live", "oldest": "2026-01-02T03:04:05Z", "groups": [{"version": 1, "op": "upsert", "ids": ["1"]}]}"#,
        r#"{"price": 1}"#,
        // Ours, with a time beyond all sense.
        r#"{"v": 1, "source": "products", "lane": "live", "oldest": "2026-01-02T03:04:05Z", "groups": [{"version": 1, "op": "upsert", "after_ms": 18446744073709551615, "ids": ["1"]}]}"#,
    ] {
        // As if it had come again and again.
        let sql = format!(
            "SELECT pgmq.send('refarch_live', '{body}'); UPDATE pgmq.q_refarch_live SET read_ct = 40"
        );
        moody.client.batch_execute(&sql).await.unwrap();
    }
    let embed = moody.refarch(&["embed"]).spawn().unwrap();
    eventually("the fault to be shown", TIMEOUT, async || !moody.faults().await.is_empty()).await;
    eventually("what can be done to be done", TIMEOUT, async || {
        outstanding(&moody.status().await) == 2 && moody.vectors().await == 1
    })
    .await;
    let faults = moody.faults().await;
    assert_eq!(faults.len(), 1, "{faults:?}");
    let message = faults[0]["message"].as_str().unwrap();
    assert!(message.contains("version 2") && message.contains("\"other\""), "{message}");
    let sql = "SELECT message->>'v', message->>'source', vt > now() + interval '20 s' FROM pgmq.q_refarch_live ORDER BY 1";
    let left: Vec<(String, String, bool)> = moody
        .client
        .query(sql, &[])
        .await
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect();
    assert_eq!(left, [("1".into(), "other".into(), true), ("2".into(), "products".into(), true)]);
    assert_eq!(moody.dead().await, 1, "the one that is no job");
    stop(embed).await;
    assert!(moody.faults().await.is_empty(), "a worker that left has none");
    // These messages do not keep a command from ending.
    moody.release().await;
    assert!(moody.refarch(&["embed", "--until-idle"]).status().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_of_the_vector_table_leaves_no_dead_letter() {
    let moody = UnreliableEmbedder::start(ServerBehaviour::Well).await;
    let roles = moody.working();
    moody.rows(3).await;
    moody.all_applied(3).await;
    // What a damaged index does to every write.
    let table = moody.index().await;
    let sql = format!("ALTER TABLE {table} ADD CONSTRAINT damaged CHECK (false) NOT VALID");
    moody.client.batch_execute(&sql).await.unwrap();
    moody.client.batch_execute("UPDATE item SET title = title || ' again'").await.unwrap();
    eventually("the fault to be shown", TIMEOUT, async || {
        assert_eq!(moody.dead().await, 0);
        moody.faults().await.iter().any(|fault| fault["kind"] == "held")
    })
    .await;
    moody.client.batch_execute(&format!("ALTER TABLE {table} DROP CONSTRAINT damaged")).await.unwrap();
    moody.all_applied(3).await;
    // The workers know where the extension was.
    let sql = "CREATE SCHEMA elsewhere; ALTER EXTENSION vector SET SCHEMA elsewhere; \
               INSERT INTO item SELECT n, 'a chair of kind ' || n FROM generate_series(4, 6) n";
    moody.client.batch_execute(sql).await.unwrap();
    moody.all_applied(6).await;
    assert_eq!(moody.dead().await, 0);
    for role in roles {
        stop(role).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_refused_text_does_not_hold_other_rows() {
    for status in [403, 406] {
        let moody = UnreliableEmbedder::start(ServerBehaviour::Filtering(status)).await;
        moody.rows(9).await;
        moody.client.batch_execute("UPDATE item SET title = 'a forbidden word' WHERE id = 5").await.unwrap();
        let roles = moody.working();
        moody.all_applied(8).await;
        assert_eq!(moody.dead().await, 1, "{status}");
        for role in roles {
            stop(role).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_rows_do_not_hold_other_rows() {
    // One is damaged (class XX), the other one beyond a limit of the server's (class 54).
    let table = "CREATE TYPE colour AS ENUM ('red', 'blue', 'broken', 'deep'); \
        CREATE FUNCTION colour_text(colour) RETURNS text LANGUAGE plpgsql STABLE AS $$ BEGIN \
          IF $1 = 'broken' THEN RAISE 'missing chunk number 0 for toast value' USING ERRCODE = 'XX001'; END IF; \
          IF $1 = 'deep' THEN RETURN public.colour_text($1); END IF; \
          RETURN concat('a chair ', $1); END $$; \
        CREATE CAST (colour AS text) WITH FUNCTION colour_text(colour); \
        CREATE TABLE item (id bigint PRIMARY KEY, title colour)";
    let moody = UnreliableEmbedder::over(table, ServerBehaviour::Well).await;
    let sql = "INSERT INTO item VALUES (1, 'red'), (2, 'broken'), (3, 'blue'), (4, 'deep')";
    moody.client.batch_execute(sql).await.unwrap();
    let roles = moody.working();
    moody.all_applied(2).await;
    let letters = moody.refarch(&["redrive"]).output().await.unwrap();
    let letters = String::from_utf8(letters.stdout).unwrap();
    assert!(letters.contains("toast value") && letters.contains("stack depth"), "{letters}");
    assert_eq!(moody.dead().await, 2);
    for role in roles {
        stop(role).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_on_the_vector_table_does_not_block_the_application() {
    let moody = UnreliableEmbedder::start(ServerBehaviour::Well).await;
    let roles = moody.working();
    moody.rows(1).await;
    moody.all_applied(1).await;
    let table = moody.index().await;
    // As a build of the graph by a role that does not own the table.
    let builder = moody.database.client().await;
    builder.batch_execute(&format!("BEGIN; LOCK TABLE {table} IN SHARE MODE")).await.unwrap();
    moody.client.batch_execute("INSERT INTO item VALUES (2, 'a stool')").await.unwrap();
    eventually("the indexer to wait", TIMEOUT, async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = $1::text::regclass)";
        moody.client.query_one(sql, &[&table]).await.unwrap().get(0)
    })
    .await;
    let altered = "SET lock_timeout = '20 s'; ALTER TABLE item ADD COLUMN note text; RESET lock_timeout";
    moody.client.batch_execute(altered).await.expect("the application waits for the graph");
    builder.batch_execute("COMMIT").await.unwrap();
    moody.all_applied(2).await;
    assert_eq!(moody.dead().await, 0);
    for role in roles {
        stop(role).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn running_roles_survive_a_queue_that_is_missing_for_a_while() {
    let moody = UnreliableEmbedder::start(ServerBehaviour::Well).await;
    let mut roles = moody.working();
    moody.rows(1).await;
    moody.all_applied(1).await;
    let sql = "ALTER TABLE pgmq.q_refarch_live RENAME TO gone; INSERT INTO item VALUES (2, 'a stool')";
    moody.client.batch_execute(sql).await.unwrap();
    let mut seen = Vec::new();
    eventually("both faults to be shown", TIMEOUT, async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        for role in &mut roles {
            assert_eq!(role.try_wait().unwrap(), None, "a role ended");
        }
        seen = moody.kinds().await;
        ["queue", "relay"].iter().all(|kind| seen.iter().any(|one| one == kind))
    })
    .await;
    moody.client.batch_execute("ALTER TABLE pgmq.gone RENAME TO q_refarch_live").await.unwrap();
    moody.all_applied(2).await;
    eventually("the faults to be gone", TIMEOUT, async || moody.kinds().await.is_empty()).await;
    for role in roles {
        stop(role).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_that_start_while_something_is_missing_wait_for_it() {
    let moody = UnreliableEmbedder::start(ServerBehaviour::Well).await;
    moody.rows(1).await;
    let start = |part: &str, timeout: &str| {
        let mut command = moody.refarch(&[part]);
        command.env("REFARCH_DATABASE_CONNECT_TIMEOUT_S", timeout).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let parts = ["listen", "embed"];
    // As amid a restore: first nothing is there, and at the first receive the queue is not.
    moody.client.batch_execute("ALTER SCHEMA refarch RENAME TO away").await.unwrap();
    let mut roles = parts.map(|part| start(part, "600"));
    for role in &mut roles {
        let mut lines = BufReader::new(role.stderr.take().unwrap()).lines();
        let mut told = String::new();
        while let Some(line) = lines.next_line().await.unwrap() {
            told += &line;
            if told.contains("no schema refarch") {
                break;
            }
        }
        assert_eq!(role.try_wait().unwrap(), None, "a role ended: {told}");
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    }
    let sql = "ALTER TABLE pgmq.q_refarch_live RENAME TO gone; ALTER SCHEMA away RENAME TO refarch";
    moody.client.batch_execute(sql).await.unwrap();
    eventually("both faults to be shown", TIMEOUT, async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        for role in &mut roles {
            assert_eq!(role.try_wait().unwrap(), None, "a role ended");
        }
        moody.kinds().await == ["queue", "relay"]
    })
    .await;
    // Not for ever: the name may be wrong.
    for part in parts {
        let output = start(part, "1").wait_with_output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{part}: {said}");
        assert!(said.contains("q_refarch_live"), "{part}: {said}");
    }
    moody.client.batch_execute("ALTER TABLE pgmq.gone RENAME TO q_refarch_live").await.unwrap();
    moody.all_applied(1).await;
    eventually("the faults to be gone", TIMEOUT, async || moody.kinds().await.is_empty()).await;
    for role in roles {
        stop(role).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_was_put_back_stays_invisible_while_other_messages_are_processed() {
    let moody = UnreliableEmbedder::start(ServerBehaviour::Hanging).await;
    moody.rows(1).await;
    moody.relay().await;
    let sql = r#"SELECT pgmq.send('refarch_live', '{"v": 2, "source": "products"}')"#;
    moody.client.batch_execute(sql).await.unwrap();
    // The first message is received by itself, and the other two together.
    moody.client.batch_execute("INSERT INTO item VALUES (2, 'a chair')").await.unwrap();
    moody.relay().await;
    // In seconds, for how much longer the message of another build is invisible.
    let hidden = async || -> f64 {
        let sql = "SELECT extract(epoch FROM vt - now())::float8 FROM pgmq.q_refarch_live WHERE message->>'v' = '2'";
        moody.client.query_one(sql, &[]).await.unwrap().get(0)
    };
    let ours = async || -> f64 {
        let sql = "SELECT extract(epoch FROM vt)::float8 FROM pgmq.q_refarch_live WHERE message->>'v' = '1' ORDER BY msg_id DESC LIMIT 1";
        moody.client.query_one(sql, &[]).await.unwrap().get(0)
    };
    let embed = moody.refarch(&["embed"]).env("REFARCH_QUEUE_VISIBILITY_S", "3").spawn().unwrap();
    eventually("the message to be put back", TIMEOUT, async || hidden().await > 10.0).await;
    let mut last = ours().await;
    for _ in 0..2 {
        eventually("ours to be held on to", TIMEOUT, async || ours().await > last).await;
        last = ours().await;
    }
    assert!(hidden().await > 10.0, "{}", hidden().await);
    stop(embed).await;
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn large_texts_are_read_a_few_at_a_time() {
    let rows = 100;
    let moody = UnreliableEmbedder::start(ServerBehaviour::Well).await;
    let sql =
        "INSERT INTO item SELECT n, n || repeat(' a chair', 250000) FROM generate_series(1, $1::bigint) n";
    moody.client.execute(sql, &[&rows]).await.unwrap();
    moody.relay().await;
    let embed = moody.refarch(&["embed"]).spawn().unwrap();
    moody.all_applied(rows).await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", embed.id().unwrap())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kb: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("{rows} rows of 2 MB: peak {peak_kb} kB");
    // Groups of 8 MiB, some of them under way at once, and the proof's pages beside; all rows are 200 MB.
    assert!(peak_kb < 240_000, "{peak_kb} kB");
    stop(embed).await;
}
