//! Progress of long work: a bar on a terminal, otherwise a plain line every few seconds.

use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::pipeline::metrics::Counter;
use crate::telemetry;

/// Time between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress towards a total, on standard error.
pub struct Progress {
    label: &'static str,
    bar: ProgressBar,
    /// Time of the last plain line; none on a terminal.
    plain: Option<Mutex<Instant>>,
    started: Instant,
    /// Counts the progress for others.
    counter: Arc<Counter>,
}

impl Progress {
    /// Progress from 0 to `total`. The colour of the bar obeys `NO_COLOR`.
    #[must_use]
    pub fn new(label: &'static str, total: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target).with_message(label);
        let style = "{msg} [{bar:40}] {human_pos}/{human_len}  {per_sec}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        let now = Instant::now();
        Self {
            label,
            bar,
            plain: (!terminal).then(|| Mutex::new(now)),
            started: now,
            counter: Arc::default(),
        }
    }

    /// The same progress, which also counts here.
    #[must_use]
    pub fn counting(self, counter: Arc<Counter>) -> Self {
        Self { counter, ..self }
    }

    /// Sets a new total.
    pub fn set_total(&self, total: u64) {
        self.bar.set_length(total);
    }

    /// Sets the position, and shows it.
    pub fn set(&self, position: u64) {
        self.counter.add(position.saturating_sub(self.bar.position()));
        self.bar.set_position(position);
        let Some(plain) = &self.plain else { return };
        let mut last = plain.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.elapsed() >= LINE_EVERY {
            *last = Instant::now();
            self.line();
        }
    }

    /// Ends the display. The last state stays visible.
    pub fn finish(&self) {
        if self.plain.is_some() {
            self.line();
        } else {
            self.bar.abandon();
        }
    }

    fn line(&self) {
        let (position, total) = (self.bar.position(), self.bar.length().unwrap_or_default());
        let seconds = self.started.elapsed().as_secs_f64();
        let rate = position as f64 / seconds.max(1e-3);
        let left = total.saturating_sub(position) as f64 / rate.max(1e-3);
        let eta =
            if position == 0 || position >= total { String::new() } else { format!(", {left:.0} s left") };
        let label = self.label;
        let line = format!("{label}: {position} of {total} in {seconds:.1} s, {rate:.0}/s{eta}");
        telemetry::notice("INFO", line);
    }
}
