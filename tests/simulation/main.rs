//! The real loops of relay and indexer over a simulated world, in an order that a seed decides.
//!
//! Each schedule runs some processes against one world: they are killed, frozen past every timeout
//! and started again; the database loses calls and answers, and is restored to an earlier state; the
//! queue repeats, delays and reorders; the index answers 429 and 5xx, does what it says it has not, and
//! does it late. Then faults end, and once everything is quiet the index must equal the table. A rule of
//! the protocol that is left out must show: each such plant has a test that fails when nothing diverges.
//!
//! `REFARCH_SCHEDULES` sets how many schedules are run, and `REFARCH_FIRST_SEED` the seed of the first; the same seeds
//! always give the same ones.

#[path = "../contract/ledger.rs"]
mod contract;
mod executor;
mod ledger;
mod receiver;
mod split;
#[path = "../contract/transactional_index.rs"]
mod transactional_contract;
mod transactional_index;
mod visibility;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use executor::{Executor, SimClock};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use refarch::pipeline::change::Lane;
use refarch::pipeline::clock::Clock;
use refarch::pipeline::embed_scheduler::EmbedScheduler;
use refarch::pipeline::indexer::{self, Indexer, Receiver};
use refarch::pipeline::lease::Lease;
use refarch::pipeline::queue::Queue;
use refarch::pipeline::relay::{self, Relay};
use tokio_util::sync::CancellationToken;
use world::{FAILING, IndexKind, LEASE, ProtocolMutation, REFUSED, RowText, SETTLE, View, World};

/// Schedules of one test, unless the environment says otherwise.
const SCHEDULES: u64 = 3_000;

/// Schedules within which a planted bug must show.
const MUTATION_FOUND_WITHIN: u64 = 40_000;

/// So many schedules may pass without some kind of fault.
const FEW: u64 = 100;

/// Polls after which a schedule that is not quiet never will be.
const MAX_STEPS: u32 = 60_000;

/// Processes that index, and one that relays.
const RELAY: usize = 100;

/// What is in the table that must not be indexed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Poison {
    None,
    /// A row that the index refuses for good.
    Refused,
    /// A row that fails each time.
    Failing,
}

struct Schedule {
    seed: u64,
    kind: IndexKind,
    mutation: Option<ProtocolMutation>,
    poison: Poison,
}

/// How a schedule ended, if not well.
type Divergence = String;

struct Run {
    rng: SmallRng,
    executor: Executor,
    world: Arc<Mutex<World>>,
    clock: Arc<SimClock>,
    /// Name of the worker that each process runs now.
    workers: BTreeMap<usize, String>,
    incarnation: u64,
    ids: Vec<String>,
}

impl Run {
    fn new(schedule: &Schedule) -> Self {
        let mut rng = SmallRng::seed_from_u64(schedule.seed);
        let clock = Arc::new(SimClock::new(rng.random()));
        let world_rng = SmallRng::seed_from_u64(rng.random());
        let world = World::new(world_rng, Arc::clone(&clock), schedule.kind, schedule.mutation);
        let count = rng.random_range(1..5);
        Self {
            executor: Executor::new(Arc::clone(&clock)),
            world: Arc::new(Mutex::new(world)),
            clock,
            workers: BTreeMap::new(),
            incarnation: 0,
            ids: (0..count).map(|id| format!("{id}")).collect(),
            rng,
        }
    }

    fn view(&self, worker: &str) -> View {
        View { world: Arc::clone(&self.world), worker: worker.to_owned() }
    }

    fn start_relay(&mut self) {
        let view = self.view("relay");
        let options = relay::RelayOptions {
            source: "products".into(),
            changes_per_message: 3,
            bulk_threshold: 100,
            live_bound: 1_000,
            poll: Duration::from_secs(1),
            start_timeout: START_TIMEOUT,
        };
        let outbox = Box::new(view.clone());
        let mut relay = Relay::new(outbox, Arc::new(view), Arc::clone(&self.clock) as _, options);
        self.executor.spawn(RELAY, async move {
            let _ = relay.run(&CancellationToken::new(), false).await;
        });
    }

