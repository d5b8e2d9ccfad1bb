//! A shop of some products and its index, which tests damage past the roles.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use refarch::backend::Backends;
use refarch::double::pinecone::{PineconeDouble, Record};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio_postgres::Client;

use crate::common::source::settings;
use crate::common::{self, Database, eventually};

/// Longer than anything here takes on a busy machine.
pub const TIMEOUT: Duration = Duration::from_mins(2);

/// As many as the model's vectors have.
pub const DIMENSIONS: usize = 384;

/// Rows of a filled shop; the last has no text.
pub const ROWS: u64 = 30;

pub const TABLE: &str = "products_with_increment";

/// A database and an index of its own; without a double the index is pgvector's.
pub struct Shop {
    pub database: Database,
    pub client: Client,
    pub double: Option<PineconeDouble>,
    pub env: Vec<(&'static str, String)>,
}

/// The result of a run of verify.
#[derive(Debug)]
pub struct Verified {
    pub code: Option<i32>,
    pub report: Value,
    pub err: String,
}

pub async fn on_pgvector() -> Shop {
    Shop::new(None).await
}

pub async fn on_pinecone() -> Shop {
    Shop::new(Some(PineconeDouble::start(DIMENSIONS, 1).await.unwrap())).await
}

impl Shop {
    pub async fn new(double: Option<PineconeDouble>) -> Self {
        let database = Database::create().await;
        let mut env = Vec::new();
        if let Some(double) = &double {
            env.extend([
                ("REFARCH_INDEX_KIND", "pinecone".to_owned()),
                ("REFARCH_INDEX_HOST", double.url()),
                ("REFARCH_INDEX_API_KEY", "x".to_owned()),
                ("REFARCH_INDEX_TIMEOUT_MS", "1000".to_owned()),
                ("REFARCH_INDEXER_LEASE_MS", "4000".to_owned()),
                ("REFARCH_INDEXER_SETTLE_MS", "2000".to_owned()),
            ]);
        }
        let client = database.client().await;
        Self { database, client, double, env }
    }

