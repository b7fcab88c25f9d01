//! The frozen state of the entropy device: there is none.

use serde::{Deserialize, Serialize};

use super::{EntropySource, Rng};
use crate::{Persist, PersistError};

/// State of an entropy device, version 1: nothing. It travels nevertheless: that the device is
/// there is part of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl<S: EntropySource> Persist for Rng<S> {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
    type State = RngState;
    type Error = PersistError;

    fn save(&self) -> Result<RngState, PersistError> {
        Ok(RngState {})
    }

    fn restore(&mut self, _: &RngState) -> Result<(), PersistError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::test_utils::rng;
    use crate::virtio::test_utils::*;
    use crate::Persist;

    #[test]
    fn a_moved_device_goes_on() {
        let mut here = Driver::live(rng(), 0);
        here.request(0, &[(DATA, 8, WRITE)]);
        let head = here.add(0, &[(DATA, 8, WRITE)]);
        let mut there = here.moved(rng());
        there.run(0);
        assert_eq!(there.used(0), [(head, 8)]);
        assert_eq!(there.peek(DATA, 8), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn version_1_still_decodes() {
        let payload =
            crate::Payload { kind: "virtio-rng".into(), instance: 0, version: 1, data: Vec::new() };
        assert_eq!(rng().save_payload(0).unwrap(), payload);
        rng().restore_payload(&payload).unwrap();
    }
}
