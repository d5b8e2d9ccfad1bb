//! Ways to search, and the settings that choose them.

use clap::ValueEnum;

/// A value of the setting `index.search`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Read all vectors
    Exact,
    /// Lists (`IVFFlat`)
    Lists,
    /// A graph (HNSW)
    Graph,
    /// What refarch chooses
    Auto,
}

/// More rows than any table has.
const NEVER: &str = "1000000000000";

/// An environment variable with its value.
pub type Variable = (&'static str, &'static str);

impl Mode {
    /// The setting's value, and the name in the figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Lists => "lists",
            Self::Graph => "graph",
            Self::Auto => "auto",
        }
    }

    /// The settings that choose this mode.
    pub fn settings(self) -> Vec<Variable> {
        let mut settings = vec![("REFARCH_INDEX_SEARCH", self.name())];
        if self == Self::Graph {
            settings.push(("REFARCH_INDEX_GRAPH_MIN_ROWS", "1"));
        }
        settings
    }

    /// The same for a binary without the setting `index.search`, if it can be told to search this way.
    pub fn settings_without_search(self) -> Option<Vec<Variable>> {
        match self {
            Self::Exact => Some(vec![("REFARCH_INDEX_GRAPH_MIN_ROWS", NEVER)]),
            Self::Graph => Some(vec![("REFARCH_INDEX_GRAPH_MIN_ROWS", "1")]),
            Self::Lists | Self::Auto => None,
        }
    }

    /// The access method of the mode's index; none if there may be no index.
    pub fn access_method(self) -> Option<&'static str> {
        match self {
            Self::Exact | Self::Auto => None,
            Self::Lists => Some("ivfflat"),
            Self::Graph => Some("hnsw"),
        }
    }
}
