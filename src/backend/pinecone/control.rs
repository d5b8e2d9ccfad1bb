//! The control plane: indexes by name, made where they are missing.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::http::Http;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::secret::Secret;

/// How long a new index may take to be ready.
const READY_WITHIN: Duration = Duration::from_mins(5);

/// How often it is asked whether it is.
const POLL_EVERY: Duration = Duration::from_secs(1);

/// How long a call may take: making an index takes longer than reading one.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Compares vectors by their angle.
const METRIC: &str = "cosine";

/// Which index is meant, and where a missing one is made.
#[derive(Clone, Debug)]
pub struct ControlPlaneOptions {
    /// The control plane's address.
    pub controller: String,
    /// The key.
    pub api_key: Secret,
    /// The index's name.
    pub name: String,
    /// Length of a vector.
    pub dimensions: usize,
    /// Where a missing index is made, such as `aws` and `us-east-1`.
    pub cloud: String,
    /// The cloud's region.
    pub region: String,
}

#[derive(Debug, Deserialize)]
struct Described {
    #[serde(default)]
    host: String,
    dimension: Option<usize>,
    metric: Option<String>,
    /// Newer versions describe an index by its fields.
    #[serde(default)]
    schema: Value,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Default, Deserialize)]
struct Status {
    #[serde(default)]
    ready: bool,
    #[serde(default)]
    state: String,
}

impl Described {
    fn field(&self) -> Option<&Value> {
        let fields = self.schema.get("fields")?.as_object()?;
        fields.values().find(|field| field.get("dimension").is_some())
    }

    fn dimension(&self) -> Option<usize> {
        let newer = || self.field()?.get("dimension")?.as_u64()?.try_into().ok();
        self.dimension.or_else(newer)
    }

    fn metric(&self) -> Option<&str> {
        self.metric.as_deref().or_else(|| self.field()?.get("metric")?.as_str())
    }
}

fn open(options: &ControlPlaneOptions) -> Result<Http> {
    Http::new("index.controller", &options.controller, &options.api_key, TIMEOUT)
}

/// An index as it is; none when there is none of that name.
async fn describe(http: &Http, name: &str) -> Result<Option<Described>> {
    let what = format!("look for the index {name}");
    let response = http.ask(http.request(Method::GET, &format!("/indexes/{name}"))?, &what).await;
    match response {
        Ok(response) => {
            let read = response.json().await;
            read.map(Some).map_err(|error| super::response::failure(&what, error))
        }
        Err(error) if error.kind() == FailureKind::MissingResource => Ok(None),
        Err(error) => Err(explained(error)),
    }
}

/// A refused key, with what to do about it.
fn explained(error: Error) -> Error {
    match error.kind() {
        FailureKind::RefusedCredentials => {
            error.with_remedy("is index.api_key (PINECONE_API_KEY) a key of the index's project?")
        }
        _ => error,
    }
}

/// Refuses an index that can't hold the model's vectors.
fn check(described: &Described, options: &ControlPlaneOptions) -> Result<()> {
    let (name, wanted) = (&options.name, options.dimensions);
    let wrong = |message: String| Err(Error::new(FailureKind::WrongShape, "check the index", message));
    match described.dimension() {
        Some(found) if found != wanted => {
            return wrong(format!(
                "{name} holds vectors of length {found}, and the model makes {wanted}: name another index, or another model"
            ));
        }
        _ => {}
    }
    match described.metric() {
        Some(found) if found != METRIC => wrong(format!(
            "{name} compares vectors by {found}, and {METRIC} is needed: name another index, and refarch migrate makes it"
        )),
        _ => Ok(()),
    }
}

/// The host of the index, once it is ready.
pub async fn host(options: &ControlPlaneOptions) -> Result<String> {
    let http = open(options)?;
    let missing = || {
        let message = format!(
            "there is no index {:?} in this project: run refarch migrate, which makes it",
            options.name
        );
        Error::new(FailureKind::MissingResource, "look for the index", message)
    };
    let described = describe(&http, &options.name).await?.ok_or_else(missing)?;
    ready(&http, described, options).await
}

/// Waits until an index is ready.
async fn ready(http: &Http, mut described: Described, options: &ControlPlaneOptions) -> Result<String> {
    let started = Instant::now();
    loop {
        check(&described, options)?;
        if described.status.ready && !described.host.is_empty() {
            return Ok(described.host);
        }
        if started.elapsed() > READY_WITHIN {
            let message = format!("{} is {} after {READY_WITHIN:?}", options.name, described.status.state);
            return Err(Error::new(FailureKind::TimedOut, "wait for the index", message));
        }
        tokio::time::sleep(POLL_EVERY).await;
        let gone = || {
            Error::new(
                FailureKind::MissingResource,
                "wait for the index",
                format!("{} is gone", options.name),
            )
        };
        described = describe(http, &options.name).await?.ok_or_else(gone)?;
    }
}

/// Whether the index is there, and of the right shape.
pub async fn exists(options: &ControlPlaneOptions) -> Result<bool> {
    let http = open(options)?;
    let Some(described) = describe(&http, &options.name).await? else { return Ok(false) };
    check(&described, options).map(|()| true)
}

/// Makes the index if there is none, and waits until it is ready. Returns whether it was made.
pub async fn ensure(options: &ControlPlaneOptions) -> Result<bool> {
    let http = open(options)?;
    let mut created = false;
    let described = loop {
        if let Some(described) = describe(&http, &options.name).await? {
            break described;
        }
        create(&http, options).await?;
        created = true;
    };
    ready(&http, described, options).await?;
    Ok(created)
}

/// Makes a serverless index. Not protected from deletion: it can be made anew from the table.
async fn create(http: &Http, options: &ControlPlaneOptions) -> Result<()> {
    let body = json!({
        "name": options.name,
        "dimension": options.dimensions,
        "metric": METRIC,
        "vector_type": "dense",
        "spec": { "serverless": { "cloud": options.cloud, "region": options.region } },
        "deletion_protection": "disabled",
    });
    let what = format!("make the index {}", options.name);
    let request = http.request(Method::POST, "/indexes")?.json(&body);
    // Another migration may have been faster.
    http.write(request, &what, Some(StatusCode::CONFLICT)).await.map(drop).map_err(explained)
}