    fn start_worker(&mut self, process: usize) {
        self.incarnation += 1;
        let worker = format!("w{process}.{}", self.incarnation);
        self.workers.insert(process, worker.clone());
        let view = Arc::new(self.view(&worker));
        let clock: Arc<dyn Clock> = Arc::clone(&self.clock) as _;
        let (indexer, lease) = indexer(&view, &self.clock);
        for lane in Lane::ALL {
            let spawner = Arc::new(self.executor.spawner(process));
            let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
            let receiver = Receiver::new(Arc::clone(&indexer), lane, spawner, stop, abort, false);
            let world = Arc::clone(&self.world);
            self.executor.spawn(process, async move {
                let ended = receiver.run().await;
                world.lock().unwrap().broken = Some(format!("a receive loop ended: {ended:?}"));
            });
        }
        let embedding = Arc::clone(&indexer);
        self.executor.spawn(process, async move { embedding.embed_slices().await.unwrap() });
        let sweeping = clock.clone();
        self.executor.spawn(process, async move {
            loop {
                sweeping.sleep(Duration::from_secs(5)).await;
                let _ = indexer.sweep().await;
            }
        });
        self.executor.spawn(process, async move {
            loop {
                let at = clock.now();
                executor::turn().await;
                {
                    let mut world = view.world.lock().unwrap();
                    if world.worker_locks.insert(worker.clone()) {
                        lease.begin(at);
                    } else {
                        lease.confirm(at);
                    }
                }
                clock.sleep(LEASE / 4).await;
            }
        });
    }

    /// Something goes wrong, or somebody writes.
    fn inject_event(&mut self, poison: Poison) {
        let process = self.rng.random_range(0..3_usize);
        match self.rng.random_range(0..24) {
            0..12 => {
                let id = self.ids[self.rng.random_range(0..self.ids.len())].clone();
                let row = self.rng.random_ratio(3, 4).then(|| self.text(poison));
                self.world.lock().unwrap().write(&id, row);
            }
            12 if self.rng.random_ratio(1, 2) => self.world.lock().unwrap().truncate(),
            13..16 => self.world.lock().unwrap().inject_queue_fault(),
            16 | 17 if self.workers.contains_key(&process) => {
                let worker = self.workers[&process].clone();
                let mut world = self.world.lock().unwrap();
                if world.must_survive(&worker) {
                    return;
                }
                world.worker_locks.remove(&worker);
                world.count("worker killed");
                drop(world);
                self.executor.kill(process);
                self.start_worker(process);
            }
            18 => {
                let long = self.rng.random_range(1..60_000);
                self.executor.freeze(process, self.clock.now() + Duration::from_millis(long));
                self.world.lock().unwrap().count("worker frozen");
            }
            19 => {
                // Its session is lost, and the process does not notice.
                let Some(worker) = self.workers.get(&process).cloned() else { return };
                let long = self.rng.random_range(15_000..60_000);
                self.executor.freeze(process, self.clock.now() + Duration::from_millis(long));
                let mut world = self.world.lock().unwrap();
                world.worker_locks.remove(&worker);
                world.count("worker cut off");
            }
            20 => {
                // A restart of the database: every session is gone, also the sessions of frozen processes.
                let mut world = self.world.lock().unwrap();
                world.worker_locks.clear();
                world.count("every session lost");
            }
            21 => {
                self.executor.kill(RELAY);
                self.start_relay();
                self.world.lock().unwrap().count("relay killed");
            }
            22 => self.world.lock().unwrap().back_up(),
            23 => self.world.lock().unwrap().restore(),
            _ => {}
        }
    }

    fn text(&mut self, poison: Poison) -> RowText {
        let metadata = format!("m{}", self.rng.random_range(0..2));
        let text = match self.rng.random_range(0..8) {
            // A row without a text has no record.
            0 => String::new(),
            1 if poison == Poison::Refused => REFUSED.into(),
            1 if poison == Poison::Failing => FAILING.into(),
            // Few of them, so that content comes back.
            _ => format!("t{}", self.rng.random_range(0..3)),
        };
        RowText { text, metadata }
    }
}

/// The real indexer over one process's view of the world, and its lease.
fn indexer(view: &View, clock: &Arc<SimClock>) -> (Arc<Indexer>, Arc<Lease>) {
    let (indexer, lease) = build_indexer(view, clock);
    (Arc::new(indexer), lease)
}

/// How long a worker waits at its start for what is missing.
const START_TIMEOUT: Duration = Duration::from_secs(10);

fn build_indexer(view: &View, clock: &Arc<SimClock>) -> (Indexer, Arc<Lease>) {
    let worker = view.worker.clone();
    let view = Arc::new(view.clone());
    let clock: Arc<dyn Clock> = Arc::clone(clock) as _;
    let lease = Arc::new(Lease::new(Arc::clone(&clock), LEASE));
    let indexer = Indexer::new(
        Queue::new(Arc::clone(&view)),
        view.clone() as _,
        view as _,
        EmbedScheduler::new(Arc::new(world::InstantEmbedder), Duration::from_millis(50), clock),
        Arc::default(),
        Arc::clone(&lease),
        indexer::IndexerOptions {
            source: "products".into(),
            worker,
            workers: 1,
            prefetch: Duration::from_secs(1),
            poll: Duration::from_secs(2),
            // Chaos of this density would use up any number.
            max_receives: u32::MAX,
            settle: SETTLE,
            freshness_poll: Duration::from_secs(1),
            start_timeout: START_TIMEOUT,
        },
    );
    (indexer, lease)
}

