//! Believable fake products.
//!
//! A product depends only on seed and number. So products can be made in any order, by any number of threads,
//! and the first thousand products are the same for every count.

use fake::Fake as _;
use fake::faker::name::en::LastName;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::vocabulary::{AI_OPENINGS, ECO, PRODUCT_KINDS, Power, ProductKind};

/// Number of makers of one seed.
const MAKERS: usize = 512;

/// Product numbers are below this, because a SKU has 40 bits for the number.
pub const MAX_COUNT: u64 = 1 << 40;

/// The dates of last edits are spread over this many days from 2023-09-01.
const DAYS: u64 = 730;

/// Crockford's base 32: no I, L, O or U.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// The facts in a product's description. Tests compare search results with them.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Kind of product.
    pub kind: &'static ProductKind,
    /// Source of energy.
    pub power: Power,
    /// Material.
    pub material: &'static str,
    /// Purpose.
    pub purpose: &'static str,
    /// The people that the product is made for.
    pub audience: &'static str,
    /// Function of artificial intelligence in the product.
    pub ai: Option<&'static str>,
    /// Benefit for the environment.
    pub eco: Option<&'static str>,
}

/// A product as text. The buffers are reused for the next product.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProductText {
    /// Maker and noun.
    pub name: String,
    /// Unique for every seed below 2^24 and every number below [`MAX_COUNT`].
    pub sku: String,
    /// The text that is embedded.
    pub description: String,
    /// `$344.87`
    pub price: String,
    /// `2023-09-20 22:51:32`
    pub last_updated: String,
}

/// Makes the products of one seed.
pub struct FakeProducts {
    seed: u64,
    makers: Vec<String>,
    days: Vec<String>,
}

/// `SplitMix64` (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `bound`, by multiplication. The bias, `bound` in 2^32, does not matter here.
    fn below(&mut self, bound: usize) -> usize {
        (((self.next() >> 32) * bound as u64) >> 32) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// `SplitMix64`'s finalizer: a bijection of 64 bits.
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl FakeProducts {
    /// Prepares the products of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut names = StdRng::seed_from_u64(seed);
        let makers = (0..MAKERS).map(|_| LastName().fake_with_rng(&mut names)).collect();
        let first = jiff::civil::date(2023, 9, 1);
        let days = (0..DAYS)
            .map(|day| first.saturating_add(jiff::Span::new().days(day as i64)).to_string())
            .collect();
        Self { seed, makers, days }
    }

    /// Writes product `number` into `text`, and returns its attributes.
    pub fn product(&self, number: u64, text: &mut ProductText) -> Attributes {
        let mut rng = SplitMix64(mix(self.seed ^ mix(number.wrapping_add(1))));
        let kind = &PRODUCT_KINDS[rng.below(PRODUCT_KINDS.len())];
        let noun = rng.of(kind.nouns);
        let power = rng.of(kind.powers);
        // A product with artificial intelligence but without power would not be believable.
        let can_think = !kind.ai.is_empty() && power != Power::Passive;
        let attributes = Attributes {
            kind,
            power,
            material: rng.of(kind.materials),
            purpose: rng.of(kind.uses),
            audience: rng.of(kind.audiences),
            ai: (can_think && rng.one_in(3)).then(|| rng.of(kind.ai)),
            eco: rng.one_in(4).then(|| rng.of(ECO)),
        };
        let maker = self.makers[rng.below(self.makers.len())].as_str();
        let size = rng.of(kind.sizes);
        describe(&mut text.description, &mut rng, &attributes, noun, maker, size);

        text.name.clear();
        push(&mut text.name, &[maker, " "]);
        push_capitalized(&mut text.name, noun);
        text.name.push(' ');
        push_number(&mut text.name, 100 + rng.below(900) as u64);
        self.push_sku(&mut text.sku, kind, number);
        push_price(&mut text.price, &mut rng, kind.price);
        self.push_date(&mut text.last_updated, &mut rng);
        attributes
    }

    /// Writes the code of the kind, and 64 bits. The 64 bits are a bijection of seed and number.
    fn push_sku(&self, sku: &mut String, kind: &ProductKind, number: u64) {
        let mut bits = mix((self.seed << 40) | (number & (MAX_COUNT - 1)));
        sku.clear();
        sku.push_str(kind.code);
        for at in 0..13 {
            if matches!(at, 0 | 5 | 9) {
                sku.push('-');
            }
            sku.push(char::from(ALPHABET[(bits & 31) as usize]));
            bits >>= 5;
        }
    }

    fn push_date(&self, date: &mut String, rng: &mut SplitMix64) {
        date.clear();
        date.push_str(&self.days[rng.below(self.days.len())]);
        for (separator, bound) in [(' ', 24), (':', 60), (':', 60)] {
            let value = rng.below(bound) as u64;
            date.push(separator);
            date.push(char::from(b'0' + (value / 10) as u8));
            date.push(char::from(b'0' + (value % 10) as u8));
        }
    }
}

