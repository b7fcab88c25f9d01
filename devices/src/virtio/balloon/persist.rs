//! The frozen state of the balloon.

use serde::{Deserialize, Serialize};

use super::{Balloon, Discard};
use crate::{Persist, PersistError};

/// State of a balloon, version 1. Which pages are in it only the guest knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages of 4 KiB that the host wants in it.
    pub target: u32,
    /// Pages of 4 KiB that the guest says are in it.
    pub actual: u32,
}

impl<D: Discard> Persist for Balloon<D> {
    const KIND: &'static str = "virtio-balloon";
    const VERSION: u16 = 1;
    type State = BalloonState;
    type Error = PersistError;

    fn save(&self) -> Result<BalloonState, PersistError> {
        Ok(BalloonState { target: self.target, actual: self.actual })
    }

    fn restore(&mut self, state: &BalloonState) -> Result<(), PersistError> {
        self.target = state.target;
        self.actual = state.actual;
        self.show_sizes();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::test_utils::balloon;
    use crate::virtio::test_utils::*;
    use crate::{Payload, Persist};

    #[test]
    fn a_moved_balloon_is_as_full() {
        let mut here = Driver::live(balloon(), 0);
        here.handle.change_config(|balloon| balloon.set_target(300));
        here.set(0x104, 250);
        let mut there = here.moved(balloon());
        assert_eq!(there.config::<8>(0), here.config::<8>(0));
        assert_eq!(there.handle.with_device(|balloon| balloon.target()), 300);
    }

    #[test]
    fn version_1_still_decodes() {
        let data = vec![251, 44, 1, 250];
        let payload = Payload { kind: "virtio-balloon".into(), instance: 0, version: 1, data };
        let mut balloon = balloon();
        balloon.restore_payload(&payload).unwrap();
        assert_eq!((balloon.target(), balloon.actual()), (300, 250));
        assert_eq!(balloon.save_payload(0).unwrap(), payload);
    }
}
