//! The frozen state of the network card.

use serde::{Deserialize, Serialize};

use super::{MacAddress, Net, NetBackend};
use crate::{Persist, PersistError};

/// State of a network card, version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Its address.
    pub mac: [u8; 6],
    /// The MTU that the guest was told, if any, bytes.
    pub mtu: Option<u16>,
    /// Whether the cable is plugged in.
    pub link_up: bool,
    /// Whether the guest was asked to announce itself and has not yet.
    pub announce_wanted: bool,
}

impl<B: NetBackend> Persist for Net<B> {
    const KIND: &'static str = "virtio-net";
    const VERSION: u16 = 1;
    type State = NetState;
    type Error = PersistError;

    fn save(&self) -> Result<NetState, PersistError> {
        Ok(NetState {
            mac: self.config.mac.0,
            mtu: self.config.mtu,
            link_up: self.link_up,
            announce_wanted: self.announce_wanted,
        })
    }

    /// The address goes with the guest, whatever was configured here.
    fn restore(&mut self, state: &NetState) -> Result<(), PersistError> {
        self.config.mac = MacAddress(state.mac);
        self.config.mtu = state.mtu;
        self.link_up = state.link_up;
        self.announce_wanted = state.announce_wanted;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::test_utils::*;
    use super::super::RECEIVE;
    use crate::virtio::test_utils::*;
    use crate::{Payload, Persist};

    #[test]
    fn a_moved_card_goes_on() {
        let mut here = Driver::live(net(Wire::default()), 0);
        here.handle.change_config(|net| net.announce());
        let head = here.add(RECEIVE, &[(DATA, 2048, WRITE)]);
        let mut there = here.moved(net(Wire::default()));
        assert_eq!(there.config::<12>(0), here.config::<12>(0));
        let offloads = there.handle.with_device(|net| net.backend_mut().offloads.unwrap());
        assert!(offloads.checksum && offloads.tso4 && offloads.tso6 && offloads.ecn);
        there.arrives(&[7; 100]);
        assert_eq!(there.used(RECEIVE), [(head, 112)]);
    }

    #[test]
    fn version_1_still_decodes() {
        let mut data = MAC.to_vec();
        data.extend([1, 251, 220, 5, 1, 0]);
        let payload = Payload { kind: "virtio-net".into(), instance: 0, version: 1, data };
        let mut card = net(Wire::default());
        assert_eq!(card.save_payload(0).unwrap(), payload);
        card.restore_payload(&payload).unwrap();
    }
}
