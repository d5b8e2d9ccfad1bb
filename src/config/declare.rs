//! How a setting is declared: once, with its name, type, default, meaning, variables and rules.

use toml::Value;

/// A setting, as it is declared.
#[derive(Debug)]
pub(super) struct Key {
    /// `[section]`, as in `relay`.
    pub(super) section: &'static str,
    /// The name in its section. That of a duration ends in its unit: `_ms`, `_s` or `_h`.
    pub(super) name: &'static str,
    /// Both, as in `relay.pack`.
    pub(super) path: &'static str,
    /// The kinds of its section that use it; none named: all.
    pub(super) kinds: &'static [&'static str],
    /// As in TOML.
    pub(super) default: &'static str,
    /// What it means, line by line.
    #[cfg_attr(not(test), allow(dead_code, reason = "the test that compares config/default.toml reads it"))]
    pub(super) about: &'static [&'static str],
    /// Whether its value is never shown.
    pub(super) is_secret: bool,
    pub(super) rules: &'static [Rule],
}

/// What holds for a setting beside its type.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// A number, no less than this.
    AtLeast(i64),
    /// A number from here to there.
    Between(i64, i64),
    /// The same, of seconds.
    Seconds(i64, i64),
    /// One of these texts.
    OneOf(&'static [&'static str]),
    /// What the value must be, and what to tell whoever sets another.
    Is(fn(&Value) -> bool, &'static str),
    /// The same for each text of a list.
    Each(fn(&str) -> bool, &'static str),
    /// An address: it is shown without what is secret in it.
    Address,
    /// A variable that other tools use too, beside `REFARCH_<SECTION>_<KEY>`.
    Variable(&'static str),
    /// The same, and it also sets `kind` in its section.
    Chooses(&'static str, &'static str),
}

impl Rule {
    /// What is wrong by this rule, if anything is: the value or the part of it, and what would be right.
    pub(super) fn fault(self, value: &Value) -> Option<(String, String)> {
        let (is_good, reason) = match self {
            Self::AtLeast(least) => (number(value) >= Some(least as f64), format!("use at least {least}")),
            Self::Between(least, most) => (lies(value, least, most), format!("use {least} to {most}")),
            Self::Seconds(least, most) => {
                (lies(value, least, most), format!("use {least} to {most} seconds"))
            }
            Self::OneOf(texts) => {
                let (last, others) = texts.split_last()?;
                let is_one = value.as_str().is_some_and(|text| texts.contains(&text));
                (is_one, format!("use {} or {last}", others.join(", ")))
            }
            Self::Is(is_good, reason) => (is_good(value), reason.into()),
            Self::Each(is_good, reason) => {
                let bad = value.as_array()?.iter().find(|part| !part.as_str().is_some_and(is_good))?;
                return Some((sets(bad), reason.into()));
            }
            Self::Address | Self::Variable(_) | Self::Chooses(..) => return None,
        };
        (!is_good).then(|| (sets(value), reason))
    }
}

/// A value as a number, if it is one.
pub(super) fn number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64))
}

/// Whether a value is a number from here to there.
pub(super) fn lies(value: &Value, least: i64, most: i64) -> bool {
    number(value).is_some_and(|number| (least as f64..=most as f64).contains(&number))
}

/// A value as it may stand in a sentence: a text without quotes, a number as short as it can be.
pub(super) fn sets(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Float(number) => number.to_string(),
        value => value.to_string(),
    }
}
