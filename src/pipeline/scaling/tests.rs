//! Properties of the scaler, and a world of workers that it scales.

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Workers, what arrives, and what they have done; a step is a second.
struct World {
    scaler: Scaler,
    random: StdRng,
    now: Duration,
    /// Ready workers, and when those that are starting will be ready.
    ready: usize,
    starting: Vec<Duration>,
    start_up: Duration,
    /// Changes a second of one worker, and of all together at most.
    rate: f64,
    limit: f64,
    /// Changes that wait, in fractions of a change.
    waiting: f64,
    applied: f64,
    decisions: Vec<(Duration, Decision)>,
}

impl World {
    fn new(seed: u64, policy: Policy, rate: f64) -> Self {
        Self {
            ready: policy.least,
            scaler: Scaler::new(policy),
            random: StdRng::seed_from_u64(seed),
            now: Duration::ZERO,
            starting: Vec::new(),
            start_up: Duration::from_secs(5),
            rate,
            limit: f64::INFINITY,
            waiting: 0.0,
            applied: 0.0,
            decisions: Vec::new(),
        }
    }

    fn workers(&self) -> usize {
        self.ready + self.starting.len()
    }

    /// A second in which about so many changes arrive.
    fn step(&mut self, arriving: f64) -> Decision {
        self.now += SECOND;
        let now = self.now;
        self.ready += self.starting.extract_if(.., |at| *at <= now).count();
        let noise = self.random.random_range(0.9..1.1);
        self.waiting += arriving * self.random.random_range(0.8..1.2);
        let able = (self.rate * self.ready as f64).min(self.limit) * noise;
        let done = able.min(self.waiting);
        self.waiting -= done;
        self.applied += done;
        let held = self.waiting.min(able / 2.0);
        let busy = if able > 0.0 { done / able } else { 0.0 };
        let observation = Observation {
            pending: 0,
            queued: (self.waiting - held) as u64,
            in_flight: held as u64,
            applied: self.applied as u64,
            ready: self.ready,
            holding: (busy * self.ready as f64).round() as usize,
            saturated: self.waiting > held,
            cpu: Some(busy * 100.0),
        };
        let decision = self.scaler.decide(now, self.workers(), Some(&observation));
        if decision.is_change() {
            self.decisions.push((now, decision));
        }
        let workers = self.workers();
        if decision.desired > workers {
            self.starting.extend((workers..decision.desired).map(|_| now + self.start_up));
        } else {
            for _ in decision.desired..workers {
                if self.starting.pop().is_none() {
                    self.ready -= 1;
                }
            }
        }
        decision
    }

    fn run(&mut self, seconds: u32, arriving: f64) {
        for _ in 0..seconds {
            self.step(arriving);
        }
    }
}

#[test]
fn a_backlog_scales_out_and_its_end_scales_in() {
    let mut world = World::new(1, Policy { least: 1, growth: 8.0, ..Policy::default() }, 100.0);
    world.run(60, 20.0);
    assert_eq!(world.workers(), 1, "{:?}", world.decisions);
    world.waiting += 4_000.0;
    world.run(20, 20.0);
    let (_, out) = world.decisions[0];
    // 4,000 changes and what arrived while the speed was measured, less what was done: 3 to 5 workers.
    assert!((3..=5).contains(&out.desired), "{out}");
    let text = out.to_string();
    assert!(
        text.starts_with("backlog 3") && text.ends_with(&format!(" s > 10 s: 1 -> {}", out.desired)),
        "{text}"
    );
    world.run(300, 20.0);
    assert_eq!((world.workers(), world.waiting as u64), (1, 0), "{:?}", world.decisions);
    assert!(world.decisions.last().unwrap().1.to_string().contains(" s < 10 s: "));
}

