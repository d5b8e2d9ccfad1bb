//! The contract of the HTTP API in cases that a test of all roles cannot cause at a given moment: an index that does not
//! answer or that orders equal matches differently, a locked row, rows that were deleted after they were indexed.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use refarch::backend::postgres::capture::NewPart;
use refarch::backend::postgres::products::Products;
use refarch::pipeline::embedder::{BatchSize, Embedder, Embedding, Tokens};
use refarch::pipeline::failure::{Error, FailureKind, Result};
use refarch::pipeline::index::{Listing, Match, OwnershipStore, Stored, VectorIndex, Writes};
use refarch::role::serve::{
    AccessControl, App, ClientTimeouts, ConnectionLimits, Health, Limits, SyncStatus, router, serve,
};
use refarch::secret::Secret;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::common::source::settings;
use crate::common::{self, Database};

/// A time limit that no step here reaches, even on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(1);

const TABLE: &str = include_str!("../../src/backend/postgres/schema/products.sql");

/// Gives similar vectors to texts that share words.
struct WordEmbedder;

const DIMENSIONS: usize = 256;

fn embed(text: &str) -> Vec<f32> {
    let mut vector = vec![0.0; DIMENSIONS];
    for word in text.to_lowercase().split_whitespace() {
        let bucket = word.bytes().fold(7_usize, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        vector[bucket % DIMENSIONS] += 1.0;
    }
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    vector.iter().map(|x| x / length).collect()
}

#[async_trait]
impl Embedder for WordEmbedder {
    fn dimensions(&self) -> usize {
        DIMENSIONS
    }

    fn model(&self) -> &'static str {
        "words"
    }

    fn batch_size(&self) -> BatchSize {
        BatchSize::Timed
    }

    async fn tokenize(&self, texts: Vec<Arc<str>>) -> Result<Vec<Tokens>> {
        Ok(texts
            .into_iter()
            .map(|text| Tokens::Text { count: text.split_whitespace().count(), text })
            .collect())
    }

    async fn embed(&self, batch: Vec<Tokens>) -> Result<Vec<Embedding>> {
        batch.iter().map(|tokens| Ok(embed(tokens.text()?).into())).collect()
    }
}

/// An index that compares the query with every vector. Like an approximate index, it may order matches with equal
/// scores in any way. It orders them differently for each number of matches.
#[derive(Default)]
struct FlatIndex {
    vectors: Mutex<Vec<(String, Vec<f32>)>>,
    failing: Mutex<bool>,
    refusing: AtomicBool,
    asked: AtomicU32,
}

#[async_trait]
impl VectorIndex for FlatIndex {
    async fn query(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.refusing.load(Ordering::Relaxed) {
            return Err(Error::new(FailureKind::RefusedData, "search", "scripted: 10.0.0.7 can't read this"));
        }
        if *self.failing.lock().unwrap() {
            return Err(Error::new(
                FailureKind::Unreachable,
                "search",
                "scripted: the index at 10.0.0.7 is away",
            ));
        }
        let score = |vector: &[f32]| embedding.iter().zip(vector).map(|(a, b)| a * b).sum();
        let mut found: Vec<Match> = self
            .vectors
            .lock()
            .unwrap()
            .iter()
            .map(|(id, vector)| Match { id: id.clone(), score: score(vector) })
            .collect();
        let at = top % found.len().max(1);
        found.rotate_left(at);
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        found.truncate(top);
        Ok(found)
    }

    async fn count(&self) -> Result<u64> {
        Ok(self.vectors.lock().unwrap().len() as u64)
    }

    async fn list(&self, _: Option<&str>, _: usize) -> Result<Listing> {
        Ok(Listing::default())
    }

    async fn fetch(&self, _: &[String]) -> Result<Vec<Stored>> {
        Ok(Vec::new())
    }

    fn ownership_store(&self) -> Option<&dyn OwnershipStore> {
        None
    }

    async fn check_writable(&self) -> Result<()> {
        Ok(())
    }

    fn writes(&self) -> Writes<'_> {
        unreachable!("the page never writes to the index")
    }

    async fn maintain(&self, _: u64) -> Result<bool> {
        Ok(false)
    }
}

/// A status whose values a test sets.
#[derive(Default)]
struct ScriptedSyncStatus {
    searchable: Mutex<HashSet<String>>,
    asked: Mutex<u32>,
    faults: Mutex<Vec<String>>,
    new_parts: Mutex<Vec<NewPart>>,
    new_part_timeout_s: AtomicU64,
    migrated: AtomicBool,
    failing: AtomicBool,
}

#[async_trait]
impl SyncStatus for ScriptedSyncStatus {
    async fn status(&self) -> Result<Value> {
        *self.asked.lock().unwrap() += 1;
        Ok(json!({ "source_rows": 3 }))
    }

    async fn is_searchable(&self, id: &str) -> Result<bool> {
        Ok(self.searchable.lock().unwrap().contains(id))
    }

    async fn check_generation(&self) -> Result<()> {
        if self.migrated.load(Ordering::Relaxed) {
            return Err(Error::new(
                FailureKind::WrongShape,
                "look for the index",
                "scripted: it is another one",
            ));
        }
        Ok(())
    }

    async fn health(&self) -> Result<Health> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(Error::new(FailureKind::RefusedCredentials, "compare capture", "scripted: 10.0.0.7"));
        }
        Ok(Health {
            faults: self.faults.lock().unwrap().clone(),
            new_parts: self.new_parts.lock().unwrap().clone(),
            new_part_timeout: Duration::from_secs(self.new_part_timeout_s.load(Ordering::Relaxed)),
            proof: "proved 3 h ago: 0 differences".into(),
        })
    }
}

/// Options of a server.
struct ServerOptions<'a> {
    /// The address that the server takes for its own. The tests always connect to it on loopback.
    address: &'a str,
    token: &'a str,
    hosts: &'a [&'a str],
    limits: Limits,
    connection_limits: ConnectionLimits,
}

impl Default for ServerOptions<'_> {
    fn default() -> Self {
        Self {
            address: "127.0.0.1:3000",
            token: "",
            hosts: &[],
            limits: Limits::new(12),
            connection_limits: ConnectionLimits::new(0, 0),
        }
    }
}

