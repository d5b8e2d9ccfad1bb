//! A double of SQS in this process, with the limits of SQS and with faults on request. It is fast enough for
//! loads of millions of changes.
//!
//! It speaks the JSON protocol. It is written from the documentation of SQS, shares no code with the client,
//! and passes the same contract tests as an independent server.

mod faults;
mod message_operations;
mod queue;
mod queue_operations;
mod state;
mod wire;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use faults::FaultDecision;
pub use faults::{SqsCounts, SqsFaults};
use queue::Queue;
use state::{ACCOUNT, REGION, State};
use wire::{SqsError, SqsResult};

/// The double. It stops when its last clone is dropped.
#[derive(Clone)]
pub struct SqsDouble {
    url: String,
    server: Arc<Server>,
    _stop: Arc<DropGuard>,
}

struct Server {
    base: String,
    state: Mutex<State>,
    /// Notified when a message may have become visible.
    message_visible: Notify,
}

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SqsDouble {
    /// Serves on a free loopback port, at first without queues. The faults follow from the seed and the order
    /// of calls.
    pub async fn start(seed: u64) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let server = Arc::new(Server {
            base: url.clone(),
            state: Mutex::new(State {
                queues: HashMap::new(),
                moves: Vec::new(),
                rng: StdRng::seed_from_u64(seed),
                faults: SqsFaults::default(),
                counts: SqsCounts::default(),
            }),
            message_visible: Notify::new(),
        });
        let stop = CancellationToken::new();
        let router = Router::new()
            .route("/", post(serve))
            // Older clients post to the path of the queue.
            .route("/{*queue}", post(serve))
            .layer(DefaultBodyLimit::disable())
            .with_state(Arc::clone(&server));
        let serving = axum::serve(listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
        tokio::spawn(serving.into_future());
        Ok(Self { url, server, _stop: Arc::new(stop.drop_guard()) })
    }

    /// The address that it serves on, such as `http://127.0.0.1:9324`.
    #[must_use]
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Creates the queues of both lanes and the dead-letter queue. Returns their URLs in this order.
    #[must_use]
    pub fn create(&self, prefix: &str, max_receives: u32) -> [String; 3] {
        let dead = format!("{prefix}-dead");
        let policy = json!({
            "deadLetterTargetArn": format!("arn:aws:sqs:{REGION}:{ACCOUNT}:{dead}"),
            "maxReceiveCount": max_receives,
        });
        let mut state = self.server.state();
        ["live", "bulk", "dead"].map(|name| {
            let name = format!("{prefix}-{name}");
            let queue = state.queues.entry(name.clone()).or_default();
            if name != dead {
                queue.settings.insert("RedrivePolicy".into(), policy.to_string());
            }
            format!("{}/{ACCOUNT}/{name}", self.url)
        })
    }

    /// Sets the faults from now on.
    pub fn set_faults(&self, faults: SqsFaults) {
        self.server.state().faults = faults;
    }

    /// The counts of calls and faults since the start.
    #[must_use]
    pub fn counts(&self) -> SqsCounts {
        self.server.state().counts
    }

    /// The bodies of a queue's messages, in no order.
    #[must_use]
    pub fn bodies(&self, name: &str) -> Vec<String> {
        let state = self.server.state();
        state
            .queues
            .get(name)
            .into_iter()
            .flat_map(Queue::messages)
            .map(|message| message.body.clone())
            .collect()
    }

    /// Sends up to `count` messages a second time, from every queue except the dead-letter queue.
    #[allow(clippy::must_use_candidate, reason = "the count is only for telling")]
    pub fn duplicate(&self, count: usize) -> u64 {
        let mut state = self.server.state();
        let mut duplicated = 0;
        for (_, queue) in state.queues.iter_mut().filter(|(name, _)| !name.ends_with("-dead")) {
            let copies: Vec<queue::Message> = queue.messages().take(count).cloned().collect();
            duplicated += copies.len() as u64;
            for copy in copies {
                queue.send(copy, Duration::ZERO, Instant::now());
            }
        }
        drop(state);
        self.server.message_visible.notify_waiters();
        duplicated
    }

    /// Deletes every message except the dead letters, like a manual purge.
    #[allow(clippy::must_use_candidate, reason = "the count is only for telling")]
    pub fn purge(&self) -> u64 {
        let mut state = self.server.state();
        let lanes = state.queues.iter_mut().filter(|(name, _)| !name.ends_with("-dead"));
        lanes
            .map(|(_, queue)| {
                let count = queue.messages().count() as u64;
                queue.purge();
                count
            })
            .sum()
    }

    /// Hides up to `count` visible messages of every queue, which changes the order of receives.
    #[allow(clippy::must_use_candidate, reason = "the count is only for telling")]
    pub fn delay(&self, count: usize, delay: Duration) -> u64 {
        let mut state = self.server.state();
        state.queues.values_mut().map(|queue| queue.delay(count, delay, Instant::now())).sum()
    }

    /// Makes up to `count` messages in flight of every queue visible again.
    #[allow(clippy::must_use_candidate, reason = "the count is only for telling")]
    pub fn make_visible(&self, count: usize) -> u64 {
        let made_visible =
            self.server.state().queues.values_mut().map(|queue| queue.make_visible(count)).sum();
        self.server.message_visible.notify_waiters();
        made_visible
    }
}

