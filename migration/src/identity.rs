//! What names a migration, and the secret between its two ends.

use std::fmt;
use std::io;
use std::str::FromStr;

use rustix::rand::{getrandom, GetRandomFlags};

/// Names one attempt to migrate one VM: random, chosen by the source.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MigrationId(pub [u8; 16]);

/// Admits page connections and reclaims the VM: random, chosen by the destination. Neither shown
/// nor logged.
#[derive(Clone, Copy)]
pub struct Token([u8; 16]);

/// A migration id is 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a migration id: it has 32 hexadecimal digits")]
pub struct BadId(String);

impl MigrationId {
    /// A new one.
    ///
    /// # Errors
    /// The kernel has no randomness.
    pub fn random() -> io::Result<Self> {
        random_bytes().map(Self)
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MigrationId({self})")
    }
}

impl FromStr for MigrationId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        from_hex(text).map(Self).ok_or_else(|| BadId(text.chars().take(64).collect()))
    }
}

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// The kernel has no randomness.
    pub fn random() -> io::Result<Self> {
        random_bytes().map(Self)
    }

    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// For the wire and the journal only.
    pub(crate) fn bytes(&self) -> [u8; 16] {
        self.0
    }

    /// Whether both are the same, in a time that does not depend on where they differ.
    pub(crate) fn matches(&self, other: &Token) -> bool {
        let differ = self.0.iter().zip(&other.0).fold(0, |all, (a, b)| all | (a ^ b));
        std::hint::black_box(differ) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

fn random_bytes() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    // Up to 256 bytes come whole or not at all (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes)
}

/// 16 bytes from 32 hexadecimal digits.
pub(crate) fn from_hex(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_id_comes_back_from_its_text() {
        let id = MigrationId::random().unwrap();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_ne!(id, MigrationId::random().unwrap());
        for text in ["", "12", &"g".repeat(32), &"+f".repeat(16), &"a".repeat(33), "../../x"] {
            assert!(text.parse::<MigrationId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_token_is_not_shown() {
        let token = Token::from_bytes([0xab; 16]);
        assert!(!format!("{token:?}").contains("ab"));
        assert!(token.matches(&Token::from_bytes([0xab; 16])));
        assert!(!token.matches(&Token::random().unwrap()));
    }
}
