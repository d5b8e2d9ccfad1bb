//! Digests and random bytes as hexadecimal digits.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// The first 12 hexadecimal digits of SHA-256: enough to tell folders and installations apart.
pub fn short_hash(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes)[..6])
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
