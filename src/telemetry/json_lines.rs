//! Events as lines of JSON: one object a line, with `service`, `worker_id` and the event's own fields.
//!
//! Written by hand, because the formatter of `tracing-subscriber` cannot add fields of the process. An event that has a
//! `worker.id` (in `up` several workers share a process) has its worker's `worker_id` and `service`.

use std::fmt::{self, Write as _};

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::identity;

/// Formats events as lines of JSON.
pub(super) struct JsonLines;

/// A line that is being written.
pub(super) struct JsonLine(String);

impl JsonLine {
    /// A line with the time, the level, and the names of the worker (the process's if none is given).
    pub(super) fn begin(level: &str, worker: Option<&str>) -> Self {
        let worker = worker.map_or_else(identity::worker, str::to_owned);
        let mut line = Self(String::from("{"));
        line.add(
            "timestamp",
            &jiff::Timestamp::now()
                .round(jiff::Unit::Microsecond)
                .map_or_else(|_| String::new(), |now| now.to_string()),
        );
        line.add("level", &level);
        line.add("service", &identity::service_of(&worker));
        line.add("worker_id", &worker);
        line
    }

    /// Adds a field.
    pub(super) fn add(&mut self, name: &str, value: &(impl Serialize + ?Sized)) {
        // A number, a text or a bool is always JSON.
        let value = serde_json::to_string(value).unwrap_or_else(|_| "null".into());
        let name = serde_json::to_string(name).unwrap_or_default();
        let comma = if self.0.len() > 1 { "," } else { "" };
        let _ = write!(self.0, "{comma}{name}:{value}");
    }

    /// The whole line.
    pub(super) fn end(mut self) -> String {
        self.0.push_str("}\n");
        self.0
    }
}

/// The worker that an event names.
#[derive(Default)]
struct Named(Option<String>);

impl Visit for Named {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "worker.id" {
            self.0 = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "worker.id" {
            self.0 = Some(format!("{value:?}"));
        }
    }
}

impl Visit for JsonLine {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field.name(), &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field.name(), &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field.name(), &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field.name(), &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field.name(), &format!("{value:?}"));
    }
}

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut named = Named::default();
        event.record(&mut named);
        let mut line = JsonLine::begin(event.metadata().level().as_str(), named.0.as_deref());
        event.record(&mut line);
        writer.write_str(&line.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_object_with_the_names_of_its_worker() {
        let mut line = JsonLine::begin("INFO", Some("embed-host-7-00ff"));
        line.add("message", "changes\napplied \"all\"");
        line.add("changes", &3_u64);
        line.add("share", &0.5);
        let line = line.end();
        assert_eq!(line.lines().count(), 1, "{line}");
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["service"], "emu");
        assert_eq!(read["worker_id"], "embed-host-7-00ff");
        assert_eq!(read["message"], "changes\napplied \"all\"");
        assert_eq!((&read["changes"], &read["share"]), (&3.into(), &0.5.into()));
        assert!(read["timestamp"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok());
    }

    #[test]
    fn services_have_the_names_of_the_reference_architecture() {
        for (worker, service) in [
            ("listen-h-1-0a", "pelican"),
            ("embed-h-1", "emu"),
            ("serve-h", "frontend"),
            ("up-h-1", "refarch"),
            ("", "refarch"),
        ] {
            assert_eq!(identity::service_of(worker), service, "{worker}");
        }
    }
}