/// A server on a free port, with a database that only this test uses.
struct Server {
    url: String,
    address: SocketAddr,
    database: Database,
    sql: Client,
    index: Arc<FlatIndex>,
    sync_status: Arc<ScriptedSyncStatus>,
    http: reqwest::Client,
    stop: CancellationToken,
    serving: JoinHandle<()>,
}

impl Server {
    /// A server on loopback.
    async fn start() -> Self {
        Self::start_as("127.0.0.1:3000", "").await
    }

    async fn start_as(address: &str, token: &str) -> Self {
        Self::make(ServerOptions { address, token, ..ServerOptions::default() }).await
    }

    async fn make(made: ServerOptions<'_>) -> Self {
        let database = Database::create().await;
        let sql = database.client().await;
        sql.batch_execute(TABLE).await.unwrap();
        let postgres = database.postgres(&settings(&[]));
        let products = Products::new(postgres.pool, "public.products_with_increment");
        let index = Arc::new(FlatIndex::default());
        let sync_status = Arc::new(ScriptedSyncStatus::default());
        let app = App::new(
            products,
            Arc::new(WordEmbedder),
            Arc::clone(&index) as _,
            Arc::clone(&sync_status) as _,
            10,
            made.limits,
        );
        let hosts: Vec<String> = made.hosts.iter().map(|host| (*host).to_owned()).collect();
        let access =
            AccessControl::new(made.address.parse().unwrap(), Secret::new(made.token)).with_hosts(&hosts);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve(
            listener,
            router(Arc::new(app), access),
            made.connection_limits,
            stop.clone(),
        ));
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let url = format!("http://{address}");
        Self { url, address, database, sql, index, sync_status, http, stop, serving }
    }

    /// Opens a connection, and sends these bytes.
    async fn socket(&self, bytes: &str) -> TcpStream {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        socket.write_all(bytes.as_bytes()).await.unwrap();
        socket
    }

    /// Adds a row and its vector.
    async fn add(&self, name: &str, sku: &str, description: &str) -> i64 {
        let row = self
            .sql
            .query_one(
                "INSERT INTO products_with_increment (name, sku, description, price, last_updated) \
                 VALUES ($1, $2, $3, '$344.87', '2023-09-20') RETURNING id",
                &[&name, &sku, &description],
            )
            .await
            .unwrap();
        let id: i64 = row.get(0);
        self.index.vectors.lock().unwrap().push((id.to_string(), embed(description)));
        id
    }

    /// Adds many rows. Each is less similar to "lamp" than the row before.
    async fn add_lamps(&self, count: usize) -> Vec<i64> {
        let mut ids = Vec::new();
        for number in 0..count {
            // Rows come in pairs with equal texts.
            let others: Vec<String> = (0..number / 2).map(|other| format!("w{other}")).collect();
            ids.push(
                self.add(
                    &format!("Lamp {number}"),
                    &format!("L-{number}"),
                    &format!("lamp {}", others.join(" ")),
                )
                .await,
            );
        }
        ids
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    async fn get(&self, path: &str) -> Value {
        let answer = self.request(Method::GET, path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        answer.json().await.unwrap()
    }

    /// Edits a row, with its present revision.
    async fn patch(&self, id: i64, body: &Value) -> (StatusCode, Value) {
        let revision = self.get(&format!("/api/v1/products/{id}")).await["revision"].clone();
        let tag = format!("\"{}\"", revision.as_str().unwrap());
        answer(
            self.request(Method::PATCH, &format!("/api/v1/products/{id}")).header("if-match", tag).json(body),
        )
        .await
    }

    async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        answer(self.request(Method::POST, path).json(body)).await
    }
}

async fn answer(request: RequestBuilder) -> (StatusCode, Value) {
    let response = request.send().await.unwrap();
    (response.status(), response.json().await.unwrap())
}

/// Checks that a request is refused in the API's form. Returns code and message.
async fn refusal(request: RequestBuilder, status: u16) -> (String, String) {
    let response = request.send().await.unwrap();
    let got = response.status().as_u16();
    let body: Value = response.json().await.expect("a refusal is JSON");
    assert_eq!(got, status, "{body}");
    let text = |key: &str| body["error"][key].as_str().expect("code and message are text").to_owned();
    (text("code"), text("message"))
}

