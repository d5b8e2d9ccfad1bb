//! Requests to the HTTP API, and their times.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use reqwest::{Client, Url};
use serde_json::Value;
use tokio::task::JoinSet;

/// Least time that `serve` reuses a status, and how many times as long as its read took.
const STATUS_REUSED: Duration = Duration::from_millis(300);
const STATUS_REUSED_FOR_COST: u32 = 6;

/// The answer to a question.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub ms: f64,
    /// Ids of the rows on the first page, best first.
    pub ids: Vec<i64>,
}

/// Percentiles of times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Percentiles {
    pub p50: f64,
    pub p99: f64,
}

impl Percentiles {
    /// The percentiles of some times.
    pub fn of(times: &[f64]) -> Self {
        let mut sorted = times.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| sorted[((sorted.len() as f64 * share).ceil() as usize).max(1) - 1];
        Self { p50: at(0.5), p99: at(0.99) }
    }
}

/// The middle number; the upper one of two.
pub fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Asks all questions with so many clients at once, each over its own connection. Answers are in the order of
/// the questions. Also returns the time for all.
pub async fn ask(url: &str, clients: usize, questions: &[String]) -> Result<(Vec<Answer>, Duration)> {
    let questions: Arc<[String]> = questions.into();
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    let started = Instant::now();
    for _ in 0..clients {
        let (questions, next, url) = (Arc::clone(&questions), Arc::clone(&next), url.to_owned());
        tasks.spawn(async move {
            let client = Client::new();
            let mut answers = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(question) = questions.get(number) else { return anyhow::Ok(answers) };
                answers.push((number, search(&client, &url, question).await?));
            }
        });
    }
    let mut answers = vec![Answer::default(); questions.len()];
    while let Some(done) = tasks.join_next().await {
        for (number, answer) in done?? {
            answers[number] = answer;
        }
    }
    Ok((answers, started.elapsed()))
}

async fn search(client: &Client, url: &str, question: &str) -> Result<Answer> {
    let url = Url::parse_with_params(&format!("{url}/api/v1/search"), [("q", question), ("per_page", "10")])?;
    let started = Instant::now();
    let answer = client.get(url).send().await?;
    let (status, body) = (answer.status(), answer.bytes().await?);
    let ms = started.elapsed().as_secs_f64() * 1e3;
    if !status.is_success() {
        bail!("the search for {question:?} failed with {status}: {}", String::from_utf8_lossy(&body));
    }
    let body: Value = serde_json::from_slice(&body)?;
    let rows = body["rows"].as_array().context("the search returned no rows")?;
    let ids = rows.iter().filter_map(|row| row["id"].as_i64()).collect();
    Ok(Answer { ms, ids })
}

/// Times of `count` requests for a path. If the path is refused, the message.
pub async fn times(url: &str, path: &str, count: usize) -> Result<Result<Vec<f64>, String>> {
    let client = Client::new();
    let mut times = Vec::new();
    // The first request opens the connection.
    for number in 0..=count {
        let started = Instant::now();
        let answer = client.get(format!("{url}{path}")).send().await?;
        let (status, body) = (answer.status(), answer.bytes().await?);
        let took = started.elapsed();
        if !status.is_success() {
            return Ok(Err(format!("{status}: {}", String::from_utf8_lossy(&body))));
        }
        if number > 0 {
            times.push(took.as_secs_f64() * 1e3);
        }
        if path.ends_with("/status") {
            // Until the status is read anew.
            tokio::time::sleep(STATUS_REUSED.max(took * STATUS_REUSED_FOR_COST)).await;
        }
    }
    Ok(Ok(times))
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "these numbers are exact")]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let times: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(Percentiles::of(&times), Percentiles { p50: 100.0, p99: 198.0 });
        assert_eq!(Percentiles::of(&[7.0]), Percentiles { p50: 7.0, p99: 7.0 });
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    }
}
