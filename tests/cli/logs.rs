//! What the roles write: nothing of a secret or of a row, and one JSON object a line where that is asked for.

use std::process::Stdio;
use std::time::Duration;

use refarch::double::embedder::{self, EmbedderDouble};
use refarch::double::pinecone::{PineconeDouble, Verb};
use refarch::double::sqs::SqsDouble;
use reqwest::Client;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio_postgres::Client as Session;

use crate::common::{self, Database, eventually};

const TIMEOUT: Duration = Duration::from_mins(2);

/// Is in every secret, and in no other text.
const SECRET: &str = "hunter2mark";

/// Is in every text of a row.
const ROW: &str = "rowmark";

/// What was written, by whom.
#[derive(Default)]
struct Written {
    /// Logs and metrics, where neither secrets nor rows may be.
    logs: Vec<(String, String)>,
    /// Results on standard output, which may name rows by their ids.
    results: Vec<(String, String)>,
}

impl Written {
    fn add(&mut self, role: &str, output: &std::process::Output) {
        self.logs.push((role.into(), String::from_utf8_lossy(&output.stderr).into_owned()));
        self.results.push((role.into(), String::from_utf8_lossy(&output.stdout).into_owned()));
    }

    fn log_of(&self, role: &str) -> Vec<Value> {
        let lines = self.logs.iter().filter(|(name, _)| name == role).flat_map(|(_, text)| text.lines());
        lines
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{role}: not JSON: {line}")))
            .collect()
    }
}

/// Services with secrets: a database with a password, an index, a queue and an embedder with keys.
struct Services {
    database: Database,
    session: Session,
    index: PineconeDouble,
    env: Vec<(&'static str, String)>,
    _queue: SqsDouble,
    _embedder: EmbedderDouble,
}

impl Services {
    async fn start() -> Self {
        let database = Database::create().await;
        let session = database.client().await;
        let user = format!("{}_role", database.name());
        session
            .batch_execute(&format!("CREATE ROLE {user} SUPERUSER LOGIN PASSWORD '{SECRET}'"))
            .await
            .unwrap();
        let url = format!("{} user={user} password={SECRET}", database.url());
        let index = PineconeDouble::start(embedder::DIMENSIONS, 1).await.unwrap();
        let (queue, embedder) = (SqsDouble::start(1).await.unwrap(), EmbedderDouble::start().await.unwrap());
        let [live, bulk, dead] = queue.create("logs", 30);
        let with_token = format!("{}?token={SECRET}", embedder.url());
        let key = || SECRET.to_owned();
        let env = vec![
            ("DATABASE_URL", url),
            ("SQS_QUEUE_URL", live),
            ("SQS_BULK_QUEUE_URL", bulk),
            ("SQS_DEAD_LETTER_QUEUE_URL", dead),
            ("AWS_ENDPOINT_URL_SQS", queue.url()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", "test".into()),
            ("AWS_SECRET_ACCESS_KEY", key()),
            ("REFARCH_QUEUE_WAIT_S", "1".into()),
            ("REFARCH_INDEX_KIND", "pinecone".into()),
            ("REFARCH_INDEX_HOST", index.url()),
            ("PINECONE_API_KEY", key()),
            ("REFARCH_EMBEDDER_KIND", "openai".into()),
            ("REFARCH_EMBEDDER_URL", with_token),
            ("REFARCH_EMBEDDER_MODEL", embedder::MODEL.into()),
            ("REFARCH_EMBEDDER_DIMENSIONS", embedder::DIMENSIONS.to_string()),
            ("REFARCH_EMBEDDER_API_KEY", key()),
            ("REFARCH_SERVE_EDIT_TOKEN", key()),
            ("REFARCH_LOG_FORMAT", "json".into()),
            // A collector that does not answer, so that errors tell its address.
            ("REFARCH_OTLP_ENDPOINT", format!("http://user:{SECRET}@127.0.0.1:1")),
            ("OTEL_EXPORTER_OTLP_HEADERS", format!("api-key={SECRET}")),
            ("OTEL_METRIC_EXPORT_INTERVAL", "500".into()),
            ("REFARCH_OTLP_SAMPLE", "1".into()),
            ("REFARCH_LOG_EMF", "shop".into()),
            // Everything that refarch logs, not only what it logs by default.
            ("REFARCH_LOG_LEVEL", "info,refarch=trace".into()),
        ];
        Self { database, session, index, env, _queue: queue, _embedder: embedder }
    }

    fn refarch(&self, args: &[&str]) -> Command {
        let mut command = common::refarch();
        command.args(args).envs(self.env.iter().map(|(key, value)| (key, value)));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
        command
    }

    async fn run(&self, written: &mut Written, args: &[&str]) -> Option<i32> {
        let output = self.refarch(args).output().await.unwrap();
        written.add(args[0], &output);
        output.status.code()
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        // The role is no database's, so the test's database does not take it along. It owns nothing.
        let (name, url) = (format!("{}_role", self.database.name()), self.database.url());
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let session = common::connect(&url).await;
                let sql = format!(
                    "REASSIGN OWNED BY {name} TO CURRENT_USER; DROP OWNED BY {name}; DROP ROLE {name}"
                );
                session.batch_execute(&sql).await
            })
        });
        if !dropped.join().is_ok_and(|dropped| dropped.is_ok()) {
            eprintln!("cannot drop the test's role");
        }
    }
}