/// Runs one schedule to its end.
fn run(schedule: &Schedule, totals: &Mutex<BTreeMap<&'static str, u64>>) -> Result<(), Divergence> {
    let mut run = Run::new(schedule);
    run.start_relay();
    for process in 0..run.rng.random_range(2..4) {
        run.start_worker(process);
    }
    let busy = run.rng.random_range(150..700);
    for _ in 0..busy {
        if run.rng.random_ratio(1, 12) {
            run.inject_event(schedule.poison);
        }
        step(&mut run);
    }
    run.executor.thaw_all();
    run.world.lock().unwrap().faults = false;
    let mut result = quiesce(&mut run, schedule);
    if result.is_ok() && schedule.poison != Poison::None {
        result = repair(&mut run, schedule);
    }
    let mut totals = totals.lock().unwrap();
    for (what, count) in &run.world.lock().unwrap().counts {
        *totals.entry(what).or_default() += count;
    }
    result
}

fn step(run: &mut Run) {
    let mut rng = SmallRng::seed_from_u64(run.rng.random());
    run.executor.step(&mut rng);
    run.world.lock().unwrap().pass_time();
}

fn quiesce(run: &mut Run, schedule: &Schedule) -> Result<(), Divergence> {
    for _ in 0..MAX_STEPS {
        step(run);
        if run.world.lock().unwrap().is_quiet() {
            return compare(&run.world.lock().unwrap(), schedule.poison);
        }
    }
    Err(format!("never quiet: {}", run.world.lock().unwrap().leftovers()))
}

/// Mends the poisoned rows, brings the dead letters back, and lets them through.
fn repair(run: &mut Run, schedule: &Schedule) -> Result<(), Divergence> {
    repair_rows(run);
    // Somebody who had read a row before it was mended may give it up once more.
    for _ in 0..5 {
        run.world.lock().unwrap().redrive();
        quiesce(run, schedule)?;
        if run.world.lock().unwrap().dead.is_empty() {
            return Ok(());
        }
    }
    Err("dead letters after mending".into())
}

fn repair_rows(run: &mut Run) {
    let mut world = run.world.lock().unwrap();
    let poisoned: Vec<String> = world
        .rows
        .iter()
        .filter(|(_, row)| row.text == REFUSED || row.text == FAILING)
        .map(|(id, _)| id.clone())
        .collect();
    for id in poisoned {
        // As if the index accepted the rows from now on: no change is captured.
        let row = RowText { text: "mended".into(), metadata: String::new() };
        world.rows.insert(id, row);
    }
}

/// The property: the index equals the table, but for what stands in the dead letters.
fn compare(world: &World, poison: Poison) -> Result<(), Divergence> {
    if let Some(broken) = &world.broken {
        return Err(broken.clone());
    }
    let dead: BTreeSet<&String> =
        world.dead.iter().flat_map(|(job, _)| &job.groups).flat_map(|group| &group.ids).collect();
    let ids: BTreeSet<&String> = world.rows.keys().chain(world.index.keys()).collect();
    for id in ids {
        let row = world.rows.get(id).filter(|row| !row.text.is_empty());
        let wanted = row.map(|row| {
            let source = world::source_row(id, row);
            (source.content_hash, source.metadata_hash, world::vector_of(&row.text))
        });
        let held = world.index.get(id).map(|c| (c.text, c.metadata, c.vector));
        if wanted != held && !dead.contains(id) {
            return Err(format!(
                "id {id}: the row is {row:?} and the index holds {held:?}; {}",
                world.leftovers()
            ));
        }
    }
    // An outage is not poison. But a change whose workers die four times in a row looks like poison.
    let killed = world.counts.get("worker killed").copied().unwrap_or_default();
    if poison == Poison::None && !world.dead.is_empty() && killed < 4 {
        return Err(format!("dead letters without poison: {:?}", world.dead));
    }
    Ok(())
}

/// Runs schedules on every core; the divergences, and what was done to the world.
fn run_all(
    count: u64,
    make: impl Fn(u64) -> Schedule + Sync,
    stop_at_first: bool,
) -> (Vec<(u64, Divergence)>, BTreeMap<&'static str, u64>) {
    let totals = Mutex::new(BTreeMap::new());
    let found = Mutex::new(Vec::new());
    let next = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= count || (stop_at_first && !found.lock().unwrap().is_empty()) {
                        return;
                    }
                    if let Err(divergence) = run(&make(seed), &totals) {
                        found.lock().unwrap().push((seed, divergence));
                    }
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap();
    found.sort();
    (found, totals.into_inner().unwrap())
}

