//! A batch: sequences of tokens that one pass embeds.

/// Sequences packed end to end.
pub(super) struct Batch {
    /// Token ids.
    pub(super) ids: Vec<u32>,
    /// Position of each token in its sequence.
    pub(super) positions: Vec<u32>,
    /// Start of each sequence, and the end of the last sequence.
    pub(super) starts: Vec<usize>,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self { ids: Vec::new(), positions: Vec::new(), starts: vec![0] }
    }

    pub(super) fn push(&mut self, sequence: &[u32]) {
        self.ids.extend_from_slice(sequence);
        self.positions.extend(0..sequence.len() as u32);
        self.starts.push(self.ids.len());
    }

    pub(super) fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.starts.truncate(1);
    }

    pub(super) fn sequences(&self) -> usize {
        self.starts.len() - 1
    }
}
