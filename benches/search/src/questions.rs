//! Questions that customers may ask about the catalogue.

use std::collections::HashSet;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use refarch::role::generate::vocabulary::{PRODUCT_KINDS, ProductKind};

/// What customers look for, beside the catalogue's own words.
const WISHES: &[&str] = &[
    "cheap",
    "quiet",
    "light",
    "waterproof",
    "sturdy",
    "small",
    "stylish",
    "easy to clean",
    "long-lasting",
    "energy-saving",
    "simple",
    "safe",
    "second-hand",
    "well-reviewed",
    "repairable",
    "good-looking",
];

/// Occasions.
const OCCASIONS: &[&str] = &[
    "for a birthday",
    "for Christmas",
    "for a wedding",
    "before the summer",
    "for a small budget",
    "for a rainy weekend",
    "for a new flat",
    "for my father",
    "for my best friend",
    "for beginners",
    "for everyday use",
    "as a present",
];

/// An endless row of different questions. The same seed gives the same questions.
pub struct Questions {
    random: StdRng,
    asked: HashSet<String>,
}

impl Questions {
    /// The questions of a seed.
    pub fn new(seed: u64) -> Self {
        Self { random: StdRng::seed_from_u64(seed), asked: HashSet::new() }
    }

    /// So many questions, none of which was returned before.
    pub fn take(&mut self, count: usize) -> Vec<String> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let question = self.question();
            if self.asked.insert(question.clone()) {
                taken.push(question);
            }
        }
        taken
    }

    fn question(&mut self) -> String {
        let kind = self.one_of(PRODUCT_KINDS);
        let ProductKind { nouns, materials, uses, audiences, ai, .. } = kind;
        let (noun, purpose) = (self.one_of(nouns), self.one_of(uses));
        let (material, audience) = (self.one_of(materials), self.one_of(audiences));
        let (wish, occasion) = (self.one_of(WISHES), self.one_of(OCCASIONS));
        match self.random.random_range(0..10) {
            0 => format!("a {wish} {noun} for {purpose}"),
            1 => format!("something {wish} for {purpose}, {occasion}"),
            2 => format!("which {noun} suits {audience} {occasion}?"),
            3 => format!("I need a {noun} made of {material} for {purpose}"),
            4 => format!("{wish} gift for {audience}: {purpose}"),
            5 => format!("what do {audience} use for {purpose}? it should be {wish}"),
            6 => format!("{material} {noun} {occasion}, {wish}"),
            7 => match ai.choose(&mut self.random) {
                Some(ai) => format!("a {noun} that can {ai}, {occasion}"),
                None => format!("is there a {wish} {noun} for {audience}?"),
            },
            8 => format!("looking for a {noun} that helps with {purpose}, {wish} and not too expensive"),
            _ => {
                let other = self.one_of(uses);
                format!("{noun} for {purpose} and {other} {occasion}")
            }
        }
    }

    fn one_of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.random.next_u64() as usize % list.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_questions_and_none_comes_twice() {
        let (mut one, mut other) = (Questions::new(1), Questions::new(1));
        let taken = [one.take(20_000), one.take(20_000)].concat();
        assert_eq!(taken, other.take(40_000));
        assert_eq!(taken.iter().collect::<HashSet<_>>().len(), taken.len());
        assert_ne!(taken[..200], Questions::new(2).take(200));
    }
}