/// One or two sentences on the product, and one each on intelligence, environment and maker.
fn describe(text: &mut String, rng: &mut SplitMix64, it: &Attributes, noun: &str, maker: &str, size: &str) {
    text.clear();
    let adjective = rng.of(it.power.adjectives());
    let gap = if adjective.is_empty() { "" } else { " " };
    match rng.below(5) {
        0 => {
            push_article(text, size, true);
            push(text, &[size, gap, adjective, " ", noun, " in ", it.material, " for ", it.purpose, "."]);
        }
        1 => {
            let first = if adjective.is_empty() { noun } else { adjective };
            push(text, &["For ", it.purpose, ": "]);
            push_article(text, first, false);
            push(text, &[adjective, gap, noun, " of ", it.material, ", ", size, "."]);
        }
        2 => {
            let first = if adjective.is_empty() { noun } else { adjective };
            push_capitalized(text, first);
            if !adjective.is_empty() {
                push(text, &[" ", noun]);
            }
            push(text, &[" (", size, ") made of ", it.material, ", good for ", it.purpose, "."]);
        }
        3 => {
            push_capitalized(text, it.material);
            push(text, &[" ", noun, ", ", size]);
            if !adjective.is_empty() {
                push(text, &[", ", adjective]);
            }
            push(text, &[": just right for ", it.purpose, "."]);
        }
        _ => {
            push(
                text,
                &[
                    "This ",
                    size,
                    gap,
                    adjective,
                    " ",
                    noun,
                    " in ",
                    it.material,
                    " is meant for ",
                    it.purpose,
                    ".",
                ],
            );
        }
    }
    if let Some(ai) = it.ai {
        push(text, &[" ", rng.of(AI_OPENINGS), " ", ai, "."]);
    }
    if let Some(eco) = it.eco {
        push(text, &[" ", eco, "."]);
    }
    match rng.below(4) {
        0 => push(text, &[" Made by ", maker, " for ", it.audience, "."]),
        1 => push(text, &[" ", maker, " designed it for ", it.audience, "."]),
        2 => push(text, &[" For ", it.audience, ", from ", maker, "."]),
        _ => push(text, &[" A favourite with ", it.audience, ", by ", maker, "."]),
    }
}

fn push(text: &mut String, parts: &[&str]) {
    for part in parts {
        text.push_str(part);
    }
}

fn push_capitalized(text: &mut String, words: &str) {
    let mut letters = words.chars();
    text.extend(letters.next().map(|first| first.to_ascii_uppercase()));
    text.push_str(letters.as_str());
}

