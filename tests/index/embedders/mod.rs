//! Embedders: the common contract, and servers for each of the protocols.

mod identity;
mod servers;
mod stub;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse as _, Json, Response};
use axum::{Router, routing};
use refarch::backend::LoadedModel;
use refarch::config::EmbedderKind;
use refarch::pipeline::embedder::Embedder;
use refarch::pipeline::failure::{Class, Error};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::common::source::settings;
use crate::common::{self, Database};

/// What the key must be.
const KEY: &str = "right-key";

/// A text that every double refuses.
const POISON: &str = "poison";

static MODEL: OnceCell<Arc<dyn Embedder>> = OnceCell::const_new();

/// The model on this machine, which embeds for the doubles.
async fn real() -> Arc<dyn Embedder> {
    let start = async || LoadedModel::load(&settings(&[])).await.unwrap().start(1);
    Arc::clone(MODEL.get_or_init(start).await)
}

#[derive(Default)]
struct EmbeddingServer {
    /// Statuses to answer with, before it works again.
    failures: Mutex<Vec<u16>>,
    requests: AtomicU32,
    /// Texts in each request, and what they were embedded for.
    seen: Mutex<Vec<(usize, Option<String>)>>,
    /// Vectors of another length than the model's, cut to it.
    length: Mutex<Option<usize>>,
}

impl EmbeddingServer {
    async fn start(self: &Arc<Self>) -> String {
        let router = Router::new()
            .route("/v1/embeddings", routing::post(openai))
            .route("/embed", routing::post(embed))
            .route("/info", routing::get(info))
            .with_state(Arc::clone(self));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    fn fail(&self, statuses: &[u16]) {
        *self.failures.lock().unwrap() = statuses.to_vec();
    }

    /// The error of a request, if it has one.
    fn admit(
        &self,
        headers: &HeaderMap,
        texts: &[String],
        most: usize,
        purpose: Option<String>,
    ) -> Option<Response> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let refuse = |status: u16, message: &str| {
            let status = StatusCode::from_u16(status).unwrap();
            Some((status, Json(json!({ "error": { "message": message } }))).into_response())
        };
        let key =
            headers.get("Api-Key").or_else(|| headers.get("Authorization")).and_then(|key| key.to_str().ok());
        if key.is_none_or(|key| key.trim_start_matches("Bearer ") != KEY) {
            return refuse(401, "that is no key of ours");
        }
        if let Some(status) = self.failures.lock().unwrap().pop() {
            return refuse(status, "not now");
        }
        if texts.is_empty() || texts.len() > most {
            return refuse(422, "too many inputs");
        }
        if texts.iter().any(|text| text.contains(POISON)) {
            return refuse(400, "one of the inputs can't be embedded");
        }
        self.seen.lock().unwrap().push((texts.len(), purpose));
        None
    }

    async fn vectors(&self, texts: &[String]) -> Vec<Vec<f32>> {
        let texts: Vec<Arc<str>> = texts.iter().map(|text| text.as_str().into()).collect();
        let length = self.length.lock().unwrap().unwrap_or(usize::MAX);
        let vectors = real().await.embed_texts(&texts).await.unwrap();
        // Not of length 1, as some servers have it.
        vectors.iter().map(|vector| vector.iter().take(length).map(|value| value * 3.0).collect()).collect()
    }
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(|text| text.as_str().unwrap().to_owned()).collect()
}

async fn openai(
    State(double): State<Arc<EmbeddingServer>>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    assert_eq!((&body["model"], &body["encoding_format"]), (&json!("all-minilm"), &json!("float")));
    let texts = strings(&body["input"]);
    if let Some(refused) = double.admit(&headers, &texts, 2_048, None) {
        return refused;
    }
    let vectors = double.vectors(&texts).await;
    // In arbitrary order.
    let data: Vec<Value> = vectors
        .iter()
        .enumerate()
        .rev()
        .map(|(index, vector)| json!({ "object": "embedding", "index": index, "embedding": vector }))
        .collect();
    Json(json!({ "object": "list", "data": data, "model": "all-minilm" })).into_response()
}

/// Two protocols share the path.
async fn embed(
    State(double): State<Arc<EmbeddingServer>>,
    headers: HeaderMap,
    _: Uri,
    body: Bytes,
) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap();
    if body.get("parameters").is_none() {
        let texts = strings(&body["inputs"]);
        if let Some(refused) = double.admit(&headers, &texts, 32, None) {
            return refused;
        }
        return Json(double.vectors(&texts).await).into_response();
    }
    assert_eq!(headers["X-Pinecone-Api-Version"], "2026-04");
    let texts: Vec<String> = body["inputs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|input| input["text"].as_str().unwrap().to_owned())
        .collect();
    let purpose = body["parameters"]["input_type"].as_str().map(str::to_owned);
    if let Some(refused) = double.admit(&headers, &texts, 96, purpose) {
        return refused;
    }
    let data: Vec<Value> = double
        .vectors(&texts)
        .await
        .iter()
        .map(|vector| json!({ "values": vector, "vector_type": "dense" }))
        .collect();
    Json(json!({ "model": "all-minilm", "data": data, "usage": { "total_tokens": 1 } })).into_response()
}