#[test]
fn a_steady_load_makes_no_circle_of_out_and_in() {
    for metric in [Metric::Backlog, Metric::Cpu] {
        for seed in 0..60 {
            let policy = match metric {
                Metric::Backlog => Policy { least: 1, ..Policy::default() },
                Metric::Cpu => Policy { least: 1, ..Policy::reference_embed() },
            };
            let mut world = World::new(seed, policy, 100.0);
            world.start_up = Duration::from_secs(seed % 60);
            // 0 to 12 workers' worth.
            let load = world.random.random_range(0.0..1_200.0);
            world.run(1_200, load);
            let before = world.decisions.len();
            world.run(3_600, load);
            let steps: Vec<_> =
                world.decisions[before..].iter().map(|(_, step)| step.desired > step.current).collect();
            // A number at the border may move once, but not to and fro.
            assert!(steps.len() <= 2 && steps.is_sorted(), "{metric:?} {seed} {load}: {:?}", world.decisions);
            assert!(world.waiting < load * 30.0 + 1.0, "{seed}: {} wait", world.waiting);
        }
    }
}

#[test]
fn no_more_workers_are_added_than_the_backlog_asks_for_whatever_the_start_up_takes() {
    for seed in 0..300 {
        let mut world = World::new(seed, Policy { least: 1, most: 40, ..Policy::default() }, 50.0);
        world.start_up = Duration::from_secs(world.random.random_range(0..120));
        for _ in 0..20 {
            if world.random.random_bool(0.3) {
                world.waiting += world.random.random_range(0.0..20_000.0);
            }
            let load = world.random.random_range(0.0..1_000.0);
            for _ in 0..60 {
                let before = world.waiting + load * 1.2;
                let decision = world.step(load);
                if decision.desired > decision.current {
                    // The measured speed is off by a tenth at most.
                    let asked = before / (0.9 * 50.0 * 10.0);
                    assert!(decision.desired as f64 <= asked.ceil(), "{seed}: {decision}, {before} wait");
                }
            }
        }
    }
}

#[test]
fn workers_that_make_nothing_faster_are_the_last_ones() {
    let policy = Policy { least: 1, most: 16, growth: 2.0, ..Policy::default() };
    let mut world = World::new(3, policy, 100.0);
    // Two cores.
    world.limit = 200.0;
    world.waiting = 1e6;
    world.run(300, 0.0);
    assert_eq!(world.workers(), 4, "{:?}", world.decisions);
    assert!(matches!(world.step(0.0).reason, Reason::NoGain(_)));
    // Later it is tried again, since the machine may be free.
    world.limit = 1_000.0;
    world.run(900, 0.0);
    assert!(world.workers() >= 8, "{:?}", world.decisions);
}

#[test]
fn an_outage_adds_no_workers_and_takes_none() {
    let mut world = World::new(5, Policy { least: 1, ..Policy::default() }, 100.0);
    world.run(200, 250.0);
    let before = world.workers();
    assert!(before >= 3);
    world.rate = 0.0;
    world.run(30, 250.0);
    let at_first = world.workers();
    world.run(600, 250.0);
    assert_eq!(world.workers(), at_first, "{:?}", world.decisions);
    assert_eq!(world.step(250.0).reason, Reason::Stalled);
    assert!(at_first <= before * 3);
    world.rate = 100.0;
    world.run(600, 250.0);
    assert!(world.waiting < 2_000.0, "{}", world.waiting);
}

#[test]
fn what_cannot_be_observed_is_not_scaled_and_no_idleness() {
    let mut scaler = Scaler::new(Policy { least: 1, ..Policy::default() });
    let idle = Observation { ready: 4, ..Observation::default() };
    for second in 0..25 {
        assert!(!scaler.decide(SECOND * second, 4, Some(&idle)).is_change());
    }
    let blind = scaler.decide(SECOND * 25, 4, None);
    assert_eq!((blind.desired, blind.to_string().as_str()), (4, "the backlog is unknown: 4"));
    for second in 26..56 {
        let decision = scaler.decide(SECOND * second, 4, Some(&idle));
        assert!(!decision.is_change(), "at {second}: the cooldown begins anew: {decision}");
    }
    assert_eq!(scaler.decide(SECOND * 56, 4, Some(&idle)).desired, 1);
}

#[test]
fn the_reference_architectures_numbers() {
    let policy = Policy::reference_embed();
    assert_eq!((policy.metric, policy.least, policy.most), (Metric::Cpu, 2, 50));
    let mut scaler = Scaler::new(policy);
    let busy = Observation { ready: 2, holding: 2, in_flight: 9, cpu: Some(60.0), ..Observation::default() };
    let decision = scaler.decide(SECOND, 2, Some(&busy));
    assert_eq!(decision.to_string(), "CPU 60 % > 25 %: 2 -> 4");
    assert_eq!(Policy::reference_listen().most, 6);
}

