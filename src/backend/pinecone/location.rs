//! The location of records: different spellings of the same host and namespace.

/// The name of the default namespace, where Pinecone gives it one.
pub(super) const DEFAULT_NAMESPACE: &str = "__default__";

/// The one spelling of a namespace. The default namespace is the empty string.
#[must_use]
pub fn normalize_namespace(namespace: &str) -> &str {
    if namespace == DEFAULT_NAMESPACE { "" } else { namespace }
}

/// The one spelling of a host: without scheme and path, in lower case.
#[must_use]
pub fn normalize_host(given: &str) -> String {
    let given = given.trim();
    let rest = given.split_once("://").map_or(given, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default().to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_location_are_one() {
        for given in
            ["shop-x.svc.pinecone.io", " https://Shop-x.svc.pinecone.io/ ", "http://shop-x.svc.pinecone.io"]
        {
            assert_eq!(normalize_host(given), "shop-x.svc.pinecone.io", "{given}");
        }
        assert_eq!(
            (normalize_namespace("__default__"), normalize_namespace(""), normalize_namespace("n1")),
            ("", "", "n1")
        );
    }
}
