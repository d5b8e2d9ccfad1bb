//! Nearness to the real Pinecone: its own client, its published description, and what is its own.

mod late;
mod ownership;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use refarch::backend::pinecone::{self, Pinecone, control};
use refarch::double::pinecone::{PineconeDouble, PineconeFaults};
use refarch::pipeline::failure::Class;
use refarch::pipeline::index::{ExternalWrite, Record, VectorIndex};
use refarch::pipeline::source_row::{Hash, SourceRow};
use refarch::secret::Secret;
use serde_json::{Map, Value, json};

use crate::common::python::python;
use crate::common::{Database, eventually};

const TIMEOUT: Duration = Duration::from_secs(30);

fn options(url: &str) -> pinecone::PineconeOptions {
    pinecone::PineconeOptions {
        host: url.into(),
        api_key: Secret::new("test"),
        namespace: String::new(),
        timeout: TIMEOUT,
        dimensions: 3,
        text: vec!["description".into()],
        metadata: Vec::new(),
    }
}

fn control_options(url: &str, name: &str, dimensions: usize) -> control::ControlPlaneOptions {
    control::ControlPlaneOptions {
        controller: url.into(),
        api_key: Secret::new("test"),
        name: name.into(),
        dimensions,
        cloud: "aws".into(),
        region: "us-east-1".into(),
    }
}

fn record(id: &str, values: &[f32], metadata: &Value) -> Record {
    Record {
        embedding: values.into(),
        row: SourceRow {
            id: id.into(),
            text: "text".into(),
            metadata: metadata.to_string().into(),
            content_hash: Hash([1; 32]),
            metadata_hash: Hash([2; 32]),
        },
        version: 7,
    }
}

