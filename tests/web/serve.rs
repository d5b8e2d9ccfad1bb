//! The HTTP API on a real PostgreSQL and the real model.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use reqwest::{Client, Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::common::{self, Database};

/// A time limit that no step here reaches, even on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A migrated database with every role running on it.
struct Server {
    database: Database,
    client: Client,
    base: String,
    child: Child,
}

impl Server {
    async fn start() -> Self {
        Self::with(&[]).await
    }

    async fn with(env: &[(&str, &str)]) -> Self {
        Self::limited(env, None).await
    }

    /// Like [`Self::with`], with a limit on the number of open files.
    async fn limited(env: &[(&str, &str)], files: Option<u32>) -> Self {
        let database = Database::create().await;
        let migrated = database.refarch().arg("migrate").output().await.unwrap();
        assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
        let bind =
            env.iter().find(|(key, _)| *key == "REFARCH_SERVE_BIND").map_or("127.0.0.1", |(_, host)| *host);
        let port = common::free_port();
        let mut command = database.refarch();
        command.args(["up", "--products", "0", "--workers", "1", "--bind", &format!("{bind}:{port}")]);
        command.envs(env.iter().filter(|(key, _)| *key != "REFARCH_SERVE_BIND").copied());
        if let Some(files) = files {
            command = with_few_files(&command, files);
        }
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        let base = format!("http://127.0.0.1:{port}");
        let client = Client::new();
        let ready = format!("{base}/readyz");
        common::eventually("the server to be ready", TIMEOUT, async || {
            client.get(&ready).send().await.is_ok_and(|response| response.status().is_success())
        })
        .await;
        Self { database, client, base, child }
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        if let Some(body) = body {
            request = request.json(&body);
        }
        answer(request.send().await.unwrap()).await
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::GET, path, None).await
    }

    async fn create(&self, name: &str, sku: &str, description: &str) -> Value {
        let body = json!({ "name": name, "sku": sku, "description": description, "price": "$10" });
        let (status, row) = self.call(Method::POST, "/api/v1/products", Some(body)).await;
        assert_eq!(status, StatusCode::CREATED, "{row}");
        row
    }

    async fn edit(
        &self,
        method: Method,
        row: &Value,
        revision: &str,
        body: Option<Value>,
    ) -> (StatusCode, Value) {
        let mut request = self
            .client
            .request(method, format!("{}/api/v1/products/{}", self.base, row["id"]))
            .header("if-match", format!("\"{revision}\""));
        if let Some(body) = body {
            request = request.json(&body);
        }
        answer(request.send().await.unwrap()).await
    }

    async fn searchable(&self, row: &Value) {
        let path = format!("/api/v1/products/{}", row["id"]);
        common::eventually("the row to be searchable", TIMEOUT, async || {
            self.get(&path).await.1["searchable"] == true
        })
        .await;
    }

    /// Checks that a request is refused. Returns status, code and message.
    async fn refused(&self, method: Method, path: &str, body: Option<Value>) -> (u16, String, String) {
        let (status, body) = self.call(method, path, body).await;
        refusal(status, &body)
    }

    async fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().unwrap() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(self.child.wait().await.unwrap().success());
    }
}

/// The same command, run by a shell that first lowers the limit on open files.
fn with_few_files(command: &Command, files: u32) -> Command {
    let command = command.as_std();
    let mut limited = Command::new("bash");
    limited.arg("-c").arg(format!("ulimit -n {files}; exec \"$0\" \"$@\""));
    limited.arg(command.get_program()).args(command.get_args()).env_clear();
    limited.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    limited.current_dir(command.get_current_dir().unwrap()).kill_on_drop(true);
    limited
}

