//! Where a server is asked.

use reqwest::Url;

use super::provider::Provider;

/// The address of the request that embeds: the given address, with the provider's own path after it.
///
/// A query stays, since some servers want one with each request.
pub(super) fn embedding(base: &Url, provider: Provider) -> Url {
    let (root, endpoint) = provider.path();
    below(base, provider, root, endpoint)
}

/// The address at which text-embeddings-inference tells about itself.
pub(super) fn info(base: &Url, provider: Provider) -> Url {
    below(base, provider, "", "info")
}

/// `root` is what stands before the endpoint where the address has no path. An address that ends in the
/// embedding endpoint already is taken for the whole one.
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

/// An address for a message: without user, query and fragment, any of which may hold a secret.
pub(super) fn redacted(url: &Url) -> String {
    let mut shown = url.clone();
    // These fail only for addresses that can have no user.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.set_query(None);
    shown.set_fragment(None);
    shown.into()
}