#[test]
fn one_step_at_most_doubles_the_workers_unless_a_policy_says_otherwise() {
    let backlog = |growth| Policy { growth, ..Policy::backlog(10.0, 1, 1_000) };
    for (policy, first) in [
        (Policy::backlog(10.0, 1, 1_000), 2),
        (Policy { least: 1, ..Policy::reference_embed() }, 2),
        (backlog(8.0), 8),
        // What bounds nothing is mended.
        (backlog(f64::INFINITY), 2),
        (backlog(f64::NAN), 2),
        (backlog(0.0), 2),
    ] {
        let mut world = World::new(1, policy, 100.0);
        world.waiting = 1e9;
        world.run(30, 0.0);
        let steps: Vec<usize> = world.decisions.iter().map(|(_, step)| step.desired).collect();
        assert_eq!(steps, [first], "{policy:?}");
    }
}

fn observation() -> impl Strategy<Value = Option<Observation>> {
    let seen =
        (
            0_u64..100_000,
            0_u64..100_000,
            0_u64..5_000,
            0_u64..3_000,
            0_usize..9,
            0_usize..9,
            any::<bool>(),
            0.0..100.0,
        )
            .prop_map(|(pending, queued, in_flight, applied, ready, holding, saturated, cpu)| {
                Observation { pending, queued, in_flight, applied, ready, holding, saturated, cpu: Some(cpu) }
            });
    prop_oneof![9 => seen.prop_map(Some), 1 => Just(None)]
}

proptest! {
    #[test]
    fn bounds_cooldowns_and_held_work_are_kept_whatever_is_observed(
        seen in proptest::collection::vec((observation(), 1_u64..20, prop::bool::weighted(0.3)), 1..200),
        least in 1_usize..4,
        room in 0_usize..12,
        cooldowns in (0_u64..60, 0_u64..60),
        metric in prop_oneof![Just(Metric::Backlog), Just(Metric::Cpu)],
        growth in prop_oneof![Just(f64::INFINITY), Just(f64::NAN), 0.0..20.0],
    ) {
        let (cooldown_out, cooldown_in) = (SECOND * cooldowns.0 as u32, SECOND * cooldowns.1 as u32);
        let policy = Policy { metric, target: 10.0, least, most: least + room, cooldown_out, cooldown_in, growth };
        let mut scaler = Scaler::new(policy);
        let growth = if growth.is_finite() { growth } else { GROWTH };
        let (mut now, mut current, mut applied) = (Duration::ZERO, least, 0);
        let (mut last_out, mut last_step, mut last_blind) = (None::<Duration>, None::<Duration>, Duration::ZERO);
        for (observed, seconds, idle) in seen {
            now += SECOND * seconds as u32;
            let observed = observed.map(|seen| {
                applied += seen.applied;
                let seen = Observation { applied, ready: seen.ready.min(current), ..seen };
                if idle { Observation { pending: 0, queued: 0, in_flight: 0, holding: 0, saturated: false, cpu: Some(0.0), ..seen } } else { seen }
            });
            let decision = scaler.decide(now, current, observed.as_ref());
            prop_assert_eq!(decision.current, current);
            prop_assert!((policy.least..=policy.most).contains(&decision.desired));
            match &observed {
                None => {
                    prop_assert!(!decision.is_change(), "nothing was observed: {}", decision);
                    last_blind = now;
                }
                Some(seen) if decision.desired < current => {
                    prop_assert!(decision.desired >= seen.holding.min(current), "work is held: {}", decision);
                    prop_assert!(seen.in_flight == 0 || decision.desired >= 1);
                    prop_assert!(last_step.is_none_or(|step| now.saturating_sub(step) >= cooldown_in));
                    prop_assert!(now.saturating_sub(last_blind) >= cooldown_in);
                }
                Some(_) if decision.desired > current => {
                    prop_assert!(last_out.is_none_or(|out| now.saturating_sub(out) >= cooldown_out));
                    prop_assert!(decision.desired as f64 <= (current as f64 * growth).max(current as f64 + 1.0));
                    last_out = Some(now);
                }
                Some(_) => {}
            }
            if decision.is_change() {
                last_step = Some(now);
                current = decision.desired;
            }
        }
    }
}