fn records() -> Vec<Record> {
    vec![
        record("a", &[1.0, 0.0, 0.0], &json!({ "id": 1, "name": "quote \" and ünïcode", "price": 3.5 })),
        record("b", &[0.6, 0.8, 0.0], &json!({ "id": 2, "tags": ["x", "y"], "sold": true, "price": 7 })),
        record("c/d e", &[0.0, 0.0, 1.0], &json!({ "id": 3, "description": "" })),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vendors_client_and_this_client_read_each_others_records() {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    assert!(control::ensure(&control_options(&double.url(), "by-refarch", 3)).await.unwrap());
    let index = Pinecone::new(options(&double.url())).unwrap();
    index.upsert(&records()).await.unwrap();
    let expected: BTreeMap<String, Value> = double
        .snapshot("")
        .into_iter()
        .map(|(id, record)| (id, json!({ "values": record.values, "metadata": record.metadata })))
        .collect();
    assert_eq!(expected["a"]["metadata"]["_refarch_version"], 7);

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/drive_pinecone.py");
    let expected = serde_json::to_string(&expected).unwrap();
    let output = tokio::process::Command::new(python())
        .arg(script)
        .arg(double.url())
        .arg(expected)
        .output()
        .await
        .unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    println!("{said}");
    assert!(output.status.success() && said.contains("all as expected"), "{said}");

    let theirs =
        Pinecone::new(pinecone::PineconeOptions { namespace: "python".into(), ..options(&double.url()) })
            .unwrap();
    assert_eq!(theirs.count().await.unwrap(), 239);
    let mut listed = BTreeSet::new();
    let mut cursor = None;
    loop {
        let page = theirs.list(cursor.as_deref(), 100).await.unwrap();
        listed.extend(page.ids);
        cursor = page.next;
        if cursor.is_none() {
            break;
        }
    }
    let wanted: BTreeSet<String> = (0..240).filter(|n| *n != 2).map(|n| format!("p{n}")).collect();
    assert_eq!(listed, wanted);
    let fetched = theirs.fetch(&["p1".to_owned(), "p2".to_owned()]).await.unwrap();
    assert_eq!(fetched.len(), 1);
    assert_eq!((&*fetched[0].embedding, fetched[0].content_hash), (&[1.0, 0.1, 0.5][..], None));
    assert_eq!(theirs.query(&[1.0, 0.0, 0.5], 1).await.unwrap()[0].id, "p0");
    // The other namespaces are unchanged.
    assert_eq!(index.count().await.unwrap(), 3);
}

/// A request and its answer, as they went over the wire.
#[derive(Clone, Debug)]
struct Exchange {
    operation: String,
    query: Vec<(String, String)>,
    headers: BTreeSet<String>,
    request: Value,
    status: u16,
    response: Value,
}

/// A proxy that forwards and records every request.
struct RecordingProxy {
    url: String,
    exchanges: Arc<Mutex<Vec<Exchange>>>,
}

type ProxyState = (String, reqwest::Client, Arc<Mutex<Vec<Exchange>>>);

async fn forward(State((to, client, kept)): State<ProxyState>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let path = parts.uri.path().to_owned();
    let url = format!("{to}{}", parts.uri.path_and_query().unwrap());
    let answer = client.request(parts.method.clone(), url).headers(parts.headers.clone()).body(body.clone());
    let answer = answer.send().await.unwrap();
    let (status, headers) = (answer.status(), answer.headers().clone());
    let answered: Bytes = answer.bytes().await.unwrap();
    let named = if path.starts_with("/indexes/") { "/indexes/{index_name}".to_owned() } else { path };
    let query = reqwest::Url::parse(&format!("http://x/?{}", parts.uri.query().unwrap_or_default())).unwrap();
    kept.lock().unwrap().push(Exchange {
        operation: format!("{} {named}", parts.method),
        query: query.query_pairs().into_owned().collect(),
        headers: parts.headers.keys().map(|name| name.as_str().to_owned()).collect(),
        request: serde_json::from_slice(&body).unwrap_or_default(),
        status: status.as_u16(),
        response: serde_json::from_slice(&answered).unwrap_or_default(),
    });
    let mut response = Response::new(Body::from(answered));
    *response.status_mut() = status;
    for (name, value) in headers.iter().filter(|(name, _)| name.as_str() != "transfer-encoding") {
        response.headers_mut().insert(name, value.clone());
    }
    response
}

impl RecordingProxy {
    async fn on(to: &str) -> Self {
        let exchanges = Arc::default();
        let state: ProxyState = (to.to_owned(), reqwest::Client::new(), Arc::clone(&exchanges));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(forward).with_state(state);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, exchanges }
    }
}

/// How a value differs from its description, if it does.
fn mismatch(value: &Value, described: &Value, at: &str) -> Option<String> {
    let fits = match described["type"].as_str() {
        None => true,
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some(other) => return Some(format!("{at}: no check for {other}")),
    };
    if !fits {
        return Some(format!("{at}: {value} is no {}", described["type"]));
    }
    let fields = described["fields"].as_object();
    for (key, inner) in value.as_object().into_iter().flatten() {
        let known = fields.and_then(|fields| fields.get(key)).or_else(|| described.get("values"));
        match known {
            Some(known) => {
                if let Some(found) = mismatch(inner, known, &format!("{at}.{key}")) {
                    return Some(found);
                }
            }
            None if fields.is_some() => return Some(format!("{at}: there is no field {key}")),
            None => {}
        }
    }
    for required in described["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if value.get(required).is_none() {
            return Some(format!("{at}: {required} is missing"));
        }
    }
    let items = value.as_array().into_iter().flatten();
    items.take(20).find_map(|item| mismatch(item, &described["items"], &format!("{at}[]")))
}