    /// With more settings.
    pub fn with(mut self, env: &[(&'static str, &str)]) -> Self {
        self.env.extend(env.iter().map(|(key, value)| (*key, (*value).to_owned())));
        self
    }

    /// With rows, all of them indexed.
    pub async fn filled(self) -> Self {
        self.role(&["migrate"]).await;
        self.sql(&format!(
            "INSERT INTO {TABLE} (id, name, description) \
             SELECT i, 'product ' || i, CASE WHEN i < {ROWS} THEN 'The ' || i || ' bottles of green glass' END \
             FROM generate_series(1, {ROWS}) i"
        ))
        .await;
        self.apply().await;
        self
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.database.refarch();
        command.args(args).envs(self.env.iter().cloned()).stdin(Stdio::null());
        command
    }

    /// Runs a role to its end, and returns what it printed.
    pub async fn role(&self, args: &[&str]) -> String {
        self.ended(args).await.0
    }

    /// Runs a role to its end, and returns what it logged.
    pub async fn logged(&self, args: &[&str]) -> String {
        self.ended(args).await.1
    }

    async fn ended(&self, args: &[&str]) -> (String, String) {
        let output = self.command(args).output().await.unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {err}");
        (String::from_utf8(output.stdout).unwrap(), err)
    }

    /// Applies what is pending. Changes of one row in both lanes may overlap, and then are queued again.
    pub async fn apply(&self) {
        let left = "SELECT EXISTS (SELECT FROM refarch.outbox) OR EXISTS (SELECT FROM refarch.attempt)";
        eventually("all changes to be applied", TIMEOUT, async || {
            self.role(&["listen", "--until-idle"]).await;
            self.role(&["embed", "--until-idle", "--workers", "1"]).await;
            !self.client.query_one(left, &[]).await.unwrap().get::<_, bool>(0)
        })
        .await;
    }

    /// Starts the roles that keep the index in step.
    pub fn start_roles(&self) -> [Child; 2] {
        [&["listen"][..], &["embed", "--workers", "1"]].map(|args| self.command(args).spawn().unwrap())
    }

    pub async fn verify(&self, args: &[&str]) -> Verified {
        let output = self.command(&["verify", "--json"]).args(args).output().await.unwrap();
        let report = serde_json::from_slice(&output.stdout).unwrap_or_default();
        Verified { code: output.status.code(), report, err: String::from_utf8(output.stderr).unwrap() }
    }

    /// The backends, in this process.
    pub async fn backends(&self) -> Backends {
        let env: Vec<_> = self.env.iter().map(|(key, value)| (*key, value.as_str())).collect();
        let settings = settings(&env);
        Backends::open(&self.database.postgres(&settings), &settings).await.unwrap()
    }

    pub async fn sql(&self, sql: &str) {
        common::run(&self.client, sql).await;
    }

    /// Runs statements over the table of vectors, which they call `{vectors}`.
    pub async fn on_vectors(&self, sql: &str) {
        let generation: i32 =
            self.client.query_one("SELECT id FROM refarch.target", &[]).await.unwrap().get(0);
        self.sql(&sql.replace("{vectors}", &format!("refarch.vector_{generation}"))).await;
    }

    /// Removes a record.
    pub async fn remove(&self, id: &str) {
        match &self.double {
            None => self.on_vectors(&format!("DELETE FROM {{vectors}} WHERE id = '{id}'")).await,
            Some(double) => send(double, "delete", json!({ "ids": [id] })).await,
        }
    }

    /// Makes a record one of another text.
    pub async fn spoil_hash(&self, id: &str) {
        match &self.double {
            None => {
                let sql = "UPDATE {vectors} SET content_hash = sha256('another text') WHERE id = ";
                self.on_vectors(&format!("{sql}'{id}'")).await;
            }
            Some(double) => {
                rewrite(double, id, id, |record| {
                    record.metadata["_refarch_content_hash"] = json!("a7".repeat(32));
                })
                .await;
            }
        }
    }

    /// Gives a record another vector of length one, and leaves its hash.
    pub async fn spoil_vector(&self, id: &str) {
        let mut values = vec![0.0; DIMENSIONS];
        values[7] = 1.0;
        match &self.double {
            None => {
                let sql = format!("UPDATE {{vectors}} SET embedding = '{values:?}' WHERE id = '{id}'");
                self.on_vectors(&sql).await;
            }
            Some(double) => rewrite(double, id, id, |record| record.values = values).await,
        }
    }

    /// Makes a record of another id out of one.
    pub async fn copy(&self, id: &str, to: &str) {
        match &self.double {
            None => {
                let sql = format!(
                    "INSERT INTO {{vectors}} SELECT '{to}', embedding, content_hash FROM {{vectors}} WHERE id = '{id}'"
                );
                self.on_vectors(&sql).await;
            }
            Some(double) => rewrite(double, id, to, |_| ()).await,
        }
    }
}

async fn send(double: &PineconeDouble, what: &str, body: Value) {
    let url = format!("{}/vectors/{what}", double.url());
    let request = reqwest::Client::new().post(url).header("Api-Key", "x").json(&body);
    assert!(request.send().await.unwrap().status().is_success(), "{what}: {body}");
}

/// Writes a record as the change leaves it, under the same id or another.
pub async fn rewrite(double: &PineconeDouble, id: &str, to: &str, change: impl FnOnce(&mut Record)) {
    let mut record = double.snapshot("")[id].clone();
    change(&mut record);
    let record = json!({ "id": to, "values": record.values, "metadata": record.metadata });
    send(double, "upsert", json!({ "vectors": [record] })).await;
}

impl Verified {
    pub fn count(&self, key: &str) -> u64 {
        self.report[key].as_u64().unwrap_or_else(|| panic!("no count {key}: {self:?}"))
    }

    /// The counts that are not zero, but for those of what was compared.
    pub fn found(&self) -> Vec<(String, u64)> {
        let counts = self.report.as_object().unwrap().iter();
        counts
            .filter(|(key, _)| !matches!(key.as_str(), "rows" | "indexed" | "sampled"))
            .filter_map(|(key, value)| Some((key.clone(), value.as_u64().filter(|count| *count > 0)?)))
            .collect()
    }

    #[track_caller]
    pub fn assert(&self, code: i32, found: &[(&str, u64)]) {
        let expected: BTreeSet<(String, u64)> =
            found.iter().map(|(key, count)| ((*key).to_owned(), *count)).collect();
        assert_eq!((self.code, self.found().into_iter().collect()), (Some(code), expected), "{self:?}");
    }

    /// The only fault of capture.
    pub fn fault(&self) -> &str {
        match self.report["capture_faults"].as_array().map(Vec::as_slice) {
            Some([Value::String(fault)]) => fault,
            _ => panic!("not one fault: {self:?}"),
        }
    }

    pub fn examples(&self) -> BTreeSet<(&str, &str)> {
        let examples = self.report["examples"].as_array().unwrap().iter();
        examples.map(|one| (one["id"].as_str().unwrap(), one["kind"].as_str().unwrap())).collect()
    }
}