async fn answer(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

fn refusal(status: StatusCode, body: &Value) -> (u16, String, String) {
    let text = |key: &str| {
        body["error"][key].as_str().unwrap_or_else(|| panic!("no error.{key}: {body}")).to_owned()
    };
    (status.as_u16(), text("code"), text("message"))
}

fn ids(results: &Value) -> Vec<i64> {
    results["rows"].as_array().unwrap().iter().map(|row| row["id"].as_i64().unwrap()).collect()
}

#[tokio::test]
async fn rows_are_listed_created_edited_found_and_deleted() {
    let server = Server::start().await;
    let kettle = server.create("Kettle", "K-1", "An electric kettle for boiling water").await;
    let tent = server.create("Tent", "T-1", "A tent for two hikers").await;
    assert_eq!((&kettle["price"], &kettle["name"]), (&json!("$10.00"), &json!("Kettle")));
    server.searchable(&kettle).await;
    server.searchable(&tent).await;

    let (_, page) = server.get("/api/v1/products?per_page=1&page=2").await;
    assert_eq!(
        (&page["total"], &page["rows"][0]["sku"], &page["page"]),
        (&json!(2), &json!("T-1"), &json!(2))
    );
    let (_, found) = server.get("/api/v1/search?q=hot%20drinks").await;
    assert_eq!(ids(&found)[0], kettle["id"].as_i64().unwrap());
    assert_eq!(found["rows"][0]["match"], "semantic");

    let body = json!({ "description": "A stove that burns wood", "price": null });
    let (status, edited) =
        server.edit(Method::PATCH, &kettle, kettle["revision"].as_str().unwrap(), Some(body)).await;
    assert_eq!((status, &edited["name"], &edited["price"]), (StatusCode::OK, &json!("Kettle"), &Value::Null));
    server.searchable(&edited).await;
    let (_, found) = server.get("/api/v1/search?q=fireplace").await;
    assert_eq!(ids(&found)[0], kettle["id"].as_i64().unwrap());

    let (status, stale) = server
        .edit(Method::PATCH, &kettle, kettle["revision"].as_str().unwrap(), Some(json!({ "name": "x" })))
        .await;
    assert_eq!((status.as_u16(), &stale["current"]), (412, &edited), "the edit is not overwritten");
    let (status, _) = server.edit(Method::DELETE, &kettle, kettle["revision"].as_str().unwrap(), None).await;
    assert_eq!(status.as_u16(), 412);
    let (status, _) = server.edit(Method::DELETE, &kettle, edited["revision"].as_str().unwrap(), None).await;
    assert_eq!(status.as_u16(), 204);
    let (status, _) = server.edit(Method::DELETE, &kettle, edited["revision"].as_str().unwrap(), None).await;
    assert_eq!(status.as_u16(), 404);
    let (_, found) = server.get("/api/v1/search?q=fireplace").await;
    assert_eq!(ids(&found), [tent["id"].as_i64().unwrap()]);
    server.stop().await;
}

#[tokio::test]
async fn exact_skus_then_exact_names_come_first_and_pages_do_not_overlap() {
    let server = Server::start().await;
    let client = server.database.client().await;
    client
        .batch_execute(
            "INSERT INTO products_with_increment (id, name, sku, description) \
               SELECT i, 'Chair ' || i, 'C-' || i, 'An office chair, number ' || i FROM generate_series(1, 130) i; \
             INSERT INTO products_with_increment (id, name, sku, description) VALUES (500, 'zebra', 'OTHER', 'A garden hose'), \
               (501, 'Spade', 'Zebra', 'A tax form')",
        )
        .await
        .unwrap();
    common::eventually("all rows to be searchable", TIMEOUT, async || {
        server.get("/api/v1/status").await.1["in_sync"] == 132
    })
    .await;
    let (_, found) = server.get("/api/v1/search?q=ZEBRA&per_page=5").await;
    assert_eq!(ids(&found)[..2], [501, 500]);
    assert_eq!((&found["rows"][0]["match"], &found["rows"][1]["match"]), (&json!("sku"), &json!("name")));
    let mut seen = Vec::new();
    for page in 1.. {
        let (_, found) =
            server.get(&format!("/api/v1/search?q=office%20chair&per_page=20&page={page}")).await;
        seen.extend(ids(&found));
        if found["has_next"] == false {
            break;
        }
    }
    assert_eq!(seen.len(), 132, "paging goes past the hundredth row");
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 132, "no row is on two pages");
    server.stop().await;
}

