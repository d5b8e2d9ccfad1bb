//! A batch whose visibility cannot be extended.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use refarch::pipeline::change::{Group, JOB_VERSION, Job, Lane, Op};
use refarch::pipeline::clock::Clock as _;
use refarch::pipeline::failure::Result;
use refarch::pipeline::queue::JobQueue as _;
use tokio_util::sync::CancellationToken;

use crate::executor::{Executor, SimClock};
use crate::world::{Extensions, IndexKind, RowText, VISIBILITY, View, World};

/// Polls after which a batch that is not given up never will be.
const MAX_STEPS: u32 = 10_000;

/// The message has come so often that its change is counted before it is tried.
const RECEIVES: u32 = 3;

/// An indexer that never finishes its message, because its text is never embedded.
struct Held {
    world: Arc<Mutex<World>>,
    clock: Arc<SimClock>,
    executor: Executor,
    rng: SmallRng,
    ended: Arc<Mutex<Option<Result<()>>>>,
}

impl Held {
    /// Receives the message and begins to work on it. From then on, extensions do as they are told.
    fn with(extensions: Extensions) -> Self {
        let clock = Arc::new(SimClock::new(1));
        let rng = SmallRng::seed_from_u64(1);
        let mut world = World::new(rng.clone(), Arc::clone(&clock), IndexKind::Transactional, None);
        world.faults = false;
        world.write("1", Some(RowText { text: "a text".into(), metadata: String::new() }));
        let world = Arc::new(Mutex::new(world));
        let view = View { world: Arc::clone(&world), worker: "w".into() };
        let (indexer, _) = crate::indexer(&view, &clock);
        let job = Job {
            v: JOB_VERSION,
            source: "products".into(),
            lane: Lane::Live,
            oldest: jiff::Timestamp::UNIX_EPOCH,
            trace: None,
            groups: vec![Group { version: 1, op: Op::Upsert, after_ms: 0, ids: vec!["1".into()] }],
        };
        let ended = Arc::new(Mutex::new(None));
        let result = Arc::clone(&ended);
        let mut executor = Executor::new(Arc::clone(&clock));
        executor.spawn(0, async move {
            view.send(&[job]).await.unwrap();
            let mut messages = view.receive(Lane::Live, 1).await.unwrap();
            while messages[0].receive_count < RECEIVES {
                let receipts = [messages[0].receipt.clone()];
                view.extend_visibility(&receipts, Duration::ZERO).await.unwrap();
                messages = view.receive(Lane::Live, 1).await.unwrap();
            }
            view.world.lock().unwrap().extensions = extensions;
            let never = CancellationToken::new();
            let done = indexer.process_with_visibility(Lane::Live, &messages, &never, false).await;
            *result.lock().unwrap() = Some(done);
        });
        let mut held = Self { world, clock, executor, rng, ended };
        held.step_until(|held| held.world().tries("1") > 0);
        held
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    fn step_until(&mut self, is_over: impl Fn(&Self) -> bool) {
        for _ in 0..MAX_STEPS {
            if is_over(self) {
                return;
            }
            assert!(self.executor.step(&mut self.rng), "nothing goes on");
        }
        panic!("still held after {MAX_STEPS} steps");
    }
}

/// Asserts that a batch is given up once its messages are visible to others.
fn is_given_up(extensions: Extensions) {
    let mut held = Held::with(extensions);
    let began = held.clock.now();
    let releases = held.world().counts["message released"];
    held.step_until(|held| held.ended.lock().unwrap().is_some());
    assert!(matches!(held.ended.lock().unwrap().take(), Some(Ok(()))), "others do the work");
    let took = held.clock.now().saturating_sub(began);
    assert!(took < VISIBILITY * 2, "{took:?}");
    let world = held.world();
    assert!(world.is_any_visible(), "not before others get it");
    assert_eq!(world.counts["message released"], releases, "it may be in others' hands");
    assert_eq!((world.tries("1"), world.dead.len()), (0, 0), "the try was cut off by us");
}

#[test]
fn a_batch_is_given_up_when_its_visibility_cannot_be_extended() {
    is_given_up(Extensions::Fail);
}

#[test]
fn a_batch_is_given_up_when_an_extension_is_never_answered() {
    is_given_up(Extensions::Hang);
}

#[test]
fn a_batch_is_held_when_an_extension_works_before_the_deadline() {
    let mut held = Held::with(Extensions::Fail);
    let began = held.clock.now();
    let until = |at: Duration| move |held: &Held| held.clock.now() >= began + at;
    held.step_until(until(VISIBILITY / 2));
    held.world().extensions = Extensions::Work;
    held.step_until(|held| {
        assert!(!held.world().is_any_visible(), "after {:?}", held.clock.now().saturating_sub(began));
        assert!(held.ended.lock().unwrap().is_none());
        held.clock.now() >= began + VISIBILITY * 4
    });
}