/// A role that runs for long. It writes into files: a pipe that nobody reads would stop it.
struct Role {
    name: &'static str,
    child: Child,
    admin: String,
    dir: TempDir,
}

impl Role {
    fn start(services: &Services, name: &'static str, args: &[&str]) -> Self {
        let (admin, dir) = (format!("127.0.0.1:{}", common::free_port()), tempfile::tempdir().unwrap());
        let file = |name: &str| std::fs::File::create(dir.path().join(name)).unwrap();
        let mut command = services.refarch(&[name]);
        command.args(args).args(["--admin", &admin]).stdout(file("out")).stderr(file("err"));
        Self { name, child: command.spawn().unwrap(), admin: format!("http://{admin}"), dir }
    }

    /// Stops it, and takes what it wrote.
    async fn stop(mut self, written: &mut Written) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = self.child.wait().await.unwrap();
        let read = |name: &str| std::fs::read_to_string(self.dir.path().join(name)).unwrap();
        let (out, log) = (read("out"), read("err"));
        assert!(status.success(), "{}: {log}", self.name);
        written.logs.push((self.name.into(), log));
        written.results.push((self.name.into(), out));
    }
}

async fn text(client: &Client, url: &str) -> String {
    client.get(url).send().await.unwrap().text().await.unwrap()
}

fn insert(count: u32) -> String {
    format!(
        "INSERT INTO products_with_increment (name, sku, description, price) \
         SELECT '{ROW} name ' || n, '{ROW}-' || n, '{ROW} text ' || n, '$5' FROM generate_series(1, {count}) n"
    )
}