#[tokio::test]
async fn clients_of_the_reference_architecture_are_answered() {
    let server = Server::start().await;
    let kettle = server.create("Kettle", "K-1", "An electric kettle for boiling water").await;
    server.create("Twin", "TWIN", "first").await;
    let twin = server.create("Twin", "TWIN", "second").await;
    server.searchable(&kettle).await;
    server.searchable(&twin).await;
    let search = json!({ "searchTerm": "make tea", "currentPage": 1 });
    let (status, rows) = server.call(Method::POST, "/api/products", Some(search)).await;
    assert_eq!(status, StatusCode::OK);
    let columns: Vec<&str> = rows[0].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(columns, ["created_at", "description", "id", "last_updated", "name", "price", "sku", "uuid"]);
    assert_eq!(rows[0]["sku"], "K-1");
    for page in [json!(0), json!(-1), Value::Null] {
        let all = json!({ "searchTerm": "", "currentPage": page });
        let (_, rows) = server.call(Method::POST, "/api/products", Some(all)).await;
        assert_eq!(rows.as_array().unwrap().len(), 3);
    }
    let update = json!({ "sku": "K-1", "description": "A samovar" });
    let (status, row) = server.call(Method::POST, "/api/updateDescription", Some(update)).await;
    assert_eq!((status, &row["description"]), (StatusCode::OK, &json!("A samovar")));
    let update = |sku: &str| Some(json!({ "sku": sku, "description": "both" }));
    let (status, code, message) =
        server.refused(Method::POST, "/api/updateDescription", update("TWIN")).await;
    assert_eq!((status, code.as_str()), (409, "ambiguous_sku"));
    assert!(message.contains("2 rows"), "{message}");
    let (_, page) = server.get("/api/v1/products").await;
    assert!(
        page["rows"].as_array().unwrap().iter().all(|row| row["description"] != "both"),
        "none was changed"
    );
    assert_eq!(server.refused(Method::POST, "/api/updateDescription", update("NO")).await.0, 404);
    server.stop().await;
}

#[tokio::test]
async fn invalid_requests_are_refused_with_a_correction() {
    let server = Server::start().await;
    let row = server.create("Kettle", "K-1", "text").await;
    let long = "x".repeat(2001);
    for (path, said) in [
        ("/api/v1/products?page=-1", "page=-1: use a whole number from 1"),
        ("/api/v1/products?page=0", "page=0"),
        ("/api/v1/products?page=one", "page=one"),
        ("/api/v1/products?page=99999999999999999999", "whole number"),
        ("/api/v1/products?per_page=101", "from 1 to 100"),
        ("/api/v1/products/kettle", "\"kettle\" is not the id of a row"),
        ("/api/v1/search", "q is empty"),
        ("/api/v1/search?q=%20", "q is empty"),
        (&format!("/api/v1/search?q={long}"), "2001 characters"),
    ] {
        let (status, _, message) = server.refused(Method::GET, path, None).await;
        assert_eq!(status, 400, "{path}");
        assert!(message.contains(said), "{path}: {message}");
    }
    assert_eq!(server.refused(Method::GET, "/api/v1/products/99999", None).await.0, 404);
    assert_eq!(server.refused(Method::GET, "/nowhere", None).await.0, 404);
    assert_eq!(server.refused(Method::PUT, "/api/v1/products", None).await.0, 405);

    let post = async |content_type: &str, body: &str| {
        let request = server
            .client
            .post(format!("{}/api/v1/products", server.base))
            .header("content-type", content_type);
        let (status, body) = answer(request.body(body.to_owned()).send().await.unwrap()).await;
        refusal(status, &body)
    };
    assert_eq!(post("text/plain", "{}").await.0, 415);
    for body in [
        "{",
        "[]",
        "{\"name\": 5}",
        "{\"nmae\": \"x\"}",
        "{\"name\": \"a\\u0000b\"}",
        "{\"price\": \"cheap\"}",
    ] {
        let (status, _, message) = post("application/json", body).await;
        assert_eq!(status, 400, "{body}: {message}");
    }
    assert!(post("application/json", "{\"nmae\": \"x\"}").await.2.contains("nmae"));
    assert!(post("application/json", "{\"price\": \"cheap\"}").await.2.contains("cheap"));
    let wide = json!({ "name": "n".repeat(256) }).to_string();
    assert!(post("application/json", &wide).await.2.contains("255"));
    let megabyte = json!({ "name": "big", "description": "words ".repeat(170_000) });
    assert_eq!(server.call(Method::POST, "/api/v1/products", Some(megabyte)).await.0, StatusCode::CREATED);

    let path = format!("/api/v1/products/{}", row["id"]);
    let (status, code, _) = server.refused(Method::PATCH, &path, Some(json!({ "name": "x" }))).await;
    assert_eq!((status, code.as_str()), (428, "revision_required"));
    assert_eq!(server.refused(Method::DELETE, &path, None).await.0, 428);
    server.stop().await;
}

