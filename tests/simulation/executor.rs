//! Runs tasks one poll at a time, in an order that a seed decides, with a clock of its own.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use async_trait::async_trait;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use refarch::pipeline::clock::Clock;
use refarch::pipeline::failure::{Error, FailureKind};
use refarch::pipeline::indexer::{Spawn, Task as Batch};
use tokio::sync::oneshot;

/// A process, whose tasks freeze and die together.
pub type Process = usize;

struct Ready(AtomicBool);

impl Wake for Ready {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Task {
    process: Process,
    ready: Arc<Ready>,
    waker: Waker,
    future: Pin<Box<dyn Future<Output = ()>>>,
}

/// Tasks that tasks have started, with the process that they belong to.
type Spawned = Arc<Mutex<Vec<(Process, Pin<Box<dyn Future<Output = ()> + Send>>)>>>;

/// Starts tasks of one process, for its other tasks.
pub struct Spawner {
    process: Process,
    spawned: Spawned,
}

impl Spawn for Spawner {
    fn spawn(&self, task: Batch) -> Batch {
        let (done, result) = oneshot::channel();
        let task = async move {
            let _ = done.send(task.await);
        };
        self.spawned.lock().unwrap().push((self.process, Box::pin(task)));
        Box::pin(async move {
            result.await.unwrap_or_else(|_| {
                Err(Error::new(FailureKind::ProcessBroken, "simulated task", "it was dropped"))
            })
        })
    }
}

/// Tasks, and which of them can run.
pub struct Executor {
    tasks: Vec<Task>,
    spawned: Spawned,
    frozen: Vec<(Process, Duration)>,
    pub clock: Arc<SimClock>,
    runnable: Vec<usize>,
}

impl Executor {
    pub fn new(clock: Arc<SimClock>) -> Self {
        Self {
            tasks: Vec::new(),
            spawned: Spawned::default(),
            frozen: Vec::new(),
            clock,
            runnable: Vec::new(),
        }
    }

    /// What starts tasks of a process from within.
    pub fn spawner(&self, process: Process) -> Spawner {
        Spawner { process, spawned: Arc::clone(&self.spawned) }
    }

    fn adopt_spawned(&mut self) {
        let spawned = std::mem::take(&mut *self.spawned.lock().unwrap());
        for (process, task) in spawned {
            self.spawn(process, task);
        }
    }

    pub fn spawn(&mut self, process: Process, future: impl Future<Output = ()> + 'static) {
        let ready = Arc::new(Ready(AtomicBool::new(true)));
        let waker = Waker::from(Arc::clone(&ready));
        self.tasks.push(Task { process, ready, waker, future: Box::pin(future) });
    }

    /// Drops a process's tasks where they stand.
    pub fn kill(&mut self, process: Process) {
        self.adopt_spawned();
        self.tasks.retain(|task| task.process != process);
        self.frozen.retain(|(frozen, _)| *frozen != process);
    }

    /// Polls none of a process's tasks until then.
    pub fn freeze(&mut self, process: Process, until: Duration) {
        self.frozen.push((process, until));
    }

    pub fn thaw_all(&mut self) {
        self.frozen.clear();
    }

    /// Polls one task, or lets time pass to where one can go on. Returns false when none ever will.
    pub fn step(&mut self, rng: &mut SmallRng) -> bool {
        self.adopt_spawned();
        let now = self.clock.now();
        self.frozen.retain(|(_, until)| *until > now);
        self.clock.fire();
        self.runnable.clear();
        for (at, task) in self.tasks.iter().enumerate() {
            if task.ready.0.load(Ordering::Relaxed) && !self.is_frozen(task.process) {
                self.runnable.push(at);
            }
        }
        if self.runnable.is_empty() {
            let thaw = self.frozen.iter().map(|(_, until)| *until).min();
            let Some(next) = [self.clock.next_timer(), thaw].into_iter().flatten().min() else {
                return false;
            };
            self.clock.advance_to(next.max(now + Duration::from_micros(1)));
            return true;
        }
        let at = self.runnable[rng.random_range(0..self.runnable.len())];
        let task = &mut self.tasks[at];
        task.ready.0.store(false, Ordering::Relaxed);
        let mut context = Context::from_waker(&task.waker);
        if task.future.as_mut().poll(&mut context).is_ready() {
            drop(self.tasks.swap_remove(at));
        }
        // A step takes a moment, sometimes a long one.
        let took =
            if rng.random_ratio(1, 64) { rng.random_range(0..2_000_000) } else { rng.random_range(0..3_000) };
        self.clock.advance_to(now + Duration::from_micros(took));
        true
    }

    fn is_frozen(&self, process: Process) -> bool {
        self.frozen.iter().any(|(frozen, _)| *frozen == process)
    }
}

/// Yields once.
pub async fn turn() {
    let mut given = false;
    std::future::poll_fn(|context| {
        if given {
            return Poll::Ready(());
        }
        given = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Time that passes when the executor says so.
pub struct SimClock {
    now_us: AtomicU64,
    timers: Mutex<Vec<(Duration, Waker)>>,
    chance: Mutex<SmallRng>,
}

impl SimClock {
    pub fn new(seed: u64) -> Self {
        Self {
            // An hour, so that nothing is mistaken for never.
            now_us: AtomicU64::new(3_600_000_000),
            timers: Mutex::default(),
            chance: Mutex::new(SmallRng::seed_from_u64(seed)),
        }
    }

    pub fn advance_to(&self, to: Duration) {
        self.now_us.fetch_max(to.as_micros() as u64, Ordering::Relaxed);
    }

    fn next_timer(&self) -> Option<Duration> {
        self.timers.lock().unwrap().iter().map(|(at, _)| *at).min()
    }

    fn fire(&self) {
        let now = self.now();
        self.timers.lock().unwrap().retain(|(at, waker)| {
            if *at <= now {
                waker.wake_by_ref();
            }
            *at > now
        });
    }
}

#[async_trait]
impl Clock for SimClock {
    fn now(&self) -> Duration {
        Duration::from_micros(self.now_us.load(Ordering::Relaxed))
    }

    fn chance(&self) -> f64 {
        self.chance.lock().unwrap().random()
    }

    async fn sleep(&self, duration: Duration) {
        let until = self.now() + duration;
        std::future::poll_fn(|context| {
            if self.now() >= until {
                return Poll::Ready(());
            }
            self.timers.lock().unwrap().push((until, context.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}
