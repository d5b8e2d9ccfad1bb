//! The model: rows flow as a fluid through table, outbox, queue and workers into the index.
//!
//! Between two events all rates are constant, so each amount is a straight line and the model computes it exactly: no
//! step width, no error of integration. Events are: an amount runs empty or full, a worker is ready, scaling looks.

use std::collections::VecDeque;
use std::time::Duration;

use super::amounts::Amounts;
use super::scenario::{LIVE_SHARE, Scenario, Stage};
use super::timeline::{Decided, Point, Timeline};
use crate::pipeline::scaling::{Observation, Scaler};

/// How often scaling looks, unless the run is so long that this would be too often.
const LOOK_EVERY: f64 = 1.0;

/// Looks in the shortest time that the run can take, and in the longest.
const LOOKS: f64 = 10_000.0;
const MAX_LOOKS: f64 = 200_000.0;

/// A run that takes this much longer than with all workers from the start has no end.
const PATIENCE: f64 = 20.0;

/// Rows that count as none.
const NONE: f64 = 1e-6;

/// The rates until the next event.
#[derive(Clone, Copy, Debug)]
struct Flow {
    load: f64,
    relay_bulk: f64,
    relay_live: f64,
    /// Of the relayed edits, those to the bulk lane.
    spill: f64,
    served_bulk: f64,
    served_live: f64,
    limit: Stage,
}

/// Runs a scenario until every row of the load is searchable, or until it is clear that this never happens.
pub(super) fn simulate(scenario: &Scenario) -> Timeline {
    Run::new(scenario).run()
}

