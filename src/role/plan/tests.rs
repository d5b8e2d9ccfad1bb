//! The model against closed forms, and against what must hold whatever is planned.

use std::time::Duration;

use proptest::prelude::*;

use super::advice::remedy;
use super::scenario::{Index, Queue, Scenario, Stage};
use super::simulate::simulate;
use super::timeline::{Point, Timeline};
use crate::pipeline::scaling::Policy;

fn between(least: u32, most: u32) -> Policy {
    Policy::backlog(10.0, least as usize, most as usize)
}

fn fixed(workers: u32) -> Policy {
    between(workers, workers)
}

/// A load that only its workers limit.
fn scenario(records: f64, workers: u32) -> Scenario {
    Scenario {
        records,
        edits: 0.0,
        load_rate: 1e9,
        relays: 1.0,
        relay_bulk_rate: 1e9,
        relay_edit_rate: 1e8,
        live_bound: 5_000.0,
        queue: Queue::Pgmq,
        pack: 500.0,
        worker_rate: 800.0,
        startup: 60.0,
        hold: 2.0,
        database_rate: 1e9,
        index: Index::Pgvector { rate: 1e9 },
        scaling: fixed(workers),
        idle_freshness: 0.03,
        loaded_freshness: 0.12,
    }
}

fn drained(scenario: &Scenario) -> f64 {
    simulate(scenario).drained.unwrap()
}

fn is_near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * a.abs().max(b.abs()).max(1.0)
}

#[test]
fn a_load_takes_its_rows_over_the_slowest_rate() {
    let base = scenario(1e6, 4);
    assert!(is_near(drained(&base), 1e6 / 3_200.0));
    for (slow, rate) in [
        (Scenario { load_rate: 1_000.0, ..base.clone() }, 1_000.0),
        (Scenario { relay_bulk_rate: 900.0, ..base.clone() }, 900.0),
        (Scenario { database_rate: 700.0, ..base.clone() }, 700.0),
        (Scenario { index: Index::Pgvector { rate: 600.0 }, ..base.clone() }, 600.0),
        // 50 MB a second at 100 kB.
        (Scenario { index: Index::Pinecone { namespaces: 2.0, wire_bytes: 1e5 }, ..base.clone() }, 1_000.0),
        // 120,000 messages of one change that stay for 100 seconds.
        (Scenario { queue: Queue::Sqs { queues: 1.0 }, pack: 1.0, hold: 100.0, ..base.clone() }, 1_200.0),
    ] {
        assert!(is_near(drained(&slow), 1e6 / rate), "{rate}");
    }
}

#[test]
fn edits_take_their_part_of_the_rate() {
    let base = scenario(1e6, 4);
    assert!(is_near(drained(&Scenario { edits: 200.0, ..base }), 1e6 / 3_000.0));
}

#[test]
fn a_worker_that_is_asked_for_works_after_its_start() {
    let base = scenario(1e6, 1);
    let timeline = simulate(&Scenario { scaling: between(1, 2), ..base });
    let asked = timeline.decisions[0];
    assert_eq!((asked.decision.current, asked.decision.desired), (1, 2));
    // As soon as the speed of the first worker is known.
    assert!((5.0..8.0).contains(&asked.at), "{asked:?}");
    let ready = asked.at + 60.0;
    assert!(is_near(timeline.drained.unwrap(), ready + (1e6 - ready * 800.0) / 1_600.0));
}

#[test]
fn upserts_a_second_limit_where_requests_are_small() {
    // 400 rows in a group: one request of 400.
    let index = Index::Pinecone { namespaces: 1.0, wire_bytes: 10.0 };
    let base = Scenario { index, ..scenario(1e7, 1_000) };
    let timeline = simulate(&base);
    assert!(is_near(timeline.drained.unwrap(), 1e7 / 40_000.0));
    assert_eq!(timeline.phases().last().unwrap().limit, Stage::IndexRequests);
    // 475 fit by their bytes: still one. At 390, a group takes two.
    let two =
        Scenario { index: Index::Pinecone { namespaces: 1.0, wire_bytes: 1_900_000.0 / 390.0 }, ..base };
    assert!(is_near(two.records_per_request(), 200.0));
}