fn push_article(text: &mut String, next: &str, capital: bool) {
    // The sound decides: 8, 11 and 18 begin with a vowel sound, "ukulele" does not.
    let vowel = next.starts_with(['a', 'e', 'i', 'o', '8'])
        || next.starts_with("ultra")
        || next.starts_with("upper")
        || ["11", "18"]
            .iter()
            .any(|number| next.starts_with(number) && !next[2..].starts_with(|c: char| c.is_ascii_digit()));
    text.push_str(match (vowel, capital) {
        (true, true) => "An ",
        (true, false) => "an ",
        (false, true) => "A ",
        (false, false) => "a ",
    });
}

fn push_number(text: &mut String, number: u64) {
    let mut digits = [0_u8; 20];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    text.extend(digits[at..].iter().map(|digit| char::from(*digit)));
}

/// Dollars in the price range of the kind; the cents are often 99, as in shops.
fn push_price(price: &mut String, rng: &mut SplitMix64, (least, greatest): (u32, u32)) {
    price.clear();
    price.push('$');
    push_number(price, u64::from(least) + rng.below((greatest - least) as usize) as u64);
    let cents = if rng.one_in(2) { 99 } else { rng.below(100) as u64 };
    price.push('.');
    price.push(char::from(b'0' + (cents / 10) as u8));
    price.push(char::from(b'0' + (cents % 10) as u8));
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn texts(seed: u64, count: u64) -> Vec<ProductText> {
        let fake_products = FakeProducts::new(seed);
        (0..count)
            .map(|number| {
                let mut text = ProductText::default();
                fake_products.product(number, &mut text);
                text
            })
            .collect()
    }

    #[test]
    fn skus_are_unique_within_and_across_seeds() {
        let mut seen = HashSet::new();
        for seed in [0, 1, 2, (1 << 24) - 1] {
            for text in texts(seed, 50_000) {
                assert!(seen.insert(text.sku.clone()), "{} is not unique", text.sku);
            }
        }
    }

    #[test]
    fn descriptions_are_mostly_distinct_and_of_realistic_length() {
        let texts = texts(7, 100_000);
        let distinct: HashSet<&str> = texts.iter().map(|text| text.description.as_str()).collect();
        assert!(distinct.len() > 95_000, "{} distinct", distinct.len());
        for text in &texts {
            let words = text.description.split(' ').count();
            assert!((8..=60).contains(&words), "{words} words: {}", text.description);
            assert!(!text.description.contains("  "), "{}", text.description);
            assert!(text.name.len() <= 255 && text.sku.len() <= 255);
        }
    }

    #[test]
    fn prices_and_dates_have_the_format_of_the_reference_architecture() {
        for text in texts(3, 1_000) {
            let (dollars, cents) = text.price.strip_prefix('$').unwrap().split_once('.').unwrap();
            assert!(dollars.parse::<u32>().unwrap() >= 9 && cents.len() == 2, "{}", text.price);
            text.last_updated.parse::<jiff::civil::DateTime>().unwrap();
            assert_eq!(text.last_updated.len(), "2023-09-20 22:51:32".len());
        }
    }

    #[test]
    fn the_description_agrees_with_the_products_attributes() {
        let fake_products = FakeProducts::new(5);
        let mut text = ProductText::default();
        for number in 0..5_000 {
            let it = fake_products.product(number, &mut text);
            let description = text.description.to_lowercase();
            for said in [it.material, it.purpose, it.audience] {
                assert!(description.contains(&said.to_lowercase()), "{said}: {description}");
            }
            assert_eq!(
                it.ai.is_some(),
                text.description.contains("AI") || text.description.contains("artificial"),
                "{description}"
            );
        }
    }

    #[test]
    fn a_and_an_follow_the_sound_of_the_next_word() {
        for (next, article) in [
            ("electric kettle", "an "),
            ("8 kg", "an "),
            ("11-inch", "an "),
            ("18-volt", "an "),
            ("120 cm", "a "),
            ("180-litre", "a "),
            ("ukulele", "a "),
            ("850-watt", "an "),
        ] {
            let mut text = String::new();
            push_article(&mut text, next, false);
            assert_eq!(text, article, "{next}");
        }
    }
}