#[tokio::test]
async fn rows_with_null_columns_are_shown_and_search_works() {
    let server = Server::start().await;
    let client = server.database.client().await;
    client.batch_execute("INSERT INTO products_with_increment (id) VALUES (7)").await.unwrap();
    server.searchable(&json!({ "id": 7 })).await;
    let (status, row) = server.get("/api/v1/products/7").await;
    assert_eq!((status, &row["name"], &row["description"]), (StatusCode::OK, &Value::Null, &Value::Null));
    assert_eq!(server.get("/api/v1/search?q=anything").await.1["rows"], json!([]));
    server.stop().await;
}

#[tokio::test]
async fn other_origins_and_other_host_names_are_refused() {
    let server = Server::start().await;
    let request =
        server.client.get(format!("{}/api/v1/products", server.base)).header("host", "evil.example");
    assert_eq!(request.send().await.unwrap().status(), 403);
    let request = server.client.post(format!("{}/api/v1/products", server.base)).json(&json!({}));
    assert_eq!(request.header("origin", "http://evil.example").send().await.unwrap().status(), 403);
    let page = server.client.get(&server.base).send().await.unwrap();
    let header = |name: &str| page.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("content-type"), "text/html; charset=utf-8");
    assert!(header("content-security-policy").starts_with("default-src 'self'"));
    assert_eq!(header("x-content-type-options"), "nosniff");
    let again = server.client.get(&server.base).header("if-none-match", header("etag")).send().await.unwrap();
    assert_eq!(again.status(), 304);
    server.stop().await;
}

#[tokio::test]
async fn edits_need_the_token_when_bound_beyond_loopback() {
    let server =
        Server::with(&[("REFARCH_SERVE_BIND", "0.0.0.0"), ("REFARCH_SERVE_EDIT_TOKEN", "hush")]).await;
    let body = json!({ "name": "x" });
    let (status, code, _) = server.refused(Method::POST, "/api/v1/products", Some(body.clone())).await;
    assert_eq!((status, code.as_str()), (401, "unauthorized"));
    let request =
        server.client.post(format!("{}/api/v1/products", server.base)).bearer_auth("hush").json(&body);
    assert_eq!(request.send().await.unwrap().status(), 201);
    assert_eq!(server.get("/api/v1/products").await.0, StatusCode::OK);
    server.stop().await;
}

#[tokio::test]
async fn a_port_in_use_is_reported_with_the_address() {
    let database = Database::create().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for role in ["serve", "up"] {
        let output = database.refarch().args([role, "--bind", &address]).output().await.unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(error.contains(&address) && error.contains("--bind"), "{error}");
    }
}