#[test]
fn the_limit_moves_from_the_load_to_the_workers() {
    // The load ends after ten seconds; until then its few rows are all that workers have.
    let base = Scenario { load_rate: 1_000.0, records: 10_000.0, ..scenario(0.0, 1) };
    let limits: Vec<Stage> = simulate(&base).phases().iter().map(|phase| phase.limit).collect();
    assert_eq!(limits, [Stage::Workers]);
    let base = Scenario { records: 1e6, ..base };
    let timeline = simulate(&Scenario { scaling: between(1, 9), ..base });
    let limits: Vec<Stage> = timeline.phases().iter().map(|phase| phase.limit).collect();
    assert_eq!(limits[..2], [Stage::Workers, Stage::Load], "more workers catch up");
}

#[test]
fn an_edit_waits_for_nothing_while_workers_have_room_and_for_the_load_when_they_have_none() {
    let base = Scenario { edits: 100.0, ..scenario(1e6, 4) };
    let fresh = simulate(&base).freshness(&base).unwrap();
    assert!(is_near(fresh.worst, 0.12) && fresh.spilled == 0.0, "{fresh:?}");
    // More edits than seven slices of eight: 2,800 a second.
    let base = Scenario { edits: 3_000.0, ..base };
    let timeline = simulate(&base);
    let fresh = timeline.freshness(&base).unwrap();
    assert!(fresh.spilled > 0.0 && fresh.p50 > 1.0 && fresh.worst > 1_000.0, "{fresh:?}");
}

#[test]
fn more_edits_than_workers_can_do_never_end() {
    let base = Scenario { edits: 4_000.0, ..scenario(1e5, 4) };
    let timeline = simulate(&base);
    assert_eq!(timeline.drained, None);
    assert!(timeline.freshness(&base).unwrap().worst > 100.0);
}

#[test]
fn a_deadline_names_what_must_grow_and_the_fewest_workers() {
    let index = Index::Pinecone { namespaces: 1.0, wire_bytes: 5_000.0 };
    let base = Scenario { index, database_rate: 30_000.0, ..scenario(1e9, 2) };
    let found = remedy(&base, 7_200.0, 250_000.0).unwrap();
    let parts: Vec<&str> = found.changes.iter().map(|change| change.part).collect();
    assert_eq!(parts, ["namespaces", "database rate"]);
    assert!(found.changes[0].to >= 14.0, "{:?}", found.changes);
    assert!(found.timeline.drained.unwrap() <= 7_200.0);
    let one_less = Policy { most: found.workers as usize - 1, ..found.scenario.scaling };
    let too_few = simulate(&Scenario { scaling: one_less, ..found.scenario.clone() });
    assert!(too_few.drained.is_none_or(|drained| drained > 7_200.0));
    let slow = remedy(&Scenario { load_rate: 1_000.0, ..base }, 7_200.0, 250_000.0).unwrap();
    assert_eq!(slow.changes[0].part, "load rate");
    let edits = Scenario { edits: 1e12, ..scenario(1e6, 1) };
    assert!(remedy(&edits, 50.0, 1e9).is_err());
}

#[test]
fn a_deadline_before_a_worker_starts_asks_for_workers_from_the_start() {
    let found = remedy(&scenario(1e6, 1), 50.0, 1e9).unwrap();
    assert!(found.from_start);
    assert_eq!(found.workers, 25);
}

