//! The frozen state of the console.

use std::io::Write;

use serde::{Deserialize, Serialize};

use super::Console;
use crate::{Persist, PersistError};

/// State of a console, version 1. Output has left it, input that found no buffer never entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Columns that the guest was told.
    pub columns: u16,
    /// Rows that the guest was told.
    pub rows: u16,
}

impl<W: Write + Send + 'static> Persist for Console<W> {
    const KIND: &'static str = "virtio-console";
    const VERSION: u16 = 1;
    type State = ConsoleState;
    type Error = PersistError;

    fn save(&self) -> Result<ConsoleState, PersistError> {
        Ok(ConsoleState { columns: self.columns, rows: self.rows })
    }

    fn restore(&mut self, state: &ConsoleState) -> Result<(), PersistError> {
        (self.columns, self.rows) = (state.columns, state.rows);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::test_utils::*;
    use super::super::{Console, RECEIVE};
    use crate::virtio::test_utils::*;
    use crate::{Payload, Persist};

    #[test]
    fn a_moved_console_goes_on() {
        let mut here = driver();
        here.handle.change_config(|console| console.resize(80, 25));
        let head = here.add(RECEIVE, &[(DATA, 4, WRITE)]);
        let mut there = here.moved(Console::new(Vec::new()));
        assert_eq!(there.config::<4>(0), [80, 0, 25, 0]);
        assert_eq!(receive(&there, b"x"), Some(1));
        assert_eq!(there.used(RECEIVE), [(head, 1)]);
    }

    #[test]
    fn version_1_still_decodes() {
        let data = vec![132, 251, 44, 1];
        let payload = Payload { kind: "virtio-console".into(), instance: 0, version: 1, data };
        let mut console = Console::new(Vec::new());
        console.restore_payload(&payload).unwrap();
        assert_eq!((console.columns, console.rows), (132, 300));
        assert_eq!(console.save_payload(0).unwrap(), payload);
    }
}
