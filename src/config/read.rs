//! How the settings of a section are declared and read.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::declare::Key;
use super::error::ConfigError;
use super::values::Values;
use crate::encoder::{InstructionSet, Precision};
use crate::secret::Secret;

/// A group of settings: what `section!` declares.
pub(super) trait Section: Sized {
    /// The kinds of its section that use these keys; none named: all.
    const KINDS: &'static [&'static str];
    const KEYS: &'static [Key];

    fn read(values: &Values) -> Result<Self, ConfigError>;
}

/// What a setting is read as.
pub(super) trait Setting: Sized {
    /// Whether its value is never shown.
    const IS_SECRET: bool = false;

    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError>;
}

/// A key's value, checked by its rules, as what it is declared to be.
pub(super) fn checked<T: Setting>(values: &Values, path: &'static str) -> Result<T, ConfigError> {
    values.check(path)?;
    T::read(values, path)
}

macro_rules! by_serde {
    ($($type:ty),*) => {
        $(impl Setting for $type {
            fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
                values.parse(path)
            }
        })*
    };
}

by_serde!(f64, u32, u64, usize, String, Vec<String>, PathBuf, SocketAddr, Precision, InstructionSet);

impl Setting for Secret {
    const IS_SECRET: bool = true;

    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
        values.parse(path)
    }
}

impl Setting for Duration {
    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
        Ok(match path.rsplit('_').next() {
            Some("ms") => Self::from_millis(values.parse(path)?),
            Some("s") => Self::from_secs(values.parse(path)?),
            // A rule of such a key keeps it to what a duration can be.
            _ => Self::from_secs_f64(values.parse::<f64>(path)? * 3_600.0),
        })
    }
}

/// None for 0.
impl Setting for Option<Duration> {
    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
        Ok(Some(Duration::read(values, path)?).filter(|duration| !duration.is_zero()))
    }
}

/// None for an empty text.
impl Setting for Option<SocketAddr> {
    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
        let text: String = values.parse(path)?;
        if text.is_empty() { Ok(None) } else { values.parse(path).map(Some) }
    }
}

/// Declares the settings of a section, or those of some of its kinds (`of`). A field whose key has another name says
/// so (`as`). After the default come the rules.
macro_rules! section {
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $key:literal) => { $key };
    (
        $(#[doc = $about:literal])*
        pub struct $name:ident in $section:literal $(of [$($kind:literal),+])? {
            $(
                $(#[doc = $doc:literal])*
                $field:ident $(as $key:literal)?: $type:ty = $default:expr $(, $rule:expr)*;
            )*
        }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug)]
        pub struct $name {
            $($(#[doc = $doc])* pub $field: $type,)*
        }

        impl $crate::config::read::Section for $name {
            const KINDS: &'static [&'static str] = &[$($($kind),+)?];
            const KEYS: &'static [$crate::config::declare::Key] = &[$($crate::config::declare::Key {
                section: $section,
                name: section!(@name $field $($key)?),
                path: concat!($section, ".", section!(@name $field $($key)?)),
                kinds: Self::KINDS,
                default: stringify!($default),
                about: &[$($doc),*],
                is_secret: <$type as $crate::config::read::Setting>::IS_SECRET,
                rules: &[$($rule),*],
            }),*];

            fn read(
                values: &$crate::config::values::Values,
            ) -> Result<Self, $crate::config::error::ConfigError> {
                Ok(Self {
                    $($field: $crate::config::read::checked(
                        values,
                        concat!($section, ".", section!(@name $field $($key)?)),
                    )?,)*
                })
            }
        }
    };
}

pub(super) use section;
