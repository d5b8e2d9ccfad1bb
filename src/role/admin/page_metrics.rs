//! What is counted of the requests to the page.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::catalogue::{REQUEST, REQUESTS, SECOND_LOOKS};
use super::exposition::Samples;
use crate::pipeline::metrics::{Distribution, REQUEST_S, SecondLooks};

/// Classes of answers.
const CODES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

#[derive(Debug)]
struct Route {
    by_code: [u64; CODES.len()],
    times: Distribution,
}

/// Requests to the page, and their searches.
#[derive(Debug, Default)]
pub struct PageMetrics {
    /// Requests by route. Routes are those of the router, so there are few.
    routes: Mutex<BTreeMap<String, Route>>,
    /// Missing if the index is outside of the database.
    second_looks: OnceLock<Arc<SecondLooks>>,
}

impl PageMetrics {
    /// Counts a request that was answered.
    pub fn answered(&self, route: &str, status: u16, took: Duration) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if !routes.contains_key(route) {
            let new = Route { by_code: [0; CODES.len()], times: Distribution::new(REQUEST_S) };
            routes.insert(route.to_owned(), new);
        }
        let Some(counted) = routes.get_mut(route) else { return };
        let class = usize::from(status / 100).clamp(1, CODES.len()) - 1;
        counted.by_code[class] += 1;
        counted.times.observe(took.as_secs_f64());
    }

    /// Shows these counts too.
    pub fn watch_second_looks(&self, looks: &Arc<SecondLooks>) {
        self.second_looks.get_or_init(|| Arc::clone(looks));
    }

    /// Adds the counts.
    pub fn collect(&self, samples: &mut Samples) {
        if let Some(looks) = self.second_looks.get() {
            samples.count(&SECOND_LOOKS, &["found"], looks.found.get());
            samples.count(&SECOND_LOOKS, &["nothing"], looks.nothing.get());
        }
        let routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, route) in &*routes {
            for (code, count) in CODES.iter().zip(route.by_code).filter(|(_, count)| *count > 0) {
                samples.count(&REQUESTS, &[name, code], count);
            }
            samples.distribution(&REQUEST, &[name], route.times.get());
        }
    }
}