/// Lets the roles work on rows, over services that refuse some of it, and reads and edits through the page.
async fn work(services: &Services, written: &mut Written) {
    // One record is refused for good, so that its change becomes a dead letter.
    services.index.forbid(|verb, _, id| verb == Verb::Upsert && id == "3");
    let (bind, client) = (format!("127.0.0.1:{}", common::free_port()), Client::new());
    let roles = [
        Role::start(services, "listen", &[]),
        Role::start(services, "embed", &["--workers", "1"]),
        Role::start(services, "serve", &["--bind", &bind]),
    ];
    for role in &roles {
        let url = format!("{}/readyz", role.admin);
        eventually(&format!("{} to be ready", role.name), TIMEOUT, async || {
            client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
    }
    common::run(&services.session, &insert(5)).await;
    let api = format!("http://{bind}/api/v1");
    text(&client, &format!("{api}/search?q={ROW}")).await;
    for token in [SECRET, "hunter2mark-wrong"] {
        let row = json!({ "name": ROW, "sku": ROW, "description": ROW, "price": "$7" });
        let created =
            client.post(format!("{api}/products")).bearer_auth(token).json(&row).send().await.unwrap();
        assert_eq!(created.status().is_success(), token == SECRET);
    }
    let listen = roles[0].admin.clone();
    eventually("a dead letter, and everything else to be searchable", TIMEOUT, async || {
        let page = text(&client, &format!("{listen}/metrics")).await;
        let has = |line: &str| page.lines().any(|there| there == line);
        has("refarch_dead_letters{source=\"products\"} 1.0")
            && has("refarch_backlog_seconds{source=\"products\"} 0.0")
    })
    .await;
    for role in roles {
        for path in ["metrics", "readyz"] {
            let page = text(&client, &format!("{}/{path}", role.admin)).await;
            written.logs.push((format!("{}'s {path}", role.name), page));
        }
        role.stop(written).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_role_writes_a_secret_or_a_row() {
    let services = Services::start().await;
    let mut written = Written::default();
    let run = async |written: &mut Written, args: &[&str], code| {
        assert_eq!(services.run(written, args).await, Some(code), "{args:?}: {:?}", written.logs.last());
    };
    run(&mut written, &["migrate"], 0).await;
    run(&mut written, &["generate", "--load", "--count", "5"], 0).await;
    work(&services, &mut written).await;
    run(&mut written, &["status"], 0).await;
    run(&mut written, &["status", "--json"], 0).await;
    run(&mut written, &["redrive"], 0).await;
    run(&mut written, &["redrive", "--json"], 0).await;
    services.index.forbid(|_, _, _| false);
    run(&mut written, &["redrive", "--all"], 0).await;
    let bind = format!("127.0.0.1:{}", common::free_port());
    run(&mut written, &["up", "--until-synced", "--bind", &bind, "--admin", "127.0.0.1:0"], 0).await;
    run(&mut written, &["verify", "--sample", "5"], 0).await;
    run(&mut written, &["config"], 0).await;
    run(&mut written, &["events"], 0).await;
    run(&mut written, &["psql", "-c", "SELECT id FROM products_with_increment"], 0).await;
    run(&mut written, &["health"], 1).await;
    run(&mut written, &["plan", "--records", "1k"], 0).await;
    // Some seconds, in a world of its own. What it finds is not the matter here.
    let chaos = ["chaos", "--products", "20", "--minutes", "0.05", "--no-proof", "--faults", "kill"];
    services.run(&mut written, &chaos).await;
    run(&mut written, &["migrate", "--uninstall"], 2).await;
    // Errors of services tell their addresses.
    let mut command = services.refarch(&["embed"]);
    command.env("REFARCH_EMBEDDER_URL", format!("http://127.0.0.1:1/v1?api_key={SECRET}"));
    command.env("REFARCH_SOURCE_NAME", "other");
    written.add("embed with a wrong setting", &command.output().await.unwrap());

    for (by, text) in written.logs.iter().chain(&written.results) {
        let found: Vec<&str> = text.lines().filter(|line| line.contains(SECRET)).collect();
        assert!(found.is_empty(), "{by} wrote a secret: {found:#?}");
    }
    for (by, text) in &written.logs {
        let found: Vec<&str> = text.lines().filter(|line| line.contains(ROW)).collect();
        assert!(found.is_empty(), "{by} wrote what is in a row: {found:#?}");
    }
    check_lines(&written);
}

/// Each line is an object with the names of its worker, and the counts are told as the reference architecture's dashboard
/// asks for them.
fn check_lines(written: &Written) {
    for (role, service, action, counts) in [
        ("listen", "pelican", "record_write", &["changes", "live", "bulk", "claims"][..]),
        ("embed", "emu", "embedding_completed", &["applied", "embedded", "avoided", "dead_lettered"]),
        ("up", "refarch", "", &[]),
        ("serve", "frontend", "", &[]),
        ("generate", "refarch", "", &[]),
    ] {
        let lines = written.log_of(role);
        assert!(role == "generate" || !lines.is_empty(), "{role} wrote nothing");
        for line in &lines {
            for key in ["timestamp", "level", "service", "worker_id", "message"] {
                assert!(line[key].is_string(), "{role}, {key}: {line}");
            }
        }
        let names_service = |line: &Value| line["service"] == service;
        assert!(role == "up" || lines.iter().all(names_service), "{role}: {lines:#?}");
        let told: Vec<&Value> = lines.iter().filter(|line| line["action"] == action).collect();
        if action.is_empty() {
            continue;
        }
        assert!(!told.is_empty(), "{role} does not tell {action}: {lines:#?}");
        for line in told {
            let worker = line["worker_id"].as_str().unwrap();
            assert!(worker.starts_with(&format!("{role}-")) && line["level"] == "INFO", "{line}");
            assert!(counts.iter().all(|count| line[count].is_u64()), "{line}");
        }
    }
    // In one process each worker names itself.
    let services: Vec<Value> =
        written.log_of("up").into_iter().filter(|line| line["action"].is_string()).collect();
    assert!(services.iter().all(|line| ["pelican", "emu"].contains(&line["service"].as_str().unwrap())));
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_a_worker_logs_counts_and_no_line_for_each_row() {
    let database = Database::create().await;
    let migrated = database.refarch().arg("migrate").output().await.unwrap();
    assert!(migrated.status.success());
    let session = database.client().await;
    common::run(&session, &insert(60)).await;
    // One transaction each, so that each is a batch of its own sooner or later.
    for n in 1..=60 {
        common::run(
            &session,
            &format!("UPDATE products_with_increment SET description = '{ROW} {n}' WHERE id = {n}"),
        )
        .await;
    }
    for (role, most) in [("listen", 20), ("embed", 20)] {
        let mut command = database.refarch();
        command.args([role, "--until-idle", "--log-format", "json"]);
        let output = command.output().await.unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{log}");
        assert!(log.lines().count() < most, "{role} logs too much: {log}");
        let sum = |key: &str| -> u64 {
            let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            lines.filter(|line| line["action"].is_string()).filter_map(|line| line[key].as_u64()).sum()
        };
        assert_eq!(sum(if role == "listen" { "changes" } else { "applied" }), 60, "{log}");
    }
}

#[tokio::test]
async fn an_error_is_a_line_of_json_where_that_is_asked_for() {
    let mut command = common::refarch();
    command
        .args(["listen", "--log-format", "json"])
        .env("DATABASE_URL", format!("postgres://u:{SECRET}@127.0.0.1:1/d"));
    let output = command.env("REFARCH_DATABASE_CONNECT_TIMEOUT_S", "1").output().await.unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && !log.contains(SECRET), "{log}");
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    assert_eq!((&last["level"], &last["service"]), (&"ERROR".into(), &"pelican".into()), "{log}");
    assert!(last["message"].as_str().unwrap().starts_with("refarch: "), "{log}");
}