#[tokio::test]
async fn status_has_the_documented_keys() {
    let server = Server::start().await;
    let row = server.create("Kettle", "K-1", "text").await;
    server.searchable(&row).await;
    let output = server.database.refarch().args(["status", "--json"]).output().await.unwrap();
    let status: BTreeMap<String, Value> = serde_json::from_slice(&output.stdout).unwrap();
    let keys: Vec<&str> = status.keys().map(String::as_str).collect();
    let documented = [
        "capture_faults",
        "dead_letters",
        "expected",
        "faults",
        "freshness_ms",
        "in_sync",
        "in_sync_estimated",
        "indexed",
        "indexed_error",
        "pending",
        "pending_estimated",
        "proof",
        "queue",
        "scaling",
        "search",
        "source_rows",
        "source_rows_estimated",
        "synced",
        "unsettled",
        "workers",
    ];
    assert_eq!(keys, documented);
    assert_eq!(
        (&status["in_sync"], &status["indexed"], &status["queue"]["live"]["visible"]),
        (&json!(1), &json!(1), &json!(0))
    );
    let roles: Vec<&Value> =
        status["workers"].as_array().unwrap().iter().map(|worker| &worker["role"]).collect();
    assert_eq!(roles, ["embed", "listen", "serve"]);
    assert_eq!(server.get("/healthz").await.0, StatusCode::OK);
    common::eventually("freshness to be sampled", TIMEOUT, async || {
        server.get("/api/v1/status").await.1["freshness_ms"]["p50"].is_u64()
    })
    .await;
    server.stop().await;
}

#[tokio::test]
async fn silent_connections_do_not_keep_other_clients_out() {
    let server = Server::limited(&[], Some(256)).await;
    server.create("Kettle", "K-1", "text").await;
    let address = server.base.strip_prefix("http://").unwrap();
    let mut waiting = Vec::new();
    for _ in 0..300 {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(b"GET / HT").await.unwrap();
        waiting.push(socket);
    }
    // Each request uses a new client, because a client keeps its connection and sends the next request on it.
    for path in ["/healthz", "/api/v1/products", "/"] {
        let client = Client::builder().timeout(TIMEOUT / 2).build().unwrap();
        let answer = client.get(format!("{}{path}", server.base)).send().await;
        assert_eq!(answer.expect("an answer beside 300 that wait").status(), StatusCode::OK, "{path}");
    }
    drop(waiting);
    server.stop().await;
}

#[tokio::test]
async fn behind_a_local_proxy_the_host_must_be_allowed_and_edits_need_the_token() {
    let allowed = ("REFARCH_SERVE_ALLOWED_HOSTS", "shop.example.com");
    let server = Server::with(&[allowed]).await;
    let row = server.create("Kettle", "K-1", "text").await;
    let get = |host: &str| server.client.get(format!("{}/api/v1/products", server.base)).header("host", host);
    assert_eq!(get("shop.example.com").send().await.unwrap().status(), StatusCode::OK);
    let (status, body) = answer(get("evil.example").send().await.unwrap()).await;
    let (_, code, message) = refusal(status, &body);
    assert_eq!((status.as_u16(), code.as_str()), (403, "forbidden_host"));
    assert!(message.contains("evil.example") && message.contains("serve.allowed_hosts"), "{message}");
    let delete = || {
        let tag = format!("\"{}\"", row["revision"].as_str().unwrap());
        server.client.delete(format!("{}/api/v1/products/{}", server.base, row["id"])).header("if-match", tag)
    };
    for header in
        ["x-forwarded-for", "forwarded", "x-real-ip", "via", "x-forwarded-host", "x-forwarded-proto"]
    {
        let (status, body) = answer(delete().header(header, "203.0.113.9").send().await.unwrap()).await;
        let (_, code, message) = refusal(status, &body);
        assert_eq!((status.as_u16(), code.as_str()), (403, "edits_off"), "{header}");
        assert!(message.contains(header) && message.contains("serve.edit_token"), "{message}");
    }
    assert_eq!(delete().header("host", "shop.example.com").send().await.unwrap().status(), 403);
    assert_eq!(delete().send().await.unwrap().status(), 204, "a program on this machine may edit");
    server.stop().await;
}

