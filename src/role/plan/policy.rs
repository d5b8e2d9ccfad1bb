//! How many workers scaling asks for.

use super::scenario::Scaling;

/// Target tracking: as many workers as finish the backlog in the target time, within the bounds and the cooldowns.
pub(super) struct Policy {
    scaling: Scaling,
    /// When workers were last added, and last added or removed.
    added: Option<f64>,
    changed: Option<f64>,
}

impl Policy {
    pub(super) fn new(scaling: Scaling) -> Self {
        Self { scaling, added: None, changed: None }
    }

    /// The number of workers to have from now on, if it changes. `backlog` is in changes, `rate` is what one worker
    /// makes searchable in a second.
    pub(super) fn decide(&mut self, now: f64, workers: u32, backlog: f64, rate: f64) -> Option<u32> {
        let Scaling { least, most, target, out_cooldown, in_cooldown } = self.scaling;
        let wanted =
            (backlog / (rate * target.max(0.001))).ceil().clamp(f64::from(least), f64::from(most)) as u32;
        let is_over = |since: Option<f64>, cooldown: f64| since.is_none_or(|since| now - since >= cooldown);
        let may = if wanted > workers {
            is_over(self.added, out_cooldown)
        } else {
            wanted < workers && is_over(self.changed, in_cooldown)
        };
        if !may {
            return None;
        }
        if wanted > workers {
            self.added = Some(now);
        }
        self.changed = Some(now);
        Some(wanted)
    }
}
