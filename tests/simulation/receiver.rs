//! How a receive loop ends, and which failures it waits out.

use std::sync::{Arc, Mutex};

use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use refarch::pipeline::change::{Group, JOB_VERSION, Job, Lane, Op};
use refarch::pipeline::clock::Clock as _;
use refarch::pipeline::failure::{FailureKind, Result};
use refarch::pipeline::fault::{self, FaultBoard};
use refarch::pipeline::indexer::{Indexer, Receiver};
use refarch::pipeline::queue::JobQueue as _;
use tokio_util::sync::CancellationToken;

use crate::executor::{Executor, SimClock};
use crate::world::{IndexKind, RowText, View, World};

/// Steps within which a loop does what it must.
const STEPS: u32 = 10_000;

/// Both lanes of one worker, in a world where nothing goes wrong by itself.
struct Lanes {
    world: Arc<Mutex<World>>,
    clock: Arc<SimClock>,
    executor: Executor,
    rng: SmallRng,
    board: Arc<FaultBoard>,
    stop: CancellationToken,
    abort: CancellationToken,
    /// How each loop ended.
    ended: Arc<Mutex<Vec<Result<()>>>>,
}

impl Lanes {
    /// Starts both loops over a bulk lane that has `rows` messages of one row each. From the first receive on,
    /// each fails like this, if at all.
    fn start(rows: usize, cannot_receive: Option<FailureKind>) -> Self {
        let clock = Arc::new(SimClock::new(1));
        let lanes_clock = Arc::clone(&clock);
        let mut world = World::new(SmallRng::seed_from_u64(1), Arc::clone(&clock), IndexKind::External, None);
        world.faults = false;
        world.cannot_receive = cannot_receive;
        for id in 0..rows {
            let row = RowText { text: format!("text {id}"), metadata: String::new() };
            world.write(&id.to_string(), Some(row));
        }
        let world = Arc::new(Mutex::new(world));
        let view = View { world: Arc::clone(&world), worker: "w".into() };
        let jobs: Vec<Job> = (0..rows)
            .map(|id| Job {
                v: JOB_VERSION,
                source: "products".into(),
                lane: Lane::Bulk,
                oldest: jiff::Timestamp::UNIX_EPOCH,
                trace: None,
                groups: vec![Group { version: 1, op: Op::Upsert, after_ms: 0, ids: vec![id.to_string()] }],
            })
            .collect();
        let mut executor = Executor::new(Arc::clone(&clock));
        let (indexer, lease) = crate::build_indexer(&view, &clock);
        let board: Arc<FaultBoard> = Arc::default();
        let indexer: Arc<Indexer> = Arc::new(indexer.reporting(Arc::clone(&board)));
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        let ended: Arc<Mutex<Vec<Result<()>>>> = Arc::default();
        executor.spawn(0, async move { view.send(&jobs).await.unwrap() });
        for lane in Lane::ALL {
            let spawner = Arc::new(executor.spawner(0));
            let receiver =
                Receiver::new(Arc::clone(&indexer), lane, spawner, stop.clone(), abort.clone(), false);
            let ended = Arc::clone(&ended);
            executor.spawn(0, async move {
                let result = receiver.run().await;
                ended.lock().unwrap().push(result);
            });
        }
        executor.spawn(0, async move { indexer.embed_slices().await.unwrap() });
        executor.spawn(0, async move {
            lease.begin(clock.now());
            loop {
                clock.sleep(crate::world::LEASE / 4).await;
                lease.confirm(clock.now());
            }
        });
        Self {
            world,
            clock: lanes_clock,
            executor,
            rng: SmallRng::seed_from_u64(2),
            board,
            stop,
            abort,
            ended,
        }
    }

    /// Runs until something holds.
    fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..STEPS {
            if holds(self) {
                return;
            }
            self.executor.step(&mut self.rng);
        }
        panic!("{what}: not within {STEPS} steps");
    }

    fn both_ended(&self) -> bool {
        self.ended.lock().unwrap().len() == Lane::ALL.len()
    }

    fn indexed(&self) -> usize {
        self.world.lock().unwrap().index.len()
    }
}

#[test]
fn on_stop_a_lane_finishes_its_received_messages() {
    let mut lanes = Lanes::start(40, None);
    lanes.until("the first record", |lanes| lanes.indexed() > 0);
    lanes.stop.cancel();
    lanes.until("the end of both lanes", Lanes::both_ended);
    assert!(lanes.ended.lock().unwrap().iter().all(Result::is_ok), "{:?}", lanes.ended);
    let world = lanes.world.lock().unwrap();
    assert!(world.index.len() < 40, "the rest is for others");
    assert_eq!(
        world.queued(Lane::Bulk),
        40 - world.index.len(),
        "what is done is acknowledged, and only that"
    );
}

#[test]
fn a_fatal_receive_failure_ends_both_lanes_and_their_work() {
    for (kind, waits) in [
        (FailureKind::WrongSetting, false),
        (FailureKind::WrongVersion, false),
        (FailureKind::ProcessBroken, false),
        // These may pass by themselves, so they are waited for.
        (FailureKind::MissingResource, true),
        (FailureKind::RefusedCredentials, true),
    ] {
        let mut lanes = Lanes::start(0, Some(kind));
        let started = lanes.clock.now();
        lanes.until("the end of both lanes", Lanes::both_ended);
        let failed = lanes.ended.lock().unwrap().iter().filter(|ended| ended.is_err()).count();
        assert!(failed >= 1, "{:?}", lanes.ended);
        assert!(lanes.stop.is_cancelled() && lanes.abort.is_cancelled());
        assert_eq!(lanes.clock.now() >= started + crate::START_TIMEOUT, waits, "{kind:?}");
    }
}

#[test]
fn a_queue_that_is_missing_at_the_start_is_waited_for() {
    let mut lanes = Lanes::start(5, Some(FailureKind::MissingResource));
    lanes.until("the fault", |lanes| lanes.board.current().iter().any(|one| one.kind == fault::QUEUE));
    lanes.world.lock().unwrap().cannot_receive = None;
    lanes.until("every row", |lanes| lanes.indexed() == 5);
    lanes.until("the fault's end", |lanes| lanes.board.current().is_empty());
    // What was received from before is waited for without a bound.
    lanes.world.lock().unwrap().cannot_receive = Some(FailureKind::MissingResource);
    let now = lanes.clock.now();
    lanes.until("a long time", |lanes| lanes.clock.now() > now + 10 * crate::START_TIMEOUT);
    assert!(!lanes.both_ended(), "{:?}", lanes.ended);
}

#[test]
fn an_unavailable_queue_is_one_fault_until_it_is_back() {
    let mut lanes = Lanes::start(5, Some(FailureKind::ConnectionLost));
    lanes.until("the fault", |lanes| lanes.board.current().iter().any(|one| one.kind == fault::QUEUE));
    lanes.world.lock().unwrap().cannot_receive = None;
    lanes.until("every row", |lanes| lanes.indexed() == 5);
    lanes.until("the fault's end", |lanes| lanes.board.current().is_empty());
    assert!(!lanes.both_ended());
}