/// Scenarios of every kind, small enough to be fast.
fn any_scenario() -> impl Strategy<Value = Scenario> {
    let index = prop_oneof![
        (100.0..1e5_f64).prop_map(|rate| Index::Pgvector { rate }),
        (1_u32..20, 100.0..1e5_f64).prop_map(|(namespaces, wire_bytes)| {
            Index::Pinecone { namespaces: f64::from(namespaces), wire_bytes }
        }),
    ];
    let queue = prop_oneof![
        Just(Queue::Pgmq),
        (1_u32..4).prop_map(|queues| Queue::Sqs { queues: f64::from(queues) })
    ];
    let load = (1_u32..2_000_000, 0.0..2_000.0_f64, 100.0..2e5_f64, 1_u32..4, 500.0..1e6_f64);
    let work = (1_u32..500, 10.0..2_000.0_f64, 0.0..300.0_f64, 0.1..10.0_f64, 200.0..1e5_f64);
    let scaling = (1_u32..20, 0_u32..60, 1.0..60.0_f64, 0.0..300.0_f64, 0.0..300.0_f64);
    (load, work, scaling, index, queue).prop_map(|(load, work, scaling, index, queue)| {
        let (least, more, target, out_cooldown, in_cooldown) = scaling;
        Scenario {
            records: f64::from(load.0),
            edits: load.1,
            load_rate: load.2,
            relays: f64::from(load.3),
            relay_bulk_rate: load.4,
            relay_edit_rate: load.4 / 9.0,
            pack: f64::from(work.0),
            worker_rate: work.1,
            startup: work.2,
            hold: work.3,
            database_rate: work.4,
            index,
            queue,
            scaling: Policy {
                cooldown_out: Duration::from_secs_f64(out_cooldown),
                cooldown_in: Duration::from_secs_f64(in_cooldown),
                ..Policy::backlog(target, least as usize, (least + more) as usize)
            },
            ..scenario(0.0, 1)
        }
    })
}

/// The rows and edits that a point knows of.
fn known(point: &Point) -> f64 {
    let amounts = &point.amounts;
    amounts.unwritten + amounts.backlog() + amounts.done_bulk + amounts.done_live
}

fn is_ordered(timeline: &Timeline) -> bool {
    timeline.points.windows(2).all(|pair| {
        let (a, b) = (&pair[0], &pair[1]);
        a.at <= b.at
            && a.amounts.done_bulk <= b.amounts.done_bulk
            && a.amounts.done_live <= b.amounts.done_live
            && a.amounts.unwritten >= b.amounts.unwritten
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_row_is_lost_or_made(scenario in any_scenario()) {
        let timeline = simulate(&scenario);
        prop_assert!(is_ordered(&timeline));
        for point in &timeline.points {
            let expected = scenario.records + scenario.edits * point.at;
            let difference = (known(point) - expected).abs();
            prop_assert!(difference <= 1e-6 * expected.max(1.0), "{} of {expected} at {}", known(point), point.at);
        }
    }

    #[test]
    fn no_limit_is_exceeded(scenario in any_scenario()) {
        let Policy { least, most, .. } = scenario.scaling;
        for point in &simulate(&scenario).points {
            for (stage, ceiling) in scenario.ceilings(f64::from(point.workers)) {
                prop_assert!(point.rate <= ceiling * (1.0 + 1e-9), "{stage:?}: {} > {ceiling}", point.rate);
            }
            if let Some(ceiling) = scenario.request_ceiling(point.live_rate) {
                prop_assert!(point.rate - point.live_rate <= ceiling * (1.0 + 1e-9) + 1e-9);
            }
            prop_assert!(point.amounts.queue_live <= scenario.live_bound + 1e-6);
            prop_assert!((least..=most).contains(&((point.workers + point.starting) as usize)));
        }
    }

    #[test]
    fn more_workers_are_never_slower(scenario in any_scenario(), workers in 1_u32..40, more in 1_u32..40) {
        let with = |workers| simulate(&Scenario { scaling: fixed(workers), ..scenario.clone() }).drained;
        let (few, many) = (with(workers), with(workers + more));
        if let Some(few) = few {
            let many = many.unwrap_or(f64::INFINITY);
            prop_assert!(many <= few * (1.0 + 1e-6) + 1e-6, "{workers}: {few}, {more} more: {many}");
        }
    }

    #[test]
    fn a_plan_is_the_same_each_time(scenario in any_scenario()) {
        let (a, b) = (simulate(&scenario), simulate(&scenario));
        prop_assert_eq!(a.drained, b.drained);
        prop_assert_eq!(a.points.len(), b.points.len());
        prop_assert_eq!(a.worker_seconds.to_bits(), b.worker_seconds.to_bits());
    }
}
