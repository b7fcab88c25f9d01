//! The frozen state of the keyboard controller: there is none.

use serde::{Deserialize, Serialize};

use super::I8042;
use crate::{Persist, PersistError};

/// State of the keyboard controller, version 1: nothing.
///
/// It travels nevertheless: that the device is there is part of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {}

impl Persist for I8042 {
    const KIND: &'static str = "i8042";
    const VERSION: u16 = 1;
    type State = I8042State;
    type Error = PersistError;

    fn save(&self) -> Result<I8042State, PersistError> {
        Ok(I8042State {})
    }

    fn restore(&mut self, _: &I8042State) -> Result<(), PersistError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::test_utils::controller;
    use super::*;
    use crate::Payload;

    #[test]
    fn version_1_still_decodes() {
        let payload = Payload { kind: "i8042".into(), instance: 0, version: 1, data: Vec::new() };
        let (mut controller, _) = controller();
        assert_eq!(controller.save_payload(0).unwrap(), payload);
        controller.restore_payload(&payload).unwrap();
        let more = Payload { data: vec![0], ..payload };
        assert!(matches!(
            controller.restore_payload(&more),
            Err(PersistError::Trailing { extra: 1, .. })
        ));
    }
}
