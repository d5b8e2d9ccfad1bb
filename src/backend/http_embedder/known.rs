//! The server's model as the database records it for an index.

use super::provider::Provider;
use crate::config;

/// The server's model that an index was made with. While it is known, the server need not be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The model's name on the server.
    pub(super) model: String,
    signature: String,
    dimensions: usize,
}

/// A model's name for the content hash.
pub(super) fn signature(provider: Provider, model: &str, dimensions: usize) -> String {
    format!("{}:{model}@{dimensions}", provider.name())
}

impl Known {
    /// Reads the recorded name. `None` if the settings name another model or another length of vectors.
    #[must_use]
    pub fn of(settings: &config::Embedder, recorded: &str, dimensions: usize) -> Option<Self> {
        let (provider, set) = Provider::of(&settings.kind)?;
        let model = recorded.strip_prefix(provider.name())?.strip_prefix(':')?;
        let model = model.strip_suffix(&dimensions.to_string())?.strip_suffix('@')?;
        let is_named = settings.model.is_empty() || settings.model == model;
        let is_as_long = set.dimensions == 0 || set.dimensions == dimensions;
        (is_named && is_as_long).then(|| Self {
            model: model.to_owned(),
            signature: recorded.to_owned(),
            dimensions,
        })
    }

    /// The model's name in the content hash.
    #[must_use]
    pub fn signature(&self) -> &str {
        &self.signature
    }

    /// The number of dimensions of its vectors.
    #[must_use]
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn only_the_model_that_the_settings_name_is_known() {
        let of = |set: &[(&str, &str)], recorded: &str| {
            let fixed = [("REFARCH_EMBEDDER_KIND", "tei"), ("REFARCH_EMBEDDER_URL", "http://x")];
            let env = fixed.iter().chain(set).map(|(name, value)| ((*name).into(), (*value).into()));
            let settings = Settings::load(None, &env.collect(), &[]).unwrap();
            Known::of(&settings.embedder, recorded, 512).map(|known| (known.model, known.signature))
        };
        let recorded = signature(Provider::Tei, "a:b@c", 512);
        let known = Some(("a:b@c".to_owned(), recorded.clone()));
        assert_eq!(of(&[], &recorded), known, "any name, any length");
        for other in ["tei:a:b@c@51", "openai:a:b@c@512", "tei:a:b@c", "all-minilm"] {
            assert_eq!(of(&[], other), None, "{other}");
        }
        let (model, length) = ("REFARCH_EMBEDDER_MODEL", "REFARCH_EMBEDDER_DIMENSIONS");
        assert_eq!(of(&[(model, "a:b@c"), (length, "512")], &recorded), known);
        assert_eq!(of(&[(model, "a:b@c"), (length, "256")], &recorded), None);
        assert_eq!(of(&[(model, "other")], &recorded), None);
    }
}
