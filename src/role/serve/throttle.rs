//! Rate limit for wrong tokens.
//!
//! All clients behind one proxy may have the same address. So an address cannot be blocked: one client's
//! wrong tokens would also block the client that has the right token. Instead, after some wrong tokens from
//! an address, no token is checked for a second after each wrong one. So guessing stays slow, and the right
//! token still gets through between two guesses. Written by hand, because rate limiters (governor,
//! tower's) block a key whatever it sends, the right token too.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Wrong tokens of one client without a pause, for typing errors.
const FREE_GUESSES: u32 = 5;

/// After more than [`FREE_GUESSES`] wrong tokens, no token is checked for this long after each wrong token.
const PAUSE: Duration = Duration::from_secs(1);

/// A client's wrong tokens are forgotten after this long without another.
const FORGET_AFTER: Duration = Duration::from_mins(15);

/// Clients with wrong tokens that are remembered. The oldest is dropped.
const MAX_CLIENTS: usize = 1_024;

/// Wrong tokens in a [`WINDOW`] without a [`PAUSE`], of all clients together that never sent the right token.
const MAX_GUESSES: u32 = 60;

/// See [`MAX_GUESSES`].
const WINDOW: Duration = Duration::from_mins(1);

/// Clients with the right token that are remembered. Guesses of other clients do not delay them.
const MAX_TRUSTED_CLIENTS: usize = 256;

/// The result of checking a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The token is right.
    Right,
    /// The token is wrong.
    Wrong,
    /// The token was not checked. No token is checked before this time has passed.
    Wait(Duration),
}

/// Recent wrong tokens, by client.
#[derive(Debug, Default)]
pub struct Throttle(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    misses: HashMap<IpAddr, Misses>,
    known: VecDeque<IpAddr>,
    window: Option<Instant>,
    guesses: u32,
    /// When the last of these guesses was made.
    guessed: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Misses {
    count: u32,
    last: Instant,
}

impl Throttle {
    /// Decides about a token of a client; `right` says whether the token is right.
    pub fn check_token(&self, client: IpAddr, right: bool) -> Verdict {
        self.check_token_at(client, right, Instant::now())
    }

    fn check_token_at(&self, client: IpAddr, right: bool, now: Instant) -> Verdict {
        let client = network(client);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.misses.retain(|_, misses| now.duration_since(misses.last) < FORGET_AFTER);
        if let Some(misses) = state.misses.get(&client)
            && misses.count > FREE_GUESSES
            && let Some(pause) = left(misses.last, now)
        {
            return Verdict::Wait(pause);
        }
        if state.window.is_none_or(|began| now.duration_since(began) >= WINDOW) {
            (state.window, state.guesses) = (Some(now), 0);
        }
        let is_known = state.known.contains(&client);
        if state.guesses >= MAX_GUESSES
            && !is_known
            && let Some(pause) = state.guessed.and_then(|last| left(last, now))
        {
            return Verdict::Wait(pause);
        }
        if right {
            // The wrong tokens still count: another client behind the same proxy may have sent them.
            if !is_known {
                state.known.truncate(MAX_TRUSTED_CLIENTS - 1);
                state.known.push_front(client);
            }
            return Verdict::Right;
        }
        if !is_known {
            state.guesses += 1;
            state.guessed = Some(now);
        }
        if state.misses.len() >= MAX_CLIENTS
            && let Some(oldest) = state.misses.iter().min_by_key(|(_, misses)| misses.last).map(|(ip, _)| *ip)
        {
            state.misses.remove(&oldest);
        }
        let count = state.misses.get(&client).map_or(0, |misses| misses.count).saturating_add(1);
        state.misses.insert(client, Misses { count, last: now });
        Verdict::Wrong
    }
}

/// The rest of the pause after a wrong token.
fn left(last: Instant, now: Instant) -> Option<Duration> {
    (last + PAUSE).checked_duration_since(now).filter(|left| !left.is_zero())
}

/// The address that identifies a client. For IPv6 the /64 network, because one client has all of its
/// addresses.
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
    fn after_some_wrong_tokens_one_token_a_second_is_checked() {
        let throttle = Throttle::default();
        let mut now = Instant::now();
        for _ in 0..FREE_GUESSES {
            assert_eq!(throttle.check_token_at(client(1), false, now), Verdict::Wrong);
        }
        for _ in 0..100 {
            assert_eq!(throttle.check_token_at(client(1), false, now), Verdict::Wrong);
            // The right token is not checked either: its answer would show that it is right.
            for right in [false, true] {
                assert_eq!(throttle.check_token_at(client(1), right, now), Verdict::Wait(PAUSE));
            }
            assert_eq!(throttle.check_token_at(client(2), true, now), Verdict::Right);
            now += PAUSE;
        }
        assert_eq!(throttle.check_token_at(client(1), true, now), Verdict::Right);
        assert_eq!(throttle.check_token_at(client(1), true, now), Verdict::Right);
        // A right token does not reset the limit for other guesses.
        assert_eq!(throttle.check_token_at(client(1), false, now), Verdict::Wrong);
        assert_eq!(throttle.check_token_at(client(1), false, now), Verdict::Wait(PAUSE));
        let later = now + FORGET_AFTER;
        for _ in 0..=FREE_GUESSES {
            assert_eq!(throttle.check_token_at(client(1), false, later), Verdict::Wrong);
        }
    }

    #[test]
    fn wrong_tokens_of_one_client_behind_a_proxy_do_not_lock_out_other_clients() {
        let throttle = Throttle::default();
        let mut now = Instant::now();
        for _ in 0..=FREE_GUESSES {
            assert_eq!(throttle.check_token_at(client(1), false, now), Verdict::Wrong);
        }
        for minute in 0..60 {
            now += Duration::from_mins(1);
            assert_eq!(throttle.check_token_at(client(1), false, now), Verdict::Wrong);
            let soon = now + Duration::from_millis(1_500);
            assert_eq!(throttle.check_token_at(client(1), true, soon), Verdict::Right, "minute {minute}");
        }
    }

    #[test]
    fn many_clients_guess_no_faster_together_and_lock_nobody_out() {
        let throttle = Throttle::default();
        let now = Instant::now();
        assert_eq!(throttle.check_token_at(client(7), true, now), Verdict::Right);
        let wrong =
            (100..100_000).filter(|n| throttle.check_token_at(client(*n), false, now) == Verdict::Wrong);
        assert_eq!(wrong.count(), MAX_GUESSES as usize);
        assert!(throttle.0.lock().unwrap().misses.len() <= MAX_CLIENTS);
        assert_eq!(throttle.check_token_at(client(8), true, now), Verdict::Wait(PAUSE));
        assert_eq!(throttle.check_token_at(client(7), true, now), Verdict::Right);
        // All of them together have one guess a second, for as long as the window lasts.
        let next = now + PAUSE;
        assert_eq!(throttle.check_token_at(client(9), false, next), Verdict::Wrong);
        assert_eq!(throttle.check_token_at(client(10), false, next), Verdict::Wait(PAUSE));
        assert_eq!(throttle.check_token_at(client(8), true, next + PAUSE), Verdict::Right);
    }

    #[test]
    fn addresses_of_one_network_count_as_one_client() {
        let throttle = Throttle::default();
        let now = Instant::now();
        for host in 0..=FREE_GUESSES {
            let address = format!("2001:db8::{host:x}").parse().unwrap();
            assert_eq!(throttle.check_token_at(address, false, now), Verdict::Wrong);
        }
        let next = "2001:db8::ffff:1".parse().unwrap();
        assert!(matches!(throttle.check_token_at(next, false, now), Verdict::Wait(_)));
    }
}
