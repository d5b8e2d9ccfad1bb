//! Texts in requests: estimating their tokens, batching them, and cutting long ones.

use super::provider::Limits;

/// Bytes that count as one token. Languages have more on average, so the estimate is high and the limits
/// hold. If a text has more tokens than estimated, the server refuses it and the text is cut further.
const BYTES_A_TOKEN: usize = 3;

/// No model finds a text of this many bytes too long, so a refusal of it has another reason.
pub(super) const SHORT: usize = 256;

/// How often a text is halved at most: to 1/64 of the provider's limit.
pub(super) const HALVINGS: usize = 6;

/// Estimates the tokens of a text.
pub(super) fn tokens(text: &str) -> usize {
    text.len().div_ceil(BYTES_A_TOKEN).max(1)
}

/// The start of a text, at most this many tokens by the estimate.
pub(super) fn cut(text: &str, tokens: usize) -> &str {
    &text[..text.floor_char_boundary(tokens.saturating_mul(BYTES_A_TOKEN))]
}

/// The first half of a text. `None` if the text is so short that its length cannot be the reason for a
/// refusal.
pub(super) fn half(text: &str) -> Option<&str> {
    (text.len() > SHORT).then(|| &text[..text.floor_char_boundary(text.len() / 2)])
}

/// Packs texts into batches within the limits. A text that is larger than the limits gets a batch of its own.
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