async fn serve(Shared(server): Shared<Arc<Server>>, headers: HeaderMap, body: Bytes) -> Response {
    let target = headers.get("X-Amz-Target").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let operation = target.strip_prefix("AmazonSQS.").unwrap_or_default().to_owned();
    if !headers.contains_key("Authorization") {
        return error_response(&SqsError::missing_token());
    }
    let (latency, decision) = {
        let mut state = server.state();
        state.counts.arrived += 1;
        let faults = state.faults;
        (faults.latency, faults.draw(&mut state.rng))
    };
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    let answer = match decision {
        FaultDecision::Unavailable => {
            server.state().counts.unavailable += 1;
            return (StatusCode::SERVICE_UNAVAILABLE, r#"{"__type":"com.amazonaws.sqs#ServiceUnavailable"}"#)
                .into_response();
        }
        FaultDecision::Throttled => {
            server.state().counts.throttled += 1;
            return error_response(&SqsError::throttled());
        }
        FaultDecision::Served | FaultDecision::FalseError | FaultDecision::Dropped => {
            let parsed: Value = match serde_json::from_slice(&body) {
                Ok(parsed) => parsed,
                Err(error) => return error_response(&SqsError::invalid(error.to_string())),
            };
            answer(&server, &operation, &parsed).await
        }
    };
    let sent = if operation.starts_with("Send") { body.len() } else { 0 };
    let (status, text) = match &answer {
        Ok(answer) => (StatusCode::OK, answer.to_string()),
        Err(error) => return counted(&server, &operation, sent, error_response(error)),
    };
    let bytes = if operation == "ReceiveMessage" { text.len() } else { sent };
    let response = match decision {
        FaultDecision::FalseError => {
            server.state().counts.lied += 1;
            (StatusCode::INTERNAL_SERVER_ERROR, r#"{"__type":"com.amazonaws.sqs#InternalFailure"}"#)
                .into_response()
        }
        FaultDecision::Dropped => {
            server.state().counts.dropped += 1;
            broken_connection()
        }
        _ => (status, [("Content-Type", "application/x-amz-json-1.0")], text).into_response(),
    };
    counted(&server, &operation, bytes, response)
}

fn counted(server: &Server, operation: &str, bytes: usize, response: Response) -> Response {
    server.state().counts.call(operation, bytes);
    response
}

/// Does an operation. A receive waits for as long as the call asks.
async fn answer(server: &Server, operation: &str, body: &Value) -> SqsResult {
    let wait = body.get("WaitTimeSeconds").and_then(Value::as_u64).unwrap_or_default();
    let until = Instant::now() + Duration::from_secs(wait);
    loop {
        let sent = server.message_visible.notified();
        let mut sent = std::pin::pin!(sent);
        sent.as_mut().enable();
        let (answer, due) = {
            let mut state = server.state();
            let answer = state.run(operation, body, &server.base);
            let due = if operation == "ReceiveMessage" { state.next_due(body) } else { None };
            (answer, due)
        };
        if operation != "ReceiveMessage" {
            server.message_visible.notify_waiters();
            return answer;
        }
        let is_empty = answer.as_ref().is_ok_and(|answer| answer.get("Messages").is_none());
        if !is_empty || Instant::now() >= until {
            return answer;
        }
        let again = due.map_or(until, |due| due.min(until));
        tokio::select! {
            () = sent => {}
            () = tokio::time::sleep_until(again.into()) => {}
        }
    }
}

fn error_response(error: &SqsError) -> Response {
    let body = json!({ "__type": format!("com.amazonaws.sqs#{}", error.name), "message": error.message });
    let headers = [
        ("Content-Type", "application/x-amz-json-1.0".to_owned()),
        ("x-amzn-query-error", format!("{};Sender", error.query_name)),
    ];
    (StatusCode::BAD_REQUEST, headers, body.to_string()).into_response()
}

/// An answer that makes the server close the connection before it sends a byte.
fn broken_connection() -> Response {
    let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    let body = futures::stream::once(std::future::ready(Err::<Bytes, _>(broken)));
    Response::new(Body::from_stream(body))
}
