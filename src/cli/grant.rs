//! Grants on the command line.

use crate::backend::postgres::migrate::PARTS;

/// Reads a role of refarch and the name of a database role, such as `listen=capture_user`.
pub(super) fn grant(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((part, name)) if PARTS.contains(&part) && !name.is_empty() => Ok((part.into(), name.into())),
        _ => Err(format!("use ROLE=NAME, where ROLE is one of {}", PARTS.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_names_a_known_role_and_a_login() {
        assert_eq!(grant("listen=a=b"), Ok(("listen".into(), "a=b".into())));
        for wrong in ["listen", "listen=", "=a", "owner=a"] {
            assert!(grant(wrong).unwrap_err().contains("listen"), "{wrong}");
        }
    }
}