fn ids(page: &Value) -> Vec<i64> {
    let rows = page["rows"].as_array().or(page.as_array()).expect("a list of rows");
    rows.iter().map(|row| row["id"].as_i64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_is_listed_page_by_page() {
    let server = Server::start().await;
    assert_eq!(
        server.get("/api/v1/products").await,
        json!({ "page": 1, "per_page": 10, "pages": 1, "total": 0, "total_estimated": false, "approximate": false, "previous": null, "next": null, "rows": [] })
    );
    let mut added = Vec::new();
    for number in 0..23 {
        added.push(server.add(&format!("Lamp {number}"), &format!("L-{number}"), "A lamp").await);
    }
    server.sql.execute("UPDATE products_with_increment SET name = NULL, sku = NULL, description = NULL, price = NULL, last_updated = NULL WHERE id = $1", &[&added[0]]).await.unwrap();

    let first = server.get("/api/v1/products").await;
    assert_eq!(first["total"], 23);
    assert_eq!(ids(&first), added[..10]);
    for column in ["name", "sku", "description", "price", "last_updated"] {
        assert_eq!(first["rows"][0][column], Value::Null, "{column}");
    }
    let second = &first["rows"][1];
    assert_eq!(second["price"], "$344.87");
    assert_eq!(second["last_updated"], "2023-09-20");
    assert!(second["revision"].is_string());

    assert_eq!(ids(&server.get("/api/v1/products?page=3").await), added[20..]);
    assert_eq!(ids(&server.get("/api/v1/products?page=2&per_page=20").await), added[20..]);
    assert_eq!(first["pages"], 3);
    assert!(ids(&server.get("/api/v1/products?page=1000").await).is_empty());
    for wrong in [
        "page=-1",
        "page=0",
        "page=two",
        "page=",
        "page=1.5",
        "page=99999999999999999999",
        "per_page=0",
        "per_page=101",
        "page=1&page=2",
    ] {
        for path in ["products", "search"] {
            let request = server.request(Method::GET, &format!("/api/v1/{path}?q=lamp&{wrong}"));
            let (code, message) = refusal(request, 400).await;
            assert_eq!(code, "bad_request");
            assert!(message.contains("whole number") || message.contains("duplicate"), "{message}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_a_large_table_neither_counts_nor_reads_the_whole_table() {
    let server = Server::start().await;
    server
        .sql
        .batch_execute("INSERT INTO products_with_increment (name) SELECT 'Lamp' FROM generate_series(1, 210000); ANALYZE products_with_increment")
        .await
        .unwrap();
    let page = async |query: &str| server.get(&format!("/api/v1/products?{query}")).await;
    let counted_off = page("page=1000").await;
    assert_eq!(counted_off["total_estimated"], true);
    let pages = counted_off["pages"].as_i64().unwrap();
    assert!((20_000..22_000).contains(&pages), "{pages}");
    assert_eq!((ids(&counted_off), &counted_off["approximate"]), ((9_991..=10_000).collect(), &json!(false)));
    // The place of a page far from the start is estimated. The pages before and after it join it exactly.
    let middle = page("page=10501").await;
    assert_eq!((&middle["approximate"], &middle["page"]), (&json!(true), &json!(10501)));
    let found = ids(&middle);
    assert_eq!(found, (found[0]..found[0] + 10).collect::<Vec<_>>());
    assert!((100_000..110_000).contains(&found[0]), "{}", found[0]);
    let next = page(&format!("after={}", middle["next"])).await;
    assert_eq!(
        (ids(&next)[0], &next["approximate"], &next["page"]),
        (found[9] + 1, &json!(false), &Value::Null)
    );
    assert_eq!(ids(&page(&format!("before={}", next["previous"])).await), found);
    // The last page ends with the last row.
    let last = page(&format!("page={pages}")).await;
    assert_eq!((*ids(&last).last().unwrap(), &last["next"]), (210_000, &Value::Null));
    let (before, first) = (page(&format!("before={}", last["previous"])).await, ids(&last)[0]);
    assert_eq!(ids(&before), (first - 10..first).collect::<Vec<_>>());
    for beyond in ["page=1000000000", "page=2400&per_page=100", "after=210000"] {
        let empty = page(beyond).await;
        assert_eq!(
            (ids(&empty), &empty["next"], &empty["previous"]),
            (vec![], &Value::Null, &json!(210_001)),
            "{beyond}"
        );
    }
    // The estimated number of pages may be too low. A page number a little beyond it gives the last page.
    assert_eq!(ids(&page("page=21500").await), (209_991..=210_000).collect::<Vec<_>>());
    // The reference architecture's call reaches the same rows.
    for (page, ids) in [(1_001, Some(10)), (pages, Some(1)), (1_000_000_000, None)] {
        let (status, rows) =
            server.post("/api/products", &json!({ "searchTerm": "", "currentPage": page })).await;
        assert_eq!((status, rows.as_array().unwrap().is_empty()), (StatusCode::OK, ids.is_none()), "{page}");
    }
    // Without statistics, the estimate assumes that ids are spread evenly.
    server
        .sql
        .batch_execute("DELETE FROM pg_statistic WHERE starelid = 'products_with_increment'::regclass")
        .await
        .unwrap();
    let found = ids(&page("page=10501").await);
    assert!((100_000..110_000).contains(&found[0]), "{}", found[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_by_cursor_neither_skip_nor_repeat_while_rows_are_deleted() {
    let server = Server::start().await;
    let sql = "INSERT INTO products_with_increment (name) SELECT 'Lamp' FROM generate_series(1, 100)";
    server.sql.batch_execute(sql).await.unwrap();
    let mut gone: HashSet<i64> = HashSet::new();
    let mut seen: Vec<i64> = Vec::new();
    let mut found = server.get("/api/v1/products?per_page=7").await;
    assert_eq!(found["previous"], Value::Null);
    loop {
        seen.extend(ids(&found));
        let Some(next) = found["next"].as_i64() else { break };
        // Deletes rows that were shown, among them the cursor's row, and the row after them.
        let deleted: Vec<i64> = [next - 3, next, next + 1].into();
        gone.insert(next + 1);
        server
            .sql
            .execute("DELETE FROM products_with_increment WHERE id = ANY ($1::bigint[])", &[&deleted])
            .await
            .unwrap();
        found = server.get(&format!("/api/v1/products?per_page=7&after={next}")).await;
        assert!(found["previous"].is_i64() && found["pages"].is_i64(), "{found}");
    }
    assert_eq!(seen, (1..=100).filter(|id| !gone.contains(id)).collect::<Vec<_>>());
    // The same pages, backwards.
    let there = ids(&server.get("/api/v1/products?per_page=100").await);
    let mut back = ids(&found);
    let mut previous = found["previous"].as_i64();
    while let Some(id) = previous {
        let found = server.get(&format!("/api/v1/products?per_page=7&before={id}")).await;
        back.splice(0..0, ids(&found));
        previous = found["previous"].as_i64();
    }
    assert_eq!(back, there);
    // A page whose rows were all deleted still has a previous page.
    server.sql.batch_execute("DELETE FROM products_with_increment WHERE id > 50").await.unwrap();
    let empty = server.get("/api/v1/products?after=70").await;
    let previous = empty["previous"].as_i64().unwrap();
    assert_eq!((ids(&empty), &empty["next"]), (vec![], &Value::Null));
    assert_eq!(
        ids(&server.get(&format!("/api/v1/products?before={previous}")).await).last(),
        there.iter().rfind(|id| **id <= 50)
    );
    for wrong in ["after=x", "before=1.5", "after=1&before=9", "page=1&after=9", "after=9223372036854775808"]
    {
        let (code, message) =
            refusal(server.request(Method::GET, &format!("/api/v1/products?{wrong}")), 400).await;
        assert_eq!(code, "bad_request", "{message}");
    }
    let (code, _) = refusal(server.request(Method::GET, "/api/v1/search?q=lamp&after=1"), 400).await;
    assert_eq!(code, "bad_request");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_has_the_same_json_under_any_database_settings() {
    let server = Server::start().await;
    let settings = format!(
        "ALTER DATABASE {name} SET datestyle = 'German'; ALTER DATABASE {name} SET lock_timeout = '1ms'; \
         ALTER DATABASE {name} SET search_path = ''",
        name = server.database.name()
    );
    let id = server.add("Lamp", "L-1", "A lamp").await;
    server.sql.batch_execute(&settings).await.unwrap();
    // The first read of a row prepares its statement, which waits for this lock.
    let mut other = server.database.client().await;
    let lock = other.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE public.products_with_increment IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let path = format!("/api/v1/products/{id}");
    let waits = async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                       AND wait_event_type = 'Lock' AND clock_timestamp() - query_start > '20 ms'";
        while server.sql.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 0 {
            tokio::task::yield_now().await;
        }
        lock.rollback().await.unwrap();
    };
    let read = server.get(&path);
    tokio::pin!(read, waits);
    let row = tokio::select! {
        row = &mut read => row,
        () = &mut waits => read.await,
    };
    assert_eq!(row["last_updated"], "2023-09-20");
    assert_eq!(ids(&server.get("/api/v1/search?q=lamp").await), [id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_past_the_last_rank_does_not_query_the_index() {
    let server = Server::start().await;
    server.add("Lamp", "L-1", "A lamp").await;
    let found = server.get("/api/v1/search?q=lamp&page=1000000000").await;
    assert_eq!((ids(&found), &found["has_next"]), (Vec::new(), &json!(false)));
    assert_eq!(server.index.asked.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_skus_and_names_come_before_similar_meanings() {
    let server = Server::start().await;
    let near = server.add("Torch", "T-1", "lamp AB-7").await;
    let named = server.add("ab-7", "X-1", "something else").await;
    let by_sku = server.add("Kettle", "Ab-7", "boils water").await;
    let found = server.get("/api/v1/search?q=%20AB-7%20").await;
    assert_eq!(ids(&found)[..3], [by_sku, named, near]);
    let kinds: Vec<&Value> = found["rows"].as_array().unwrap().iter().map(|row| &row["match"]).collect();
    assert_eq!(kinds, ["sku", "name", "semantic"]);
    assert!(found["rows"][2]["score"].as_f64().unwrap() > 0.5);
    assert!(found["took_ms"].is_number());
    assert_eq!(found["has_next"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_agree_across_pages_and_go_past_a_hundred() {
    let server = Server::start().await;
    let added = server.add_lamps(150).await;
    server
        .sql
        .execute("DELETE FROM products_with_increment WHERE id = ANY ($1)", &[&&added[20..25]])
        .await
        .unwrap();
    let mut seen = Vec::new();
    let mut scores = Vec::new();
    for page in 1.. {
        let found = server.get(&format!("/api/v1/search?q=lamp&page={page}")).await;
        let here = ids(&found);
        let more = found["has_next"].as_bool().unwrap();
        assert!(here.len() == 10 || !more, "page {page} has {} rows, and more follow", here.len());
        scores.extend(found["rows"].as_array().unwrap().iter().map(|row| row["score"].as_f64().unwrap()));
        seen.extend(here);
        if !more {
            break;
        }
    }
    assert!(scores.is_sorted_by(|a, b| a >= b));
    let mut left = added.clone();
    left.drain(20..25);
    assert_eq!(seen.iter().collect::<HashSet<_>>().len(), seen.len(), "a row stands on two pages");
    seen.sort_unstable();
    assert_eq!(seen, left);
    assert!(ids(&server.get("/api/v1/search?q=lamp&page=500").await).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_needs_a_text_of_a_bounded_length() {
    let server = Server::start().await;
    for path in ["/api/v1/search", "/api/v1/search?q=", "/api/v1/search?q=%20%09"] {
        assert!(refusal(server.request(Method::GET, path), 400).await.1.contains("empty"), "{path}");
    }
    let long = "x".repeat(2001);
    let (_, message) = refusal(server.request(Method::GET, &format!("/api/v1/search?q={long}")), 400).await;
    assert!(message.contains("2001") && message.contains("2000"), "{message}");
    // A term that PostgreSQL cannot store gives no results, not an error.
    assert!(ids(&server.get("/api/v1/search?q=a%00b").await).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_is_added_changed_and_deleted() {
    let server = Server::start().await;
    let request =
        server.request(Method::POST, "/api/v1/products").json(&json!({ "name": "Lamp", "price": "1,234.5" }));
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let created: Value = response.json().await.unwrap();
    assert_eq!(created["price"], "$1,234.50");
    assert_eq!(created["sku"], Value::Null);
    let id = created["id"].as_i64().unwrap();

    let response = server.request(Method::GET, &location).send().await.unwrap();
    assert_eq!(
        response.headers()["etag"].to_str().unwrap(),
        format!("\"{}\"", created["revision"].as_str().unwrap())
    );
    assert_eq!(response.json::<Value>().await.unwrap()["searchable"], false);
    server.sync_status.searchable.lock().unwrap().insert(id.to_string());
    assert_eq!(server.get(&location).await["searchable"], true);

    let (status, changed) =
        server.patch(id, &json!({ "description": "Lights up \u{1F4A1}", "name": null, "sku": "" })).await;
    assert_eq!(status, StatusCode::OK);
    let today: String = server.sql.query_one("SELECT current_date::text", &[]).await.unwrap().get(0);
    assert_eq!(changed["last_updated"], today);
    assert_eq!(changed["description"], "Lights up \u{1F4A1}");
    assert_eq!(changed["name"], Value::Null);
    assert_eq!(changed["sku"], "");
    assert_eq!(changed["price"], "$1,234.50");
    assert_ne!(changed["revision"], created["revision"]);

    let tag = format!("\"{}\"", changed["revision"].as_str().unwrap());
    let deletion = || server.request(Method::DELETE, &location).header("if-match", &tag);
    assert_eq!(deletion().send().await.unwrap().status(), StatusCode::NO_CONTENT);
    refusal(deletion(), 404).await;
    refusal(server.request(Method::GET, &location), 404).await;
    refusal(
        server.request(Method::PATCH, &location).header("if-match", &tag).json(&json!({ "name": "x" })),
        404,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_never_overwrites_a_revision_it_has_not_seen() {
    let server = Server::start().await;
    let id = server.add("Lamp", "L-1", "A lamp").await;
    let path = format!("/api/v1/products/{id}");
    let revision = server.get(&path).await["revision"].as_str().unwrap().to_owned();

    let edit = json!({ "description": "mine" });
    let (code, _) = refusal(server.request(Method::PATCH, &path).json(&edit), 428).await;
    assert_eq!(code, "revision_required");
    refusal(server.request(Method::DELETE, &path), 428).await;
    for wrong in ["*", "\"\"", "\"x\"", "W/\"1\""] {
        let response =
            server.request(Method::PATCH, &path).header("if-match", wrong).json(&edit).send().await.unwrap();
        assert!([400, 412, 428].contains(&response.status().as_u16()), "{wrong}: {}", response.status());
    }

    server
        .sql
        .execute("UPDATE products_with_increment SET description = 'theirs' WHERE id = $1", &[&id])
        .await
        .unwrap();
    for method in [Method::PATCH, Method::DELETE] {
        let request = server.request(method, &path).header("if-match", format!("\"{revision}\"")).json(&edit);
        let (status, body) = answer(request).await;
        assert_eq!(status, StatusCode::PRECONDITION_FAILED);
        assert_eq!(body["current"]["description"], "theirs");
        assert!(body["error"]["message"].is_string());
    }
    assert_eq!(server.get(&path).await["description"], "theirs");

    // Of many edits at once with the same revision, one succeeds.
    let revision = server.get(&path).await["revision"].as_str().unwrap().to_owned();
    let edits = (0..8).map(|number| {
        let request = server.request(Method::PATCH, &path).header("if-match", format!("\"{revision}\""));
        async move { answer(request.json(&json!({ "description": number.to_string() }))).await.0.as_u16() }
    });
    let mut answers = futures::future::join_all(edits).await;
    answers.sort_unstable();
    assert_eq!(answers, [200, 412, 412, 412, 412, 412, 412, 412]);
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_the_table_cannot_hold_are_refused_with_a_reason() {
    let server = Server::start().await;
    let id = server.add("Lamp", "L-1", "A lamp").await;
    server.add("Other", "L-2", "Another lamp").await;
    server.sql.batch_execute("CREATE UNIQUE INDEX ON products_with_increment (sku)").await.unwrap();
    let before = server.get(&format!("/api/v1/products/{id}")).await;
    for (edit, reason) in [
        (json!({ "price": "cheap" }), "cheap"),
        (json!({ "price": "99999999999999999999" }), "range"),
        (json!({ "name": "x".repeat(256) }), "255"),
        (json!({ "description": "a\0b" }), "NUL"),
        (json!({ "sku": "a\0b" }), "NUL"),
        (json!({ "price": "\0" }), "NUL"),
        (json!({ "id": 7 }), "id"),
        (json!({ "name": 7 }), "name"),
        (json!(["name"]), ""),
        (json!({}), "name"),
    ] {
        let (status, body) = server.patch(id, &edit).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{edit}: {body}");
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains(reason), "{message}");
        assert!(!message.contains("db error"), "{message}");
    }
    let (status, body) = server.patch(id, &json!({ "sku": "L-2" })).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(body["error"]["message"].as_str().unwrap().contains("L-2"), "{body}");
    assert_eq!(server.get(&format!("/api/v1/products/{id}")).await, before);
    assert_eq!(server.post("/api/v1/products", &json!({})).await.0, StatusCode::BAD_REQUEST);
    for id in ["x", "1.5", "99999999999999999999", "%FF"] {
        refusal(server.request(Method::GET, &format!("/api/v1/products/{id}")), 400).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_description_of_a_megabyte_is_stored_and_returned() {
    let server = Server::start().await;
    let id = server.add("Lamp", "L-1", "A lamp").await;
    let text = "lämp ".repeat(180_000);
    assert!(text.len() > 1024 * 1024);
    let (status, row) = server.patch(id, &json!({ "description": text })).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(row["description"], text);
    assert_eq!(server.get("/api/v1/products").await["rows"][0]["description"], text);
    let (code, message) = refusal(
        server
            .request(Method::POST, "/api/v1/products")
            .json(&json!({ "description": "x".repeat(2 * 1024 * 1024) })),
        413,
    )
    .await;
    assert_eq!(code, "too_large");
    assert!(message.contains("2 MiB"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_has_the_same_form() {
    let server = Server::start().await;
    refusal(server.request(Method::GET, "/nothing"), 404).await;
    refusal(server.request(Method::GET, "/api/v1/nothing"), 404).await;
    refusal(server.request(Method::PUT, "/api/v1/products"), 405).await;
    let post = |body: &'static str, kind: &str| {
        server.request(Method::POST, "/api/v1/products").header("content-type", kind).body(body)
    };
    refusal(post("{", "application/json"), 400).await;
    refusal(post("", "application/json"), 400).await;
    refusal(post("[1,", "application/json; charset=utf-8"), 400).await;
    refusal(post("{\"name\": 1}", "application/json"), 400).await;
    refusal(post("{\"name\": \"x\"}", "text/plain"), 415).await;
    refusal(server.request(Method::POST, "/api/v1/products").body("x"), 415).await;
    let not_text =
        server.request(Method::POST, "/api/v1/products").header("content-type", "application/json");
    refusal(not_text.body(b"{\"name\": \"\xff\"}".to_vec()), 400).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_two_calls_of_the_reference_architecture_are_served() {
    let server = Server::start().await;
    let added = server.add_lamps(120).await;
    let search = async |body: Value| {
        let (status, rows) = server.post("/api/products", &body).await;
        assert_eq!(status, StatusCode::OK, "{rows}");
        rows
    };
    let listed = search(json!({ "searchTerm": "", "currentPage": 1 })).await;
    assert_eq!(ids(&listed), added[..10]);
    let mut columns: Vec<&String> = listed[0].as_object().unwrap().keys().collect();
    columns.sort();
    assert_eq!(columns, ["created_at", "description", "id", "last_updated", "name", "price", "sku", "uuid"]);
    assert_eq!(listed[0]["last_updated"], "2023-09-20T00:00:00.000Z");
    let created = listed[0]["created_at"].as_str().unwrap();
    assert!(created.len() == 24 && created.ends_with('Z'), "{created}");
    assert_eq!(listed[0]["price"], "$344.87");
    assert_eq!(ids(&search(json!({ "searchTerm": "" })).await), added[..10]);
    assert_eq!(ids(&search(json!({ "searchTerm": "", "currentPage": 12 })).await), added[110..]);

    let best = ids(&search(json!({ "searchTerm": "lamp", "currentPage": 1 })).await);
    assert_eq!(best, ids(&server.get("/api/v1/search?q=lamp").await));
    assert_eq!(ids(&search(json!({ "searchTerm": "lamp", "currentPage": 12 })).await).len(), 10);
    assert_eq!(ids(&search(json!({ "searchTerm": "l-77", "currentPage": 1 })).await)[0], added[77]);
    for wrong in [json!({ "searchTerm": 7 }), json!({ "currentPage": "x" }), json!([])] {
        assert_eq!(server.post("/api/products", &wrong).await.0, StatusCode::BAD_REQUEST, "{wrong}");
    }

    let (status, row) =
        server.post("/api/updateDescription", &json!({ "sku": "L-5", "description": "A torch" })).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(row["id"], added[5]);
    assert_eq!(row["description"], "A torch");
    server.add("Lamp 7", "L-7", "a second one").await;
    let update = |sku: &str| {
        let body = json!({ "sku": sku, "description": "changed" });
        server.request(Method::POST, "/api/updateDescription").json(&body)
    };
    assert_eq!(refusal(update("L-7"), 409).await.0, "ambiguous_sku");
    refusal(update("unknown"), 404).await;
    let changed =
        server.sql.query("SELECT FROM products_with_increment WHERE description = 'changed'", &[]).await;
    assert!(changed.unwrap().is_empty());
    assert_eq!(
        server.post("/api/updateDescription", &json!({ "sku": "L-5" })).await.0,
        StatusCode::BAD_REQUEST
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn other_sites_cannot_use_the_api_through_a_browser() {
    let server = Server::start().await;
    let body = json!({ "name": "x" });
    let with = |name: &'static str, value: &str| {
        server.request(Method::POST, "/api/v1/products").json(&body).header(name, value.to_owned())
    };
    refusal(server.request(Method::GET, "/").header("host", "evil.example"), 403).await;
    refusal(with("host", "evil.example:3000"), 403).await;
    refusal(with("origin", "http://evil.example"), 403).await;
    refusal(with("origin", "null"), 403).await;
    refusal(with("sec-fetch-site", "cross-site"), 403).await;
    refusal(with("sec-fetch-site", "same-site"), 403).await;
    for (name, value) in [("origin", server.url.as_str()), ("sec-fetch-site", "same-origin")] {
        assert_eq!(with(name, value).send().await.unwrap().status(), StatusCode::CREATED, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_needs_the_token_when_bound_beyond_loopback() {
    let server = Server::start_as("0.0.0.0:3000", "s3cret").await;
    let id = server.add("Lamp", "L-1", "A lamp").await;
    assert_eq!(server.get("/api/v1/products").await["total"], 1);
    assert_eq!(server.post("/api/products", &json!({ "searchTerm": "" })).await.0, StatusCode::OK);
    let edits = [
        (Method::POST, "/api/v1/products".to_owned()),
        (Method::PATCH, format!("/api/v1/products/{id}")),
        (Method::DELETE, format!("/api/v1/products/{id}")),
        (Method::POST, "/api/updateDescription".to_owned()),
    ];
    let body = json!({ "name": "x" });
    for (method, path) in &edits {
        refusal(server.request(method.clone(), path).json(&body), 401).await;
        refusal(server.request(method.clone(), path).json(&body).bearer_auth("s3cre"), 401).await;
    }
    let allowed = server.request(Method::POST, "/api/v1/products").json(&body).bearer_auth("s3cret");
    assert_eq!(allowed.send().await.unwrap().status(), StatusCode::CREATED);

    let server = Server::start_as("0.0.0.0:3000", "").await;
    for (method, path) in &edits {
        let (_, message) =
            refusal(server.request(method.clone(), path).json(&body).bearer_auth(""), 403).await;
        assert!(message.contains("edit_token"), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_names_the_failed_check_and_no_internals() {
    let server = Server::start().await;
    server.add("Lamp", "L-1", "A lamp").await;
    let status = async |path: &str| server.request(Method::GET, path).send().await.unwrap().status().as_u16();
    assert_eq!(status("/healthz").await, 200);
    assert_eq!(status("/readyz").await, 200);
    let ready = server.request(Method::GET, "/readyz").send().await.unwrap().text().await.unwrap();
    assert_eq!(ready, "ready\nproved 3 h ago: 0 differences\n");

    *server.index.failing.lock().unwrap() = true;
    let not_ready = async || {
        common::eventually("a new look", TIMEOUT, async || status("/readyz").await == 503).await;
        let stranger = server.request(Method::GET, "/readyz").header("x-forwarded-for", "203.0.113.9");
        (answer(server.request(Method::GET, "/readyz")).await.1, answer(stranger).await.1)
    };
    let (near, stranger) = not_ready().await;
    assert_eq!(stranger["reasons"], json!(["index: it does not answer"]));
    assert!(near["reasons"][0].as_str().unwrap().contains("10.0.0.7"), "{near}");
    assert_eq!(near["error"]["code"], "not_ready");
    let (_, message) = refusal(server.request(Method::GET, "/api/v1/search?q=lamp"), 503).await;
    assert!(!message.contains("10.0.0.7"), "{message}");
    *server.index.failing.lock().unwrap() = false;
    common::eventually("a new look", TIMEOUT, async || status("/readyz").await == 200).await;

    *server.sync_status.faults.lock().unwrap() = vec!["public.lamp is not captured".into()];
    server.sync_status.migrated.store(true, Ordering::Relaxed);
    let (near, stranger) = not_ready().await;
    assert_eq!(
        stranger["reasons"],
        json!([
            "schema: it is missing, or was migrated to another index",
            "capture: not every change to the table is captured"
        ])
    );
    assert_eq!(near["reasons"][1], "capture: public.lamp is not captured");
    server.sync_status.faults.lock().unwrap().clear();
    server.sync_status.migrated.store(false, Ordering::Relaxed);
    common::eventually("a new look", TIMEOUT, async || status("/readyz").await == 200).await;

    server.sql.batch_execute("DROP TABLE products_with_increment").await.unwrap();
    assert_eq!(status("/healthz").await, 200);
    let (_, stranger) = not_ready().await;
    assert_eq!(stranger["reasons"], json!(["database: the table cannot be read"]));
    let (_, message) = refusal(server.request(Method::GET, "/api/v1/products"), 500).await;
    assert!(!message.contains("products_with_increment"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_partition_is_a_reason_only_if_it_lasts() {
    let server = Server::start().await;
    let ready = async || {
        let response = server.request(Method::GET, "/readyz").send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let partition = || {
        let fault = "changes of public.lamp_2027 are not captured yet".to_owned();
        vec![NewPart { table: "public.lamp_2027".into(), fault }]
    };
    assert_eq!(ready().await, (200, "ready\nproved 3 h ago: 0 differences\n".to_owned()));
    server.sync_status.new_part_timeout_s.store(3_600, Ordering::Relaxed);
    *server.sync_status.new_parts.lock().unwrap() = partition();
    common::eventually("the partition to be named", TIMEOUT, async || {
        let (status, body) = ready().await;
        assert_eq!(status, 200, "{body}");
        body.ends_with("differences\ncapture: changes of public.lamp_2027 are not captured yet\n")
    })
    .await;
    let stranger = server.request(Method::GET, "/readyz").header("x-forwarded-for", "203.0.113.9");
    let told = stranger.send().await.unwrap().text().await.unwrap();
    assert!(told.ends_with("capture: a new part of the table is not captured yet\n"), "{told}");
    server.sync_status.new_part_timeout_s.store(0, Ordering::Relaxed);
    common::eventually("readiness to refuse", TIMEOUT, async || ready().await.0 == 503).await;
    assert!(ready().await.1.contains("not captured: changes of public.lamp_2027"));
    server.sync_status.new_parts.lock().unwrap().clear();
    common::eventually("readiness", TIMEOUT, async || ready().await.0 == 200).await;

    // What cannot be checked is not shown as checked.
    server.sync_status.failing.store(true, Ordering::Relaxed);
    common::eventually("readiness to refuse", TIMEOUT, async || ready().await.0 == 503).await;
    let stranger = server.request(Method::GET, "/readyz").header("x-forwarded-for", "203.0.113.9");
    let reasons = answer(stranger).await.1["reasons"].clone();
    assert_eq!(reasons, json!(["capture: whether changes are captured cannot be checked"]));

    // A process that has just started does not know how long the partition has been there.
    let server = Server::start().await;
    server.sync_status.new_part_timeout_s.store(3_600, Ordering::Relaxed);
    *server.sync_status.new_parts.lock().unwrap() = partition();
    assert_eq!(server.request(Method::GET, "/readyz").send().await.unwrap().status(), 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_a_locked_row_times_out() {
    let server = Server::start().await;
    let id = server.add("Lamp", "L-1", "A lamp").await;
    let mut other = server.database.client().await;
    let lock = other.transaction().await.unwrap();
    lock.execute("SELECT FROM products_with_increment WHERE id = $1 FOR UPDATE", &[&id]).await.unwrap();
    let started = Instant::now();
    let (status, body) = server.patch(id, &json!({ "name": "x" })).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
    assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());
    lock.rollback().await.unwrap();
    assert_eq!(server.patch(id, &json!({ "name": "x" })).await.0, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_is_read_once_for_many_pages() {
    let server = Server::start().await;
    for _ in 0..20 {
        assert_eq!(server.get("/api/v1/status").await["source_rows"], 3);
    }
    assert!(*server.sync_status.asked.lock().unwrap() < 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_loads_only_its_own_files() {
    let server = Server::start().await;
    let mut pages = String::new();
    for (path, kind) in [
        ("/", "text/html"),
        ("/app.css", "text/css"),
        ("/app.js", "text/javascript"),
        ("/favicon.svg", "image/svg+xml"),
    ] {
        let response = server.request(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        let headers = response.headers().clone();
        assert!(headers["content-type"].to_str().unwrap().starts_with(kind), "{path}");
        assert_eq!(headers["x-content-type-options"], "nosniff");
        assert_eq!(headers["cache-control"], "no-cache");
        let policy = headers["content-security-policy"].to_str().unwrap();
        assert!(policy.contains("default-src") && !policy.contains("unsafe"), "{policy}");
        let again =
            server.request(Method::GET, path).header("if-none-match", &headers["etag"]).send().await.unwrap();
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED, "{path}");
        let body = response.text().await.unwrap();
        if path != "/favicon.svg" {
            pages.push_str(&body);
        }
    }
    assert!(!pages.contains("http://") && !pages.contains("https://"));
    assert!(!pages.contains("innerHTML") && !pages.contains("style=\"") && !pages.contains(" onclick"));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readiness_requests_cause_few_checks() {
    let server = Server::start().await;
    for _ in 0..50 {
        assert_eq!(server.request(Method::GET, "/readyz").send().await.unwrap().status(), 200);
    }
    assert!(server.index.asked.load(Ordering::Relaxed) < 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn error_texts_of_a_backend_are_hidden_from_untrusted_callers() {
    let server = Server::start().await;
    server.index.refusing.store(true, Ordering::Relaxed);
    let search = || server.request(Method::GET, "/api/v1/search?q=lamp");
    let (_, message) = refusal(search(), 400).await;
    assert!(message.contains("10.0.0.7"), "{message}");
    let (_, message) = refusal(search().header("x-forwarded-for", "203.0.113.9"), 400).await;
    assert!(!message.contains("10.0.0.7") && message.contains("log has more"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_without_a_permit_are_told_to_try_again() {
    let limits = Limits { reads: 1, permit_timeout: Duration::from_millis(50), ..Limits::new(12) };
    let server = Server::make(ServerOptions { limits, ..ServerOptions::default() }).await;
    server.add("Lamp", "L-1", "A lamp").await;
    let mut other = server.database.client().await;
    let lock = other.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE products_with_increment IN ACCESS EXCLUSIVE MODE").await.unwrap();
    common::eventually("one to have the place, and another to be told so", TIMEOUT, async || {
        let asks = (0..3).map(|_| server.request(Method::GET, "/api/v1/products").send());
        let mut told = false;
        for response in futures::future::join_all(asks).await {
            let response = response.unwrap();
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(response.headers()["retry-after"], "1");
            told |= response.json::<Value>().await.unwrap()["error"]["code"] == "busy";
        }
        told
    })
    .await;
    // Meanwhile the server answers requests that need no permit.
    assert_eq!(server.get("/api/v1/status").await["source_rows"], 3);
    lock.rollback().await.unwrap();
    server.get("/api/v1/products").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_requests_have_their_own_connections_and_statement_timeout() {
    let database = Database::create().await;
    let settings = settings(&[]);
    let postgres = database.postgres(&settings);
    let mut held = Vec::new();
    for _ in 0..settings.database.pool_size {
        held.push(postgres.client().await.unwrap());
    }
    let requests = postgres.for_requests(4, Duration::from_millis(200)).unwrap();
    let client = requests.client().await.unwrap();
    client.query("SELECT 1", &[]).await.unwrap();
    let error = client.query("SELECT pg_sleep(600)::text", &[]).await.unwrap_err();
    assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::QUERY_CANCELED));
    // The pipeline's own statements take as long as they need.
    held[0].query("SELECT pg_sleep(0.5)::text", &[]).await.unwrap();
}

/// Limits with short timeouts for a client.
fn strict(connections: usize) -> ConnectionLimits {
    let soon = Duration::from_millis(300);
    let timeouts = ClientTimeouts { head: soon, idle: soon, write: soon, answer: TIMEOUT };
    ConnectionLimits { connections, timeouts }
}

/// Reads until the server closes the connection.
async fn rest(socket: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let read = tokio::time::timeout(TIMEOUT, socket.read_to_end(&mut text)).await;
    // A reset also closes the connection, so the result may be an error.
    let _ = read.expect("the server closes the connection");
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_sending_is_disconnected() {
    let server =
        Server::make(ServerOptions { connection_limits: strict(100), ..ServerOptions::default() }).await;
    for half in ["", "GET / HT", "GET / HTTP/1.1\r\nhost: localhost\r\n"] {
        assert_eq!(rest(&mut server.socket(half).await).await, "", "{half:?}");
    }
    let mut idle = server.socket("GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    let answer = rest(&mut idle).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_body_is_waited_for_no_longer_than_the_request_timeout() {
    let limits = Limits { request: Duration::from_millis(300), ..Limits::new(12) };
    let server = Server::make(ServerOptions { limits, ..ServerOptions::default() }).await;
    let head = "POST /api/v1/products HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                content-length: 100\r\n\r\n{";
    let answer = rest(&mut server.socket(head).await).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("slow_body"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_its_answer_is_disconnected() {
    let server =
        Server::make(ServerOptions { connection_limits: strict(100), ..ServerOptions::default() }).await;
    server
        .sql
        .batch_execute("INSERT INTO products_with_increment (description) SELECT repeat('lamp ', 100000) FROM generate_series(1, 100)")
        .await
        .unwrap();
    let request = "GET /api/v1/products?per_page=100 HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut socket = server.socket(request).await;
    // The client reads the first bytes, and then nothing for longer than the server's timeout.
    let mut some = [0; 1000];
    socket.read_exact(&mut some).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(rest(&mut socket).await.len() < 40_000_000);
    // A client that reads gets the whole answer.
    let page = server.get("/api/v1/products?per_page=100").await;
    assert_eq!(page["rows"].as_array().unwrap().len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn unread_answers_use_a_bounded_amount_of_memory() {
    let limits = Limits { answers_kib: 60_000, ..Limits::new(12) };
    let server = Server::make(ServerOptions { limits, ..ServerOptions::default() }).await;
    server
        .sql
        .batch_execute("INSERT INTO products_with_increment (description) SELECT repeat('lamp ', 100000) FROM generate_series(1, 100)")
        .await
        .unwrap();
    let request = "GET /api/v1/products?per_page=100 HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut slow = server.socket(request).await;
    let mut some = [0; 1000];
    slow.read_exact(&mut some).await.unwrap();
    let large = || server.request(Method::GET, "/api/v1/products?per_page=100");
    assert_eq!(refusal(large(), 503).await.0, "busy");
    let (code, message) = refusal(
        server.request(Method::POST, "/api/products").json(&json!({ "searchTerm": "x".repeat(70_000) })),
        413,
    )
    .await;
    assert!(code == "too_large" && message.contains("64 KiB"), "{message}");
    server.get("/api/v1/status").await;
    drop(slow);
    common::eventually("the room to be free again", TIMEOUT, async || {
        large().send().await.unwrap().status() == StatusCode::OK
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_connections_are_taken_the_longest_idle_one_is_closed() {
    let timeouts = ConnectionLimits::new(0, 0).timeouts;
    let server = Server::make(ServerOptions {
        connection_limits: ConnectionLimits { connections: 16, timeouts },
        ..ServerOptions::default()
    })
    .await;
    let mut waiting = Vec::new();
    for _ in 0..40 {
        waiting.push(server.socket("GET / HT").await);
    }
    let mut asks =
        server.socket("GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
    assert!(rest(&mut asks).await.ends_with("ok\n"));
    assert_eq!(rest(&mut waiting[0]).await, "");
    // The newest connection can still send a request.
    let youngest = waiting.last_mut().unwrap();
    let more = "TP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    youngest.write_all(more.as_bytes()).await.unwrap();
    assert!(rest(youngest).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_server_answers_received_requests_and_no_more() {
    let server = Server::start().await;
    let id = server.add("Lamp", "L-1", "A lamp").await;
    let mut other = server.database.client().await;
    let lock = other.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE products_with_increment IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let request = server.request(Method::GET, &format!("/api/v1/products/{id}"));
    let asked = tokio::spawn(async move { request.send().await.unwrap().status().as_u16() });
    let waits =
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'products_with_increment'::regclass";
    common::eventually("the request to wait", TIMEOUT, async || {
        lock.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    let mut half = server.socket("GET / HT").await;
    server.stop.cancel();
    assert_eq!(rest(&mut half).await, "");
    assert!(TcpStream::connect(server.address).await.is_err());
    assert!(!server.serving.is_finished());
    lock.rollback().await.unwrap();
    // The statement of this request may have exceeded its timeout.
    assert!([200, 503].contains(&asked.await.unwrap()));
    tokio::time::timeout(TIMEOUT, server.serving).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_too_large_or_use_another_method_are_refused() {
    let server = Server::start().await;
    let long = "x".repeat(100_000);
    let mut socket = server.socket(&format!("GET /api/v1/search?q={long} HTTP/1.1\r\n\r\n")).await;
    let answer = rest(&mut socket).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    let head = server.request(Method::HEAD, "/api/v1/products").send().await.unwrap();
    assert_eq!(head.status(), StatusCode::OK);
    for (method, path) in
        [(Method::OPTIONS, "/api/v1/products"), (Method::TRACE, "/"), (Method::POST, "/readyz")]
    {
        let response = server.request(method.clone(), path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
        assert!(response.headers().contains_key("allow"), "{method} {path}");
    }
    let mut twice = server
        .socket("GET /healthz HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\nconnection: close\r\n\r\n")
        .await;
    assert!(rest(&mut twice).await.starts_with("HTTP/1.1 400"));
}
