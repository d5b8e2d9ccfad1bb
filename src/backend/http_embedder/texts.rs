//! Texts in requests: how many tokens, how many together, and where one is cut.

use super::provider::Limits;

/// Bytes that are taken for a token: more than languages have on average, so that limits hold. Where a text
/// has more tokens the server says so, and the text is cut further.
const BYTES_A_TOKEN: usize = 3;

/// A text of this many bytes is too long for no model, so that a refusal of it has another reason.
pub(super) const SHORT: usize = 256;

/// How often a text is halved at most: 64 times shorter than what the provider's limit lets through.
pub(super) const HALVINGS: usize = 6;

/// Tokens of a text, estimated.
pub(super) fn tokens(text: &str) -> usize {
    text.len().div_ceil(BYTES_A_TOKEN).max(1)
}

/// As much of a text as a model reads.
pub(super) fn cut(text: &str, tokens: usize) -> &str {
    &text[..text.floor_char_boundary(tokens.saturating_mul(BYTES_A_TOKEN))]
}

/// The first half of a text, or none if it is so short that its length can't be what is wrong with it.
pub(super) fn half(text: &str) -> Option<&str> {
    (text.len() > SHORT).then(|| &text[..text.floor_char_boundary(text.len() / 2)])
}

/// Texts in batches within the limits; one that is beyond them by itself goes alone.
pub(super) fn batches<'a>(texts: &[&'a str], limits: Limits) -> Vec<Vec<&'a str>> {
    let mut batches: Vec<Vec<&str>> = Vec::new();
    let mut sum = 0;
    for text in texts {
        let more = tokens(text);
        let fits =
            batches.last().is_some_and(|batch| batch.len() < limits.texts && sum + more <= limits.tokens);
        if !fits {
            batches.push(Vec::new());
            sum = 0;
        }
        sum += more;
        if let Some(batch) = batches.last_mut() {
            batch.push(text);
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_to_the_limits_and_lose_nothing() {
        let limits = Limits { texts: 3, tokens: 10, text_tokens: 100 };
        let long = "x".repeat(60);
        let texts = ["a", "b", "c", "d", &long, "e", "ffffffffffff", "gggggggggggggggggg"];
        let batched = batches(&texts, limits);
        assert_eq!(batched.concat(), texts);
        assert_eq!(batched.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1, 1, 2, 1]);
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(cut("abcdef", 1), "abc");
        assert_eq!(cut("ab\u{e9}d", 1), "ab");
        assert_eq!(cut("ab", usize::MAX), "ab");
    }

    #[test]
    fn halving_ends_between_characters_and_before_nothing_is_left() {
        for one in ["a", "\u{e9}", "\u{e01}", "\u{1f600}"] {
            let text = one.repeat(1_001);
            let mut left = text.as_str();
            while let Some(shorter) = half(left) {
                assert!(shorter.len() < left.len() && text.starts_with(shorter));
                left = shorter;
            }
            assert!(!left.is_empty() && left.len() <= SHORT);
        }
    }
}
