//! A keyboard controller wired to a counter.

use std::sync::Arc;

use super::I8042;
use crate::test_utils::CountingPower;

pub(super) fn controller() -> (I8042, Arc<CountingPower>) {
    let power = Arc::new(CountingPower::default());
    (I8042::new(power.clone()), power)
}
