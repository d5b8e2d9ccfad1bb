//! The URLs of an embedding server.

use reqwest::Url;

use super::provider::Provider;

/// The URL for embedding: the configured URL, with the provider's path appended.
///
/// The query of the URL stays, since some servers need it with each request.
pub(super) fn embedding(base: &Url, provider: Provider) -> Url {
    let (root, endpoint) = provider.path();
    below(base, provider, root, endpoint)
}

/// The URL at which text-embeddings-inference describes itself.
pub(super) fn info(base: &Url, provider: Provider) -> Url {
    below(base, provider, "", "info")
}

/// Appends `endpoint` to the path. If the URL has no path, `root` is put before the endpoint. A URL that
/// already ends in the embedding endpoint is used as it is.
fn below(base: &Url, provider: Provider, root: &str, endpoint: &str) -> Url {
    let given = base.path().trim_end_matches('/');
    let whole = format!("/{}", provider.path().1);
    let root = match given.strip_suffix(&whole) {
        Some(before) => before,
        None if given.is_empty() => root,
        None => given,
    };
    let mut url = base.clone();
    url.set_path(&format!("{root}/{endpoint}"));
    url
}

/// The URL for messages, without user, query and fragment, because each of them may hold a secret.
pub(super) fn redacted(url: &Url) -> String {
    let mut shown = url.clone();
    // These calls fail only for URLs that cannot have a user.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.set_query(None);
    shown.set_fragment(None);
    shown.into()
}
