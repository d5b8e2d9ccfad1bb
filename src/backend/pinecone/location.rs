//! Where records are: spellings of hosts and namespaces that mean the same.

/// How the default namespace is called where it has a name.
pub(super) const DEFAULT_NAMESPACE: &str = "__default__";

/// A namespace's one spelling; the default one is empty.
#[must_use]
pub fn normalize_namespace(namespace: &str) -> &str {
    if namespace == DEFAULT_NAMESPACE { "" } else { namespace }
}

/// A host's one spelling: without scheme, path and capitals.
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
