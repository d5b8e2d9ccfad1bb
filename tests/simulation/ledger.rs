//! The world's ledger keeps the contract that the database's keeps: what the simulation shows of one
//! holds for the other.

use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::Duration;

use async_trait::async_trait;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use refarch::pipeline::clock::Clock as _;

use crate::contract::{self, Fixture};
use crate::executor::SimClock;
use crate::world::{IndexKind, RowText, SETTLE, View, World};

#[async_trait(?Send)]
impl Fixture for View {
    async fn write(&self, id: u32, text: Option<&str>) {
        let row = text.map(|text| RowText { text: text.into(), metadata: String::new() });
        self.world.lock().unwrap().write(&id.to_string(), row);
    }

    async fn take(&self) -> Vec<String> {
        self.world.lock().unwrap().take_outbox()
    }

    async fn set_alive(&self, worker: &str, alive: bool) {
        let worker_locks = &mut self.world.lock().unwrap().worker_locks;
        if alive {
            worker_locks.insert(worker.to_owned());
        } else {
            worker_locks.remove(worker);
        }
    }

    fn settle(&self) -> Duration {
        SETTLE
    }

    async fn pass(&self, time: Duration) {
        let clock = Arc::clone(&self.world.lock().unwrap().clock);
        clock.advance_to(clock.now() + time);
    }

    fn impossible(&self) -> &'static str {
        "no number"
    }
}

/// A world in which nothing goes wrong.
pub fn quiet(kind: IndexKind) -> View {
    let clock = Arc::new(SimClock::new(0));
    let mut world = World::new(SmallRng::seed_from_u64(0), clock, kind, None);
    world.faults = false;
    View { world: Arc::new(Mutex::new(world)), worker: "w".into() }
}

/// Polls until the future is ready: no future here waits for anything but its turn.
pub fn block_on(future: impl Future<Output = ()>) {
    let mut future = std::pin::pin!(future);
    while future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {}
}

macro_rules! on_the_simulations_ledger {
    ($($clause:ident),* $(,)?) => {$(
        #[test]
        fn $clause() {
            let view = quiet(IndexKind::External);
            block_on(contract::$clause(&view, &view));
        }
    )*};
}

contract::for_each_clause!(on_the_simulations_ledger);