async fn info() -> Json<Value> {
    Json(
        json!({ "model_id": "sentence-transformers/all-MiniLM-L6-v2", "max_client_batch_size": 32, "max_input_length": 256 }),
    )
}

fn variables<'a>(kind: &'a str, url: &'a str) -> Vec<(&'a str, &'a str)> {
    vec![
        ("REFARCH_EMBEDDER_KIND", kind),
        ("REFARCH_EMBEDDER_URL", url),
        ("REFARCH_EMBEDDER_MODEL", "all-minilm"),
        ("REFARCH_EMBEDDER_API_KEY", KEY),
    ]
}

async fn open(kind: &str, url: &str, extra: &[(&str, &str)]) -> Result<Arc<dyn Embedder>, Error> {
    let env = [variables(kind, url), extra.to_vec()].concat();
    Ok(LoadedModel::load(&settings(&env)).await?.start(3))
}

fn texts(texts: &[&str]) -> Vec<Arc<str>> {
    texts.iter().map(|text| (*text).into()).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The contract of every embedder.
async fn keeps_the_contract(embedder: &dyn Embedder) {
    assert_eq!(embedder.embed_texts(&[]).await.unwrap().len(), 0);
    let many: Vec<String> = (0..110).map(|n| format!("a thing that is number {n}")).collect();
    let many: Vec<Arc<str>> = many.iter().map(|text| text.as_str().into()).collect();
    let all = embedder.embed_texts(&many).await.unwrap();
    assert_eq!(all.len(), many.len());
    let alone = embedder.embed_texts(&many[77..78]).await.unwrap();
    assert!(cosine(&all[77], &alone[0]) > 0.9999, "in the order of the texts");
    for vector in &all {
        assert_eq!(vector.len(), embedder.dimensions());
        assert!((cosine(vector, vector) - 1.0).abs() < 1e-4, "a unit vector");
    }
    let asked = embedder.embed_query(&many[3]).await.unwrap();
    assert!(cosine(&asked, &all[3]) > 0.9999);
    let read = embedder.tokenize(texts(&["", "some words that are more"])).await.unwrap();
    assert!(read.len() == 2 && read[0].count() <= read[1].count());
    let long = "word ".repeat(20_000);
    assert_eq!(embedder.embed_texts(&texts(&[&long])).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_embedder_keeps_the_contract_and_makes_the_same_vectors() {
    let model = real().await;
    keeps_the_contract(&*model).await;
    let sample = texts(&["a red kettle", "ein roter Kessel", ""]);
    let wanted = model.embed_texts(&sample).await.unwrap();
    for (kind, name) in [
        ("openai", "openai:all-minilm@384"),
        ("tei", "tei:all-minilm@384"),
        ("pinecone", "pinecone:all-minilm@384"),
    ] {
        let double = Arc::new(EmbeddingServer::default());
        let embedder = open(kind, &double.start().await, &[]).await.unwrap();
        assert_eq!((embedder.model(), embedder.dimensions()), (name, 384), "the server was asked");
        keeps_the_contract(&*embedder).await;
        for (vector, wanted) in embedder.embed_texts(&sample).await.unwrap().iter().zip(&wanted) {
            assert!(cosine(vector, wanted) > 0.9999, "{kind}");
        }
        let purposes: Vec<_> =
            double.seen.lock().unwrap().iter().map(|(_, purpose)| purpose.clone()).collect();
        let queries = purposes.iter().flatten().filter(|purpose| *purpose == "query").count();
        assert_eq!(queries, usize::from(kind == "pinecone"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_respect_the_configured_limits_and_those_of_the_server() {
    let double = Arc::new(EmbeddingServer::default());
    let url = double.start().await;
    let many: Vec<Arc<str>> = (0..70).map(|n| format!("text {n}").into()).collect();
    open("tei", &url, &[]).await.unwrap().embed_texts(&many).await.unwrap();
    let sizes = |double: &EmbeddingServer| -> Vec<usize> {
        let mut sizes: Vec<usize> = double.seen.lock().unwrap().drain(..).map(|(texts, _)| texts).collect();
        sizes.sort_unstable();
        sizes
    };
    assert_eq!(sizes(&double), [1, 6, 32, 32], "one to ask for the length, and batches of 32");
    let fewer = [("REFARCH_EMBEDDER_BATCH_TEXTS", "50"), ("REFARCH_EMBEDDER_DIMENSIONS", "384")];
    open("openai", &url, &fewer).await.unwrap().embed_texts(&many).await.unwrap();
    assert_eq!(sizes(&double), [1, 20, 50], "one as a greeting");
    let tokens = [("REFARCH_EMBEDDER_BATCH_TOKENS", "30"), ("REFARCH_EMBEDDER_DIMENSIONS", "384")];
    open("openai", &url, &tokens).await.unwrap().embed_texts(&many).await.unwrap();
    assert!(sizes(&double).iter().all(|texts| *texts <= 15));
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_classified_and_temporary_ones_are_retried() {
    let double = Arc::new(EmbeddingServer::default());
    let url = double.start().await;
    let embedder = open("openai", &url, &[]).await.unwrap();
    double.fail(&[503, 429]);
    embedder.embed_texts(&texts(&["a"])).await.unwrap();
    assert_eq!(double.requests.load(Ordering::SeqCst), 4);
    double.fail(&[500; 9]);
    let error = embedder.embed_texts(&texts(&["a"])).await.unwrap_err();
    assert_eq!(error.class(), Class::Retryable, "{error}");
    double.fail(&[]);
    let error = embedder.embed_texts(&texts(&["fine", "some poison"])).await.unwrap_err();
    assert!(error.class() == Class::Permanent && error.message().contains("one of the inputs"), "{error}");
    *double.length.lock().unwrap() = Some(7);
    let error = embedder.embed_texts(&texts(&["a"])).await.unwrap_err();
    assert!(error.class() == Class::Fatal && error.message().contains("length 7 instead of 384"), "{error}");
    *double.length.lock().unwrap() = Some(0);
    assert!(open("openai", &url, &[]).await.is_err(), "a vector without numbers");
    let wrong = open("openai", &url, &[("REFARCH_EMBEDDER_API_KEY", "wrong-key")]).await.err().unwrap();
    assert!(wrong.class() == Class::Fatal && wrong.message().contains("embedder.api_key"), "{wrong}");
    assert!(!wrong.to_string().contains("wrong-key"));
    let nowhere = format!("http://127.0.0.1:{}", common::free_port());
    assert_eq!(open("openai", &nowhere, &[]).await.err().unwrap().class(), Class::Retryable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_from_a_providers_own_variable_is_sent_to_that_provider_only() {
    let key = |kind: &str| {
        let set = settings(&[
            ("REFARCH_EMBEDDER_KIND", kind),
            ("REFARCH_EMBEDDER_URL", "http://x"),
            ("REFARCH_EMBEDDER_MODEL", "m"),
            ("OPENAI_API_KEY", "lent"),
        ]);
        let (EmbedderKind::Openai(server) | EmbedderKind::Tei(server)) = set.embedder.kind else {
            panic!("{kind} is a server")
        };
        server.api_key.expose().to_owned()
    };
    assert_eq!((key("openai").as_str(), key("tei").as_str()), ("lent", ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_is_kept_in_step_through_a_server_despite_one_refused_text() {
    let double = Arc::new(EmbeddingServer::default());
    let url = double.start().await;
    let database = Database::create().await;
    let run = async |args: &[&str]| {
        let mut command = database.refarch();
        let output = command.args(args).envs(variables("tei", &url)).output().await.unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.code(), said)
    };
    let (code, said) = run(&["migrate"]).await;
    assert_eq!(code, Some(0), "{said}");
    let client = database.client().await;
    client
        .batch_execute(
            "INSERT INTO products_with_increment (id, description) SELECT n, 'a thing that is number ' || n FROM generate_series(1, 60) n; \
             INSERT INTO products_with_increment (id, description) VALUES (1000, 'a bottle of poison')",
        )
        .await
        .unwrap();
    for role in ["listen", "embed"] {
        let (code, said) = run(&[role, "--until-idle"]).await;
        assert_eq!(code, Some(0), "{said}");
    }
    let (code, said) = run(&["verify", "--sample", "60"]).await;
    println!("{said}");
    assert!(
        said.contains("60 compared, 0 otherwise") && code == Some(1),
        "the refused one is missing: {said}"
    );
    let (_, letters) = run(&["redrive"]).await;
    assert!(letters.contains("1000") && letters.contains("one of the inputs"), "{letters}");
    // Vectors of another model are never taken for vectors of this model.
    let mut other = database.refarch();
    let output = other.args(["embed", "--until-idle"]).output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("run refarch migrate"), "{said}");
}
