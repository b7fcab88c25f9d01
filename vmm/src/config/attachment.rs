//! What a network card is plugged into.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::devices::parse_tap;
use super::value::saved_as_text;
use super::ConfigError;
use crate::network::parse_network;

/// What a network card is plugged into: `TAP` or `tap=TAP`, `bridge=BRIDGE`, `network=NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Attachment {
    /// A tap interface that somebody made.
    Tap(String),
    /// A tap that is made for the card, as a port of this bridge.
    Bridge(String),
    /// The same, of a network that was declared on the host (`minivmm network`).
    Network(String),
}

impl Attachment {
    /// The tap that is given, if one is.
    #[must_use]
    pub fn tap(&self) -> Option<&str> {
        match self {
            Self::Tap(tap) => Some(tap),
            Self::Bridge(_) | Self::Network(_) => None,
        }
    }

    /// Checks the name again, of one that came from elsewhere.
    ///
    /// # Errors
    /// It is none.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.to_string().parse::<Self>().map(drop)
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(tap) => write!(f, "tap={tap}"),
            Self::Bridge(bridge) => write!(f, "bridge={bridge}"),
            Self::Network(network) => write!(f, "network={network}"),
        }
    }
}

impl FromStr for Attachment {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once('=') {
            Some(("bridge", bridge)) => parse_tap(bridge)
                .map(Self::Bridge)
                .map_err(|_| ConfigError::Bridge(bridge.to_owned())),
            Some(("network", network)) => parse_network(network)
                .map(Self::Network)
                .map_err(|_| ConfigError::Network(network.to_owned())),
            Some(("tap", tap)) => parse_tap(tap).map(Self::Tap),
            _ => parse_tap(text).map(Self::Tap),
        }
    }
}

saved_as_text!(Attachment, ConfigError);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_a_card_is_plugged_into_is_read_as_it_is_written() {
        for text in ["tap=t0", "bridge=br0", "network=blue"] {
            assert_eq!(text.parse::<Attachment>().unwrap().to_string(), text);
        }
        assert_eq!("t0".parse::<Attachment>().unwrap(), Attachment::Tap("t0".into()));
        for bad in
            ["", "a/b", "tap=", "bridge=a b", "network=", "network=a.b", "network=01234567890"]
        {
            assert!(bad.parse::<Attachment>().is_err(), "{bad}");
        }
    }
}