/// The first seed, to look at some schedules again.
fn first_seed() -> u64 {
    std::env::var("REFARCH_FIRST_SEED").map_or(0, |seed| seed.parse().expect("a number"))
}

fn schedules() -> u64 {
    std::env::var("REFARCH_SCHEDULES").map_or(SCHEDULES, |count| count.parse().expect("a number"))
}

fn converges(name: &str, kind: IndexKind, poison: Poison) {
    let count = schedules();
    let started = Instant::now();
    let first = first_seed();
    let make = |at| Schedule { seed: first + at, kind, mutation: None, poison };
    let (found, totals) = run_all(count, make, false);
    println!("{name}: {count} schedules in {:.1} s", started.elapsed().as_secs_f64());
    for (what, count) in &totals {
        println!("  {count:>10}  {what}");
    }
    for (seed, divergence) in found.iter().take(20) {
        println!("  schedule {}: {divergence}", first + seed);
    }
    if let Some((at, divergence)) = found.first() {
        let seed = first + at;
        // One thread alone runs all tests, and is not named for one.
        let thread = std::thread::current();
        let test = thread.name().filter(|name| *name != "main").unwrap_or_default();
        panic!(
            "{} of {count} diverged, such as {seed}: {divergence}\nthis one again: \
             REFARCH_FIRST_SEED={seed} REFARCH_SCHEDULES=1 scripts/test simulation {test} -- --nocapture",
            found.len()
        );
    }
    // A world in which nothing goes wrong has shown nothing. In a few schedules not everything does.
    if count < FEW {
        return;
    }
    for what in ["worker killed", "worker frozen", "duplicated message", "database commit told as failed"] {
        assert!(totals.contains_key(what), "no {what}");
    }
}

#[test]
fn an_index_with_tracked_writes_converges() {
    converges("external index", IndexKind::External, Poison::None);
}

#[test]
fn a_transactional_index_converges() {
    converges("transactional index", IndexKind::Transactional, Poison::None);
}

#[test]
fn refused_changes_are_dead_lettered_and_converge_after_repair_and_redrive() {
    converges("external index, refused rows", IndexKind::External, Poison::Refused);
    converges("transactional index, refused rows", IndexKind::Transactional, Poison::Refused);
}

#[test]
fn failing_changes_are_dead_lettered_and_converge_after_repair_and_redrive() {
    converges("external index, failing rows", IndexKind::External, Poison::Failing);
}

fn diverges(mutation: ProtocolMutation, kind: IndexKind) {
    let make = |seed| Schedule { seed, kind, mutation: Some(mutation), poison: Poison::None };
    let (found, _) = run_all(MUTATION_FOUND_WITHIN, make, true);
    let Some((seed, divergence)) = found.first() else {
        panic!("{mutation:?} was not noticed in {MUTATION_FOUND_WITHIN} schedules");
    };
    println!("{mutation:?}: schedule {seed}: {}", divergence.split(';').next().unwrap_or_default());
}

macro_rules! mutations {
    ($($name:ident: $mutation:ident, $kind:ident;)*) => {$(
        #[test]
        fn $name() {
            diverges(ProtocolMutation::$mutation, IndexKind::$kind);
        }
    )*};
}

mutations! {
    the_index_diverges_without_the_overlap_rule: NoOverlapRule, External;
    the_index_diverges_if_a_doubtful_write_is_closed_as_clean: CleanCloseAfterDoubt, External;
    the_index_diverges_if_a_sweep_skips_the_settling_time: SweepWithoutSettling, External;
    the_index_diverges_if_open_entries_are_skipped: SkipWhileOpen, External;
    the_index_diverges_if_rows_are_read_before_the_open: ReadBeforeOpen, External;
    the_index_diverges_if_dirty_entries_are_skipped_by_hash: HashSkipWhileDirty, External;
    the_index_diverges_if_upserts_only_compare_versions: ConditionalUpsertAfterDelete, Transactional;
    the_index_diverges_if_messages_are_acknowledged_before_the_close: AcknowledgeBeforeClose, External;
    the_index_diverges_if_messages_are_acknowledged_before_the_write: AcknowledgeBeforeClose, Transactional;
    the_index_diverges_if_a_truncation_omits_open_entries: TruncateSkipsWhatIsOpen, External;
    the_world_is_never_quiet_if_a_lost_open_is_not_abandoned: LostOpeningStands, External;
    the_index_diverges_if_a_swept_write_is_not_put_back: SweptAttemptNotPutBack, External;
    the_index_diverges_if_a_repeated_close_takes_every_id: RepeatedClosingTakesAll, External;
    the_index_diverges_if_a_restore_skips_the_settling_time: RestoreWithoutSettling, External;
}
