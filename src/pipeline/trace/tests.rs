//! Contexts, the choice of messages, and the spans of a batch.

use std::sync::Mutex;

use serde::Deserialize;

use super::*;
use crate::pipeline::change::{JOB_VERSION, Op};
use crate::pipeline::queue::decode;

#[derive(Default)]
struct Kept(Mutex<Vec<Span>>);

impl SpanSink for Kept {
    fn record(&self, span: Span) {
        self.0.lock().unwrap().push(span);
    }
}

fn job(version: i64) -> Job {
    Job {
        v: JOB_VERSION,
        source: "products".into(),
        lane: Lane::Live,
        oldest: "2026-01-02T03:04:05Z".parse().unwrap(),
        trace: None,
        groups: vec![Group { version, op: Op::Upsert, after_ms: 0, ids: vec!["7".into()] }],
    }
}

#[test]
fn a_traceparent_is_read_as_it_is_written() {
    let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let context: TraceContext = text.parse().unwrap();
    assert_eq!(context.to_string(), text);
    // A later version may have more.
    assert_eq!(format!("01{}-more", &text[2..]).parse(), Ok(context));
    for wrong in [
        "",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ] {
        assert_eq!(wrong.parse::<TraceContext>(), Err(()), "{wrong}");
    }
}

#[test]
fn the_share_of_messages_is_traced_and_the_same_ones_each_time() {
    let traced = |share| {
        let mut jobs: Vec<Job> = (0..2_000).map(job).collect();
        Sampler::new(share, Arc::new(Kept::default())).mark(&mut jobs);
        jobs.into_iter().map(|job| job.trace.map(|trace| trace.parent)).collect::<Vec<_>>()
    };
    let some = traced(0.1);
    let count = some.iter().flatten().count();
    assert!((120..280).contains(&count), "{count}");
    assert_eq!(some, traced(0.1));
    assert_eq!(traced(0.0).iter().flatten().count(), 0);
    let all = traced(1.0);
    assert_eq!(all.iter().flatten().collect::<HashSet<_>>().len(), 2_000);
}

/// A build from before traces.
#[derive(Deserialize)]
struct OldJob {
    v: u32,
    source: String,
    lane: Lane,
    oldest: Timestamp,
    groups: Vec<Group>,
}

#[test]
fn an_older_worker_reads_a_traced_message_and_a_newer_one_reads_one_without_a_trace() {
    let mut jobs = [job(1)];
    Sampler::new(1.0, Arc::new(Kept::default())).mark(&mut jobs);
    let body = serde_json::to_string(&jobs[0]).unwrap();
    assert!(body.contains(r#""trace":{"parent":"00-"#), "{body}");
    let old: OldJob = serde_json::from_str(&body).unwrap();
    assert_eq!((old.v, old.source.as_str(), old.lane, old.groups.len()), (1, "products", Lane::Live, 1));
    assert_eq!(old.oldest, jobs[0].oldest);
    assert_eq!(decode(body).unwrap(), jobs[0]);
    let untraced = serde_json::to_string(&job(1)).unwrap();
    assert!(!untraced.contains("trace"), "{untraced}");
    assert_eq!(decode(untraced).unwrap(), job(1));
}

#[test]
fn a_batch_continues_the_traces_of_its_messages_only() {
    let kept = Arc::new(Kept::default());
    let sink: Arc<dyn SpanSink> = kept.clone();
    let sampler = Sampler::new(1.0, Arc::clone(&sink));
    let mut jobs = [job(1)];
    let captured = sampler.mark(&mut jobs);
    sampler.transferred(captured);
    let batch = BatchTrace::of(Some(&sink), jobs.iter());
    let group = batch.group(&["7".into()]);
    group.done("read", group.now());
    let other = batch.group(&["8".into()]);
    assert!(other.now().is_none());
    other.done("read", Some(SystemTime::now()));
    batch.applied();
    let spans = kept.0.lock().unwrap();
    let names: Vec<&str> = spans.iter().map(|span| span.name).collect();
    assert_eq!(names, ["capture", "queue", "read", "apply"]);
    let [capture, queue, read, apply] = spans.as_slice() else { panic!("{spans:?}") };
    assert_eq!(capture.parent, None);
    assert_eq!(queue.parent, Some(capture.id));
    assert_eq!(apply.parent, Some(queue.id));
    assert_eq!(read.parent, Some(apply.id));
    assert!(spans.iter().all(|span| span.trace == capture.trace && span.start <= span.end));
    // What is not traced records nothing, and neither does a worker without a sink.
    assert!(BatchTrace::of(None, jobs.iter()).group(&["7".into()]).now().is_none());
    assert!(BatchTrace::of(Some(&sink), [job(2)].iter()).group(&["7".into()]).now().is_none());
}