fn check(exchange: &Exchange, description: &Map<String, Value>) {
    let Exchange { operation, query, headers, request, status, response } = exchange;
    let described = description.get(operation).unwrap_or_else(|| panic!("there is no operation {operation}"));
    for header in ["api-key", "x-pinecone-api-version"] {
        assert!(headers.contains(header), "{operation} lacks {header}");
    }
    for (name, value) in query {
        let parameter = &described["query"][name];
        assert!(parameter.is_object(), "{operation} has no parameter {name}");
        if parameter["type"] == "integer" {
            assert!(value.parse::<u64>().is_ok(), "{operation}: {name}={value}");
        }
    }
    for (name, parameter) in described["query"].as_object().into_iter().flatten() {
        let given = query.iter().any(|(key, _)| key == name);
        assert!(given || parameter["required"] != true, "{operation} needs {name}");
    }
    if !request.is_null() {
        assert_eq!(mismatch(request, &described["request"], "request"), None, "{operation}");
    }
    if *status == described["status"] {
        assert_eq!(mismatch(response, &described["response"], "response"), None, "{operation}");
    } else {
        assert!(*status >= 400, "{operation} answered {status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_and_answers_match_the_published_description() {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    let tap = RecordingProxy::on(&double.url()).await;
    control::ensure(&control_options(&tap.url, "shop", 3)).await.unwrap();
    for namespace in ["", "shop"] {
        let index =
            Pinecone::new(pinecone::PineconeOptions { namespace: namespace.into(), ..options(&tap.url) })
                .unwrap();
        index.delete(&["nothing".to_owned()]).await.unwrap();
        index.upsert(&records()).await.unwrap();
        index.query(&[1.0, 0.0, 0.0], 10).await.unwrap();
        index.fetch(&["a".to_owned(), "c/d e".to_owned(), "x".to_owned()]).await.unwrap();
        index.list(None, 2).await.unwrap();
        index.count().await.unwrap();
        index.check_writable().await.unwrap();
        index.ownership_store().unwrap().set_record("note").await.unwrap();
        assert_eq!(index.ownership_store().unwrap().record().await.unwrap().as_deref(), Some("note"));
        index.delete(&["a".to_owned()]).await.unwrap();
    }
    // What only the vendor's client asks, the double answers as described, too.
    let client = reqwest::Client::new();
    for (path, body) in [
        ("/vectors/update", json!({ "id": "b", "setMetadata": { "x": 1 } })),
        ("/vectors/fetch_by_metadata", json!({ "filter": { "id": { "$gt": 1 } } })),
        ("/query", json!({ "topK": 2, "id": "b", "includeValues": true, "includeMetadata": true })),
        ("/vectors/delete", json!({ "deleteAll": true, "namespace": "shop" })),
    ] {
        let request = client.post(format!("{}{path}", tap.url)).header("Api-Key", "test");
        let answer = request.header("X-Pinecone-Api-Version", "2026-04").json(&body).send().await.unwrap();
        assert!(answer.status().is_success(), "{path}: {answer:?}");
    }
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pinecone-2026-04.json");
    let description: Map<String, Value> =
        serde_json::from_str(&std::fs::read_to_string(fixture).unwrap()).unwrap();
    let exchanges = tap.exchanges.lock().unwrap().clone();
    let operations: BTreeSet<&str> = exchanges.iter().map(|exchange| exchange.operation.as_str()).collect();
    println!("{} exchanges of {operations:?}", exchanges.len());
    assert!(operations.len() >= 10);
    for exchange in &exchanges {
        check(exchange, &description);
    }
    // The check itself can fail.
    let mut wrong = exchanges[0].clone();
    wrong.operation = "POST /query".into();
    wrong.request = json!({ "top_k": 3 });
    assert!(mismatch(&wrong.request, &description["POST /query"]["request"], "request").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_created_once_found_by_name_and_refused_if_its_shape_differs() {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    let options = control_options(&double.url(), "shop", 3);
    let error = control::host(&options).await.unwrap_err();
    assert!(error.class() == Class::Fatal && error.message().contains("run refarch migrate"), "{error}");
    assert!(control::ensure(&options).await.unwrap());
    assert!(!control::ensure(&options).await.unwrap(), "it is there");
    assert_eq!(control::host(&options).await.unwrap(), double.url());
    let error = control::host(&control_options(&double.url(), "shop", 384)).await.unwrap_err();
    assert!(
        error.class() == Class::Fatal && error.message().contains("length 3, but the model makes 384"),
        "{error}"
    );
    let dotted = json!({
        "name": "dotted", "dimension": 3, "metric": "dotproduct",
        "spec": { "serverless": { "cloud": "aws", "region": "us-east-1" } },
    });
    let request = reqwest::Client::new().post(format!("{}/indexes", double.url())).header("Api-Key", "test");
    assert_eq!(request.json(&dotted).send().await.unwrap().status(), 201);
    let error = control::ensure(&control_options(&double.url(), "dotted", 3)).await.unwrap_err();
    assert!(error.message().contains("dotproduct"), "{error}");
    let keyless = control::ControlPlaneOptions { api_key: Secret::default(), ..options };
    let error = control::ensure(&keyless).await.unwrap_err();
    assert!(error.class() == Class::Fatal && error.message().contains("PINECONE_API_KEY"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_creates_the_index_and_roles_refuse_other_dimensions() {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    let database = Database::create().await;
    let run = async |args: &[&str]| {
        let mut command = database.refarch();
        command.args(args).env("PINECONE_INDEX", "shop").env("PINECONE_API_KEY", "hidden-key");
        let output = command.env("REFARCH_INDEX_CONTROLLER", double.url()).output().await.unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("hidden-key"), "{said}");
        (output.status.code(), said)
    };
    let (code, said) = run(&["migrate"]).await;
    assert!(code == Some(0) && said.contains("index shop"), "{said}");
    let (code, said) = run(&["migrate"]).await;
    assert!(code == Some(0) && said.contains("nothing to do"), "{said}");
    let (code, said) = run(&["verify"]).await;
    assert_eq!(code, Some(0), "{said}");
    // By its host, another index: three numbers a vector, and the model has 384. An older version did not record
    // where the index was.
    let other = PineconeDouble::start(3, 1).await.unwrap();
    let client = database.client().await;
    client.batch_execute("UPDATE refarch.target SET name = 'vector', host = NULL").await.unwrap();
    let mut command = database.refarch();
    command
        .args(["embed", "--until-idle"])
        .env("PINECONE_INDEX_HOST", other.url())
        .env("PINECONE_API_KEY", "k");
    let output = command.output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("length 3, but the model makes 384"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_counts_as_searchable_once_a_query_can_see_it() {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    let index = Pinecone::new(options(&double.url())).unwrap();
    let visibility = index.freshness().unwrap();
    assert_eq!(visibility.last_written(), 0);
    double.set_delay(Duration::from_millis(400));
    index.upsert(&records()).await.unwrap();
    index.delete(&["b".to_owned()]).await.unwrap();
    assert_eq!(visibility.last_written(), 2);
    let found = async || index.query(&[1.0, 0.0, 0.0], 10).await.unwrap().len();
    if visibility.searchable_up_to().await.unwrap() < 2 {
        assert_ne!(found().await, 2, "queries found what they had not seen");
    }
    eventually("queries to see both", TIMEOUT, async || visibility.searchable_up_to().await.unwrap() == 2)
        .await;
    assert_eq!(found().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_are_retried_and_writes_are_not() {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    let index = Pinecone::new(options(&double.url())).unwrap();
    index.upsert(&records()).await.unwrap();
    double.set_faults(PineconeFaults { unavailable: 0.4, ..PineconeFaults::default() });
    for _ in 0..10 {
        // Four tries, of which four in ten fail.
        if let Err(error) = index.query(&[1.0, 0.0, 0.0], 1).await {
            assert_eq!(error.class(), Class::Retryable);
        }
    }
    let before = double.counts();
    assert!(before.requests > 11, "{before:?}");
    double.set_faults(PineconeFaults { unavailable: 1.0, ..PineconeFaults::default() });
    let error = index.upsert(&records()).await.unwrap_err();
    assert!(error.is_doubtful());
    assert_eq!(
        double.counts().requests,
        before.requests + 1,
        "whether to try again is the protocol's to say"
    );
}
