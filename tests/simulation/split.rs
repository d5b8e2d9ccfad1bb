//! Splitting a batch until what is refused stands alone, for any batch and any poison in it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use refarch::pipeline::change::{Group, JOB_VERSION, Job, Lane, Op};
use refarch::pipeline::queue::{Message, Reason, Receipt};

use crate::executor::{Executor, SimClock};
use crate::world::{IndexKind, ProtocolMutation, REFUSED, RowText, View, World};

/// Applies one message of these rows to a world where nothing else goes wrong.
fn apply(kind: IndexKind, rows: &[bool]) -> (Arc<Mutex<World>>, refarch::pipeline::indexer::StepOutcome) {
    let clock = Arc::new(SimClock::new(1));
    let mut world =
        World::new(SmallRng::seed_from_u64(1), Arc::clone(&clock), kind, None::<ProtocolMutation>);
    world.faults = false;
    let ids: Vec<String> = (0..rows.len()).map(|id| id.to_string()).collect();
    for (id, refused) in ids.iter().zip(rows) {
        let text = if *refused { REFUSED.to_owned() } else { format!("text {id}") };
        world.write(id, Some(RowText { text, metadata: String::new() }));
    }
    let world = Arc::new(Mutex::new(world));
    let view = View { world: Arc::clone(&world), worker: "w".into() };
    let (indexer, lease) = crate::indexer(&view, &clock);
    lease.begin(refarch::pipeline::clock::Clock::now(&*clock));
    let job = Job {
        v: JOB_VERSION,
        source: "products".into(),
        lane: Lane::Bulk,
        oldest: jiff::Timestamp::UNIX_EPOCH,
        trace: None,
        groups: vec![Group { version: 1, op: Op::Upsert, after_ms: 0, ids }],
    };
    let message = Message {
        id: "1".into(),
        receipt: Receipt { lane: Lane::Bulk, handle: "1".into() },
        receive_count: 1,
        body: Ok(job),
    };
    let mut executor = Executor::new(clock);
    let embedding = Arc::clone(&indexer);
    executor.spawn(0, async move { embedding.embed_slices().await.unwrap() });
    let stepped = Arc::new(Mutex::new(None));
    let result = Arc::clone(&stepped);
    executor.spawn(0, async move {
        let done = indexer.step(Lane::Bulk, &[message]).await.unwrap();
        *result.lock().unwrap() = Some(done);
    });
    let mut rng = SmallRng::seed_from_u64(2);
    loop {
        // The session's heartbeat: time passes here without one.
        lease.confirm(refarch::pipeline::clock::Clock::now(&*executor.clock));
        assert!(executor.step(&mut rng), "the step waits for nothing");
        if let Some(done) = stepped.lock().unwrap().take() {
            return (world, done);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn only_refused_changes_are_dead_lettered(
        rows in proptest::collection::vec(proptest::bool::weighted(0.05), 1..300),
        transactional: bool,
    ) {
        let kind = if transactional { IndexKind::Transactional } else { IndexKind::External };
        let (world, done) = apply(kind, &rows);
        let world = world.lock().unwrap();
        let refused: BTreeSet<String> =
            (0..rows.len()).filter(|at| rows[*at]).map(|at| at.to_string()).collect();
        let dead: Vec<String> = world
            .dead
            .iter()
            .flat_map(|(job, why)| {
                assert_eq!(why.reason, Reason::Refused);
                job.groups.iter().flat_map(|group| group.ids.clone())
            })
            .collect();
        // Each once, and alone.
        prop_assert_eq!(dead.len(), refused.len());
        prop_assert_eq!(world.dead.len(), refused.len());
        prop_assert_eq!(dead.into_iter().collect::<BTreeSet<_>>(), refused.clone());
        prop_assert_eq!(done.dead_lettered as usize, refused.len());
        prop_assert_eq!(world.index.len(), rows.len() - refused.len());
        for id in world.index.keys() {
            prop_assert!(!refused.contains(id));
        }
        // Every text went through the model once, however often it was tried.
        prop_assert!(done.embedded as usize <= rows.len());
    }
}
