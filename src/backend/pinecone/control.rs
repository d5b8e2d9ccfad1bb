//! The control plane: looks indexes up by name, and creates missing ones.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::http::Http;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::secret::Secret;

/// How long a new index may take until it is ready.
const READY_WITHIN: Duration = Duration::from_mins(5);

/// How often the state of a new index is polled.
const POLL_EVERY: Duration = Duration::from_secs(1);

/// The time limit of a call: creating an index takes longer than describing one.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Vectors are compared by their angle.
const METRIC: &str = "cosine";

/// The index, and where to create it if it is missing.
#[derive(Clone, Debug)]
pub struct ControlPlaneOptions {
    /// The control plane's URL.
    pub controller: String,
    /// The API key.
    pub api_key: Secret,
    /// The index's name.
    pub name: String,
    /// Length of a vector.
    pub dimensions: usize,
    /// The cloud for a new index, such as `aws`.
    pub cloud: String,
    /// The cloud's region for a new index, such as `us-east-1`.
    pub region: String,
}

#[derive(Debug, Deserialize)]
struct Described {
    #[serde(default)]
    host: String,
    dimension: Option<usize>,
    metric: Option<String>,
    /// Newer versions of the API describe an index by its fields.
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

/// Describes an index. `None` if no index has this name.
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

/// Adds the remedy to the error for a refused key.
fn explained(error: Error) -> Error {
    match error.kind() {
        FailureKind::RefusedCredentials => {
            error.with_remedy("is index.api_key (PINECONE_API_KEY) a key of the index's project?")
        }
        _ => error,
    }
}

/// Fails if the index cannot hold the model's vectors.
fn check(described: &Described, options: &ControlPlaneOptions) -> Result<()> {
    let (name, wanted) = (&options.name, options.dimensions);
    let wrong = |message: String| Err(Error::new(FailureKind::WrongShape, "check the index", message));
    match described.dimension() {
        Some(found) if found != wanted => {
            return wrong(format!(
                "{name} holds vectors of length {found}, but the model makes {wanted}: set another index, or another model"
            ));
        }
        _ => {}
    }
    match described.metric() {
        Some(found) if found != METRIC => wrong(format!(
            "{name} compares vectors by {found} instead of {METRIC}: set the name of a new index, and run refarch migrate to create it"
        )),
        _ => Ok(()),
    }
}

/// The host of the index. Waits until the index is ready.
pub async fn host(options: &ControlPlaneOptions) -> Result<String> {
    let http = open(options)?;
    let missing = || {
        let message =
            format!("there is no index {:?} in this project: run refarch migrate to create it", options.name);
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
            let message = format!(
                "{} is not ready after {READY_WITHIN:?}; its state is {:?}",
                options.name, described.status.state
            );
            return Err(Error::new(FailureKind::TimedOut, "wait for the index", message));
        }
        tokio::time::sleep(POLL_EVERY).await;
        let gone = || {
            Error::new(
                FailureKind::MissingResource,
                "wait for the index",
                format!("{} was deleted meanwhile", options.name),
            )
        };
        described = describe(http, &options.name).await?.ok_or_else(gone)?;
    }
}

/// Whether the index exists. Fails if it exists but cannot hold the model's vectors.
pub async fn exists(options: &ControlPlaneOptions) -> Result<bool> {
    let http = open(options)?;
    let Some(described) = describe(&http, &options.name).await? else { return Ok(false) };
    check(&described, options).map(|()| true)
}

/// Creates the index if it is missing, and waits until it is ready. Returns whether it was created.
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

/// Creates a serverless index. It is not protected from deletion, because it can be rebuilt from the table.
async fn create(http: &Http, options: &ControlPlaneOptions) -> Result<()> {
    let body = json!({
        "name": options.name,
        "dimension": options.dimensions,
        "metric": METRIC,
        "vector_type": "dense",
        "spec": { "serverless": { "cloud": options.cloud, "region": options.region } },
        "deletion_protection": "disabled",
    });
    let what = format!("create the index {}", options.name);
    let request = http.request(Method::POST, "/indexes")?.json(&body);
    // Another migration may have created the index meanwhile.
    http.write(request, &what, Some(StatusCode::CONFLICT)).await.map(drop).map_err(explained)
}