struct Run<'a> {
    scenario: &'a Scenario,
    at: f64,
    amounts: Amounts,
    /// Workers that work.
    ready: u32,
    /// When workers will be ready, and how many.
    starting: VecDeque<(f64, u32)>,
    scaler: Scaler,
    next_look: f64,
    look_every: f64,
    give_up: f64,
    timeline: Timeline,
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario) -> Self {
        let most = scenario.scaling.most as f64;
        let slowest = scenario.ceilings(most).iter().map(|(_, rate)| *rate).fold(f64::INFINITY, f64::min);
        let shortest = scenario.records / slowest.min(scenario.load_rate).min(scenario.relay_bulk(0.0));
        let with_least = scenario.records / (scenario.scaling.least as f64 * scenario.worker_rate);
        let give_up = PATIENCE * (shortest + scenario.startup + LOOK_EVERY) + with_least;
        let look_every = LOOK_EVERY.max(shortest / LOOKS).max(give_up / MAX_LOOKS);
        Self {
            scenario,
            at: 0.0,
            amounts: Amounts { unwritten: scenario.records, ..Amounts::default() },
            ready: scenario.scaling.least as u32,
            starting: VecDeque::new(),
            scaler: Scaler::new(scenario.scaling),
            next_look: look_every,
            look_every,
            give_up,
            timeline: Timeline::default(),
        }
    }

    fn run(mut self) -> Timeline {
        loop {
            let flow = self.flow();
            self.timeline.points.push(self.point(&flow));
            if self.is_done() {
                self.timeline.drained = Some(self.at);
                break;
            }
            if self.at >= self.give_up {
                break;
            }
            let step = self.until_next_event(&flow);
            self.advance(&flow, step);
            self.start_ready();
            if self.at >= self.next_look {
                self.next_look = self.at + self.look_every;
                self.look();
            }
        }
        self.timeline
    }

    /// Whether the load is in the index. Edits that come after it are not waited for.
    fn is_done(&self) -> bool {
        let Amounts { unwritten, outbox_bulk, queue_bulk, .. } = self.amounts;
        unwritten + outbox_bulk + queue_bulk <= NONE
    }

    /// The rates that follow from the amounts.
    fn flow(&self) -> Flow {
        let Amounts { unwritten, outbox_bulk, outbox_live, queue_bulk, queue_live, .. } = self.amounts;
        let scenario = self.scenario;
        let workers = f64::from(self.ready);
        let load = if unwritten > 0.0 { scenario.load_rate } else { 0.0 };

        let relay_live = served(outbox_live, scenario.edits, scenario.relay_edits(outbox_bulk > 0.0));
        let relay_bulk = served(outbox_bulk, load, scenario.relay_bulk(relay_live));

        let all = scenario.ceilings(workers);
        let (mut limit, capacity) =
            all.into_iter().fold((Stage::None, f64::INFINITY), |a, b| if b.1 < a.1 { b } else { a });
        let is_full = queue_live >= scenario.live_bound;
        let has_bulk = queue_bulk > 0.0;
        let live_capacity = if has_bulk { capacity * LIVE_SHARE } else { capacity };
        let served_live = served(queue_live, relay_live, live_capacity);
        let spill = if is_full { (relay_live - served_live).max(0.0) } else { 0.0 };
        let mut bulk_capacity = (capacity - served_live).max(0.0);
        if let Some(by_requests) = scenario.request_ceiling(served_live)
            && by_requests < bulk_capacity
        {
            (limit, bulk_capacity) = (Stage::IndexRequests, by_requests);
        }
        let served_bulk = served(queue_bulk, relay_bulk + spill, bulk_capacity);
        // Something waits, or begins to.
        let queue_grows = relay_bulk + relay_live > served_bulk + served_live;
        let outbox_grows = load + scenario.edits > relay_bulk + relay_live;
        let limit = if queue_bulk > 0.0 || queue_live > 0.0 || queue_grows {
            limit
        } else if outbox_bulk > 0.0 || outbox_live > 0.0 || outbox_grows {
            Stage::Relay
        } else if unwritten > 0.0 {
            Stage::Load
        } else {
            Stage::None
        };
        Flow { load, relay_bulk, relay_live, spill, served_bulk, served_live, limit }
    }

    /// How long the rates stay as they are.
    fn until_next_event(&self, flow: &Flow) -> f64 {
        let amounts = &self.amounts;
        let mut step = (self.next_look - self.at).max(0.0);
        if let Some((ready_at, _)) = self.starting.front() {
            step = step.min((ready_at - self.at).max(0.0));
        }
        let live_in = flow.relay_live - flow.spill;
        for (amount, change) in [
            (amounts.unwritten, -flow.load),
            (amounts.outbox_bulk, flow.load - flow.relay_bulk),
            (amounts.outbox_live, self.scenario.edits - flow.relay_live),
            (amounts.queue_bulk, flow.relay_bulk + flow.spill - flow.served_bulk),
            (amounts.queue_live, live_in - flow.served_live),
        ] {
            if change < 0.0 && amount > 0.0 {
                step = step.min(amount / -change);
            }
        }
        let live_change = live_in - flow.served_live;
        if live_change > 0.0 && amounts.queue_live < self.scenario.live_bound {
            step = step.min((self.scenario.live_bound - amounts.queue_live) / live_change);
        }
        step
    }

    fn advance(&mut self, flow: &Flow, step: f64) {
        let amounts = &mut self.amounts;
        let billed = self.ready + self.starting.iter().map(|(_, count)| count).sum::<u32>();
        self.timeline.worker_seconds += f64::from(billed) * step;
        self.at += step;
        let live_in = flow.relay_live - flow.spill;
        put(&mut amounts.unwritten, -flow.load * step);
        put(&mut amounts.outbox_bulk, (flow.load - flow.relay_bulk) * step);
        put(&mut amounts.outbox_live, (self.scenario.edits - flow.relay_live) * step);
        put(&mut amounts.queue_bulk, (flow.relay_bulk + flow.spill - flow.served_bulk) * step);
        put(&mut amounts.queue_live, (live_in - flow.served_live) * step);
        if self.scenario.live_bound - amounts.queue_live <= NONE {
            amounts.queue_live = self.scenario.live_bound;
        }
        amounts.relayed_edits += flow.relay_live * step;
        amounts.spilled += flow.spill * step;
        amounts.done_bulk += flow.served_bulk * step;
        amounts.done_live += flow.served_live * step;
    }

    /// Lets workers work whose start is over.
    fn start_ready(&mut self) {
        while let Some((ready_at, count)) = self.starting.front().copied()
            && ready_at <= self.at
        {
            self.starting.pop_front();
            self.ready += count;
        }
    }

    /// Asks the scaler, and adds or removes workers.
    fn look(&mut self) {
        let workers = self.ready + self.starting.iter().map(|(_, count)| count).sum::<u32>();
        let observed = self.observe();
        let at = Duration::from_secs_f64(self.at);
        let decision = self.scaler.decide(at, workers as usize, Some(&observed));
        if !decision.is_change() {
            return;
        }
        let to = decision.desired as u32;
        self.timeline.decisions.push(Decided { at: self.at, decision });
        if to > workers {
            self.starting.push_back((self.at + self.scenario.startup, to - workers));
            self.start_ready();
            return;
        }
        // Those that have not begun go first.
        let mut surplus = workers - to;
        while surplus > 0
            && let Some((_, count)) = self.starting.back_mut()
        {
            let taken = surplus.min(*count);
            *count -= taken;
            surplus -= taken;
            if *count == 0 {
                self.starting.pop_back();
            }
        }
        self.ready -= surplus;
    }

    /// What scaling sees.
    fn observe(&self) -> Observation {
        let Amounts { outbox_bulk, outbox_live, queue_bulk, queue_live, done_bulk, done_live, .. } =
            self.amounts;
        let queued = queue_bulk + queue_live;
        let held = self.scenario.worker_rate * self.scenario.hold;
        let in_flight = queued.min(f64::from(self.ready) * held);
        Observation {
            pending: (outbox_bulk + outbox_live).round() as u64,
            queued: (queued - in_flight).round() as u64,
            in_flight: in_flight.round() as u64,
            applied: (done_bulk + done_live).round() as u64,
            ready: self.ready as usize,
            // Messages go to whoever asks first.
            holding: (in_flight / held.max(NONE)).ceil() as usize,
            saturated: queued > in_flight,
            cpu: None,
        }
    }

    fn point(&self, flow: &Flow) -> Point {
        Point {
            at: self.at,
            workers: self.ready,
            starting: self.starting.iter().map(|(_, count)| count).sum(),
            amounts: self.amounts,
            rate: flow.served_bulk + flow.served_live,
            live_rate: flow.served_live,
            limit: flow.limit,
        }
    }
}

/// What leaves a place: all that it can while something waits there, else what comes in as far as it can.
fn served(waiting: f64, coming: f64, capacity: f64) -> f64 {
    if waiting > 0.0 { capacity } else { coming.min(capacity) }
}

/// Changes an amount. What is left of rounding is none.
fn put(amount: &mut f64, change: f64) {
    *amount += change;
    if *amount <= NONE {
        *amount = 0.0;
    }
}
