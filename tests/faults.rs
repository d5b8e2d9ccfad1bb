//! What happens to real processes on bad days: an index that is away, a change that is refused, and
//! everybody killed at once.
//!
//! Sizes are small enough for the suite; the environment makes them large: `REFARCH_ROWS` and
//! `REFARCH_STORM_S`. Each test prints what it saw.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Database, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use refarch::role::chaos::double::{Double, Faults};
use serde_json::Value;
use tokio::process::{Child, Command};

/// Longer than anything here takes on a busy machine, for a thousand rows.
const PATIENCE: Duration = Duration::from_mins(3);

/// Length of the model's vectors.
const DIMENSIONS: usize = 384;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn patience(rows: u64) -> Duration {
    PATIENCE + Duration::from_millis(rows * 60)
}

/// A database whose index is a double of Pinecone's.
struct Remote {
    database: Database,
    double: Double,
    env: Vec<(String, String)>,
}

impl Remote {
    async fn start(extra: &[(&str, &str)]) -> Self {
        let double = Double::start(DIMENSIONS, 1).await.unwrap();
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
        eventually("everything to be applied", patience(rows), async || {
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
async fn an_index_that_is_away_leaves_no_dead_letter_behind() {
    let rows = number("REFARCH_ROWS", 300);
    let storm = Duration::from_secs(number("REFARCH_STORM_S", 15));
    let remote = Remote::start(&[]).await;
    assert_eq!(remote.run(&["migrate"]).await.0, 0);
    let roles = [remote.spawn(&["listen"]), remote.spawn(&["embed", "--workers", "2"])];
    let noted = async || !remote.double.snapshot("refarch-notes").is_empty();
    eventually("the indexer to have claimed the index", PATIENCE, noted).await;
    remote.double.set_faults(Faults { unavailable: 0.5, rate_limited: 0.5, ..Faults::default() });
    let before = remote.double.counts().requests;
    let began = Instant::now();
    assert_eq!(remote.run(&["generate", "--load", "--count", &rows.to_string()]).await.0, 0);
    // The work is tried, and none of it goes through.
    eventually("the index to be asked", PATIENCE, async || remote.double.counts().requests > before + 5)
        .await;
    while began.elapsed() < storm {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(remote.double.snapshot("").len(), 0);
    }
    let during = remote.status().await;
    assert_eq!(during["dead_letters"], 0, "{during}");
    let requests = remote.double.counts();
    println!("{rows} rows, {} s of 503 and 429: {requests:?}, dead letters 0", began.elapsed().as_secs());

    remote.double.set_faults(Faults::default());
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
async fn a_change_that_is_refused_stands_alone_among_the_dead_letters() {
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
async fn everybody_killed_at_once_during_a_load_loses_nothing() {
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
        command.env("REFARCH_QUEUE_VISIBILITY_S", "10");
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
        eventually("a share to be in sync", patience(rows), async || {
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
    eventually("everything to be applied", patience(rows), async || {
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
async fn a_short_drill_of_everything_leaves_nothing_behind() {
    let minutes = std::env::var("REFARCH_CHAOS_MINUTES").unwrap_or_else(|_| "0.4".into());
    for index in ["pinecone", "pgvector"] {
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
        for key in
            ["missing", "stale", "orphaned", "undecided", "dead_letters", "table_differs", "index_differs"]
        {
            assert_eq!(outcome[key], 0, "{outcome}");
        }
    }
}