#[tokio::test]
async fn a_configured_token_is_required_everywhere_and_guesses_are_throttled() {
    let server = Server::with(&[
        ("REFARCH_SERVE_EDIT_TOKEN", "hush"),
        ("REFARCH_SERVE_ALLOWED_HOSTS", "shop.example.com"),
    ])
    .await;
    let body = json!({ "name": "x" });
    let post = || server.client.post(format!("{}/api/v1/products", server.base)).json(&body);
    assert_eq!(post().send().await.unwrap().status(), 401, "on loopback too");
    let proxied = || {
        post()
            .header("host", "shop.example.com")
            .header("origin", "https://shop.example.com")
            .header("x-forwarded-for", "203.0.113.9")
            .header("x-forwarded-proto", "https")
    };
    assert_eq!(proxied().send().await.unwrap().status(), 401);
    assert_eq!(proxied().bearer_auth("hush").send().await.unwrap().status(), 201);
    assert_eq!(post().bearer_auth("hush").send().await.unwrap().status(), 201);

    let guess = async |client: &str, token: &str| {
        let request = post().header("x-forwarded-for", client.to_owned()).bearer_auth(token);
        request.send().await.unwrap()
    };
    let mut answers = Vec::new();
    for number in 0..20 {
        answers.push(guess("198.51.100.7", &number.to_string()).await);
    }
    let last = answers.pop().unwrap();
    assert_eq!(last.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(last.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(guess("198.51.100.7", "hush").await.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(guess("203.0.113.9", "hush").await.status(), StatusCode::CREATED, "others are not kept out");
    server.stop().await;
}

#[tokio::test]
async fn untrusted_callers_see_no_hosts_and_no_processes() {
    let server = Server::with(&[("REFARCH_SERVE_EDIT_TOKEN", "hush")]).await;
    let seen = async |forwarded: bool, token: Option<&str>| {
        let mut request = server.client.get(format!("{}/api/v1/status", server.base));
        if forwarded {
            request = request.header("x-forwarded-for", "203.0.113.9");
        }
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let (status, body) = answer(request.send().await.unwrap()).await;
        assert_eq!(status, StatusCode::OK);
        let workers = body["workers"].as_array().unwrap();
        assert!(workers.len() == 3 && workers.iter().all(|worker| worker["role"].is_string()), "{body}");
        ["worker_id", "host", "pid"].iter().all(|key| workers.iter().all(|worker| !worker[key].is_null()))
    };
    assert!(!seen(true, None).await, "a stranger");
    assert!(!seen(true, Some("guess")).await, "a stranger who guesses");
    assert!(seen(true, Some("hush")).await);
    assert!(seen(false, None).await, "a program on this machine");
    server.stop().await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_server_out_of_file_descriptors_warns_once_and_keeps_answering() {
    let server = Server::start().await;
    let pid = server.child.id().unwrap();
    let limit = async |files: &str| {
        let done =
            Command::new("prlimit").arg(format!("--pid={pid}")).arg(format!("--nofile={files}")).status();
        assert!(done.await.unwrap().success());
    };
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    limit(&format!("{}:", open + 2)).await;
    let address = server.base.strip_prefix("http://").unwrap();
    let mut waiting = Vec::new();
    for _ in 0..10 {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(b"GET / HT").await.unwrap();
        waiting.push(socket);
    }
    let client = Client::builder().timeout(TIMEOUT / 2).build().unwrap();
    let answer = client.get(format!("{}/healthz", server.base)).send().await;
    assert_eq!(answer.expect("an answer beside ten that wait").status(), StatusCode::OK);
    drop(waiting);
    limit("1000:").await;
    server.stop().await;
}
