//! Sentences about panics, for whoever records them.

use tokio::sync::broadcast;

/// Panics that wait to be recorded as events at most. The log and the metric have all of them.
const WAITING: usize = 16;

/// Where panics are told.
pub(super) struct PanicReports(broadcast::Sender<String>);

impl Default for PanicReports {
    fn default() -> Self {
        Self(broadcast::Sender::new(WAITING))
    }
}

impl PanicReports {
    /// Panics from now on, each as a sentence.
    pub(super) fn subscribe(&self) -> broadcast::Receiver<String> {
        self.0.subscribe()
    }

    pub(super) fn send(&self, sentence: String) {
        // Nobody may be listening.
        let _ = self.0.send(sentence);
    }
}
