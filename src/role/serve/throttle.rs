//! How often a token may be guessed.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Wrong tokens of one client that cost no time: somebody mistypes.
const FREE: u32 = 5;

/// The longest that one client waits for its next try.
const LONGEST: Duration = Duration::from_mins(1);

/// A client's wrong tokens are forgotten after this long without another.
const FORGET: Duration = Duration::from_mins(15);

/// Clients that are remembered. At [`GUESSES`] a minute there are never more within [`FORGET`].
const CLIENTS: usize = 1_024;

/// Wrong tokens that all clients together may send in a [`WINDOW`].
const GUESSES: u32 = 60;

/// See [`GUESSES`].
const WINDOW: Duration = Duration::from_mins(1);

/// Clients that are remembered for having had the token: others' guesses don't lock them out.
const KNOWN: usize = 256;

/// What comes of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the right one.
    Right,
    /// It is a wrong one.
    Wrong,
    /// It was not looked at, and will not be before this long.
    Wait(Duration),
}

/// The wrong tokens of late.
#[derive(Debug, Default)]
pub struct Throttle(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    misses: HashMap<IpAddr, Misses>,
    known: VecDeque<IpAddr>,
    window: Option<Instant>,
    guesses: u32,
}

#[derive(Clone, Copy, Debug)]
struct Misses {
    count: u32,
    last: Instant,
    until: Instant,
}

impl Throttle {
    /// A client has sent a token, which is right or is not.
    pub fn judge(&self, client: IpAddr, right: bool) -> Verdict {
        self.judge_at(client, right, Instant::now())
    }

    fn judge_at(&self, client: IpAddr, right: bool, now: Instant) -> Verdict {
        let client = network(client);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.misses.retain(|_, misses| now.duration_since(misses.last) < FORGET);
        if let Some(misses) = state.misses.get(&client)
            && misses.until > now
        {
            return Verdict::Wait(misses.until - now);
        }
        if state.window.is_none_or(|began| now.duration_since(began) >= WINDOW) {
            (state.window, state.guesses) = (Some(now), 0);
        }
        let is_known = state.known.contains(&client);
        if state.guesses >= GUESSES && !is_known {
            let over = state.window.map_or(now, |began| began + WINDOW);
            return Verdict::Wait(over - now);
        }
        if right {
            state.misses.remove(&client);
            if !is_known {
                state.known.truncate(KNOWN - 1);
                state.known.push_front(client);
            }
            return Verdict::Right;
        }
        state.guesses += 1;
        if state.misses.len() >= CLIENTS
            && let Some(oldest) = state.misses.iter().min_by_key(|(_, misses)| misses.last).map(|(ip, _)| *ip)
        {
            state.misses.remove(&oldest);
        }
        let count = state.misses.get(&client).map_or(0, |misses| misses.count).saturating_add(1);
        let pause = match count.checked_sub(FREE) {
            None | Some(0) => Duration::ZERO,
            Some(more) => Duration::from_secs(1 << (more - 1).min(16)).min(LONGEST),
        };
        state.misses.insert(client, Misses { count, last: now, until: now + pause });
        Verdict::Wrong
    }
}

/// What stands for a client: of IPv6 the network, since one client has all of its addresses.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    #[test]
    fn each_wrong_token_makes_the_next_try_later_up_to_a_minute() {
        let throttle = Throttle::default();
        let mut now = Instant::now();
        for _ in 0..FREE {
            assert_eq!(throttle.judge_at(client(1), false, now), Verdict::Wrong);
        }
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(throttle.judge_at(client(1), false, now), Verdict::Wrong);
            // Not even the right one is looked at meanwhile.
            let pause = Duration::from_secs(pause);
            assert_eq!(throttle.judge_at(client(1), true, now), Verdict::Wait(pause));
            assert_eq!(throttle.judge_at(client(2), true, now), Verdict::Right);
            now += pause;
        }
        assert_eq!(throttle.judge_at(client(1), true, now), Verdict::Right);
        assert_eq!(throttle.judge_at(client(1), false, now), Verdict::Wrong);
        assert_eq!(throttle.judge_at(client(1), true, now), Verdict::Right);
    }

    #[test]
    fn many_clients_together_guess_no_more_often_and_lock_nobody_out_who_had_the_token() {
        let throttle = Throttle::default();
        let now = Instant::now();
        assert_eq!(throttle.judge_at(client(7), true, now), Verdict::Right);
        let wrong = (0..100_000).filter(|n| throttle.judge_at(client(*n), false, now) == Verdict::Wrong);
        assert_eq!(wrong.count(), GUESSES as usize);
        assert!(throttle.0.lock().unwrap().misses.len() <= CLIENTS);
        assert!(matches!(throttle.judge_at(client(8), true, now), Verdict::Wait(_)));
        assert_eq!(throttle.judge_at(client(7), true, now), Verdict::Right);
        assert_eq!(throttle.judge_at(client(8), true, now + WINDOW), Verdict::Right);
    }

    #[test]
    fn the_addresses_of_one_network_are_one_client() {
        let throttle = Throttle::default();
        let now = Instant::now();
        for host in 0..=FREE {
            let address = format!("2001:db8::{host:x}").parse().unwrap();
            assert_eq!(throttle.judge_at(address, false, now), Verdict::Wrong);
        }
        let next = "2001:db8::ffff:1".parse().unwrap();
        assert!(matches!(throttle.judge_at(next, false, now), Verdict::Wait(_)));
    }
}
