//! Texts that are unlike all texts of the catalogue, and unlike each other.

use crate::stray_texts::SUBJECTS;

/// A text, and the same in other words.
#[derive(Clone, Debug, PartialEq)]
pub struct Stray {
    /// The text that a row gets.
    pub text: String,
    /// A paraphrase, which is only asked for.
    pub paraphrase: String,
}

/// All texts. Neighbours in the list have different subjects, so that any part of the list is mixed.
pub fn all() -> Vec<Stray> {
    let mut strays = Vec::new();
    for thing in 0..SUBJECTS[0].things.len() {
        for sentence in 0..SUBJECTS[0].sentences.len() {
            for subject in &SUBJECTS {
                let (own, other) = (subject.sentences[sentence], subject.things[thing]);
                strays.push(Stray { text: fill(own.0, other.0), paraphrase: fill(own.1, other.1) });
            }
        }
    }
    strays
}

/// A sentence about a thing, which begins with a capital letter.
fn fill(sentence: &str, thing: &str) -> String {
    let mut filled = sentence.replace("{}", thing);
    if let Some(first) = filled.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    filled
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn there_are_two_hundred_texts_and_none_is_twice() {
        let strays = all();
        assert_eq!(strays.len(), 200);
        let distinct: HashSet<&str> =
            strays.iter().flat_map(|stray| [stray.text.as_str(), stray.paraphrase.as_str()]).collect();
        assert_eq!(distinct.len(), 400);
    }

    #[test]
    fn each_sentence_has_one_place_for_a_thing() {
        for subject in &SUBJECTS {
            for (own, other) in subject.sentences {
                assert_eq!(own.matches("{}").count(), 1, "{own}");
                assert_eq!(other.matches("{}").count(), 1, "{other}");
            }
        }
        assert!(all().iter().all(|stray| !stray.text.contains('{') && !stray.paraphrase.contains('{')));
    }

    #[test]
    fn a_paraphrase_shares_few_words_with_its_text() {
        let words = |text: &str| -> HashSet<String> {
            text.to_lowercase()
                .split(|letter: char| !letter.is_alphanumeric())
                .filter(|word| word.len() > 3)
                .map(str::to_owned)
                .collect()
        };
        for Stray { text, paraphrase } in all() {
            let (own, other) = (words(&text), words(&paraphrase));
            assert!(own.intersection(&other).count() * 2 < own.len(), "{text} / {paraphrase}");
        }
    }
}
