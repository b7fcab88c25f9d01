//! When the guest stood while it was switched, by the TSC, which the guest tells and this host reads too.

use std::time::{Duration, Instant};

use serde_json::Value;
use vmm::kvm::host_tsc;

/// A moment by both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    at: Instant,
    tsc: u64,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        Self { at: Instant::now(), tsc: host_tsc() }
    }
}

/// From when until when the guest stood, of which it says `switch`; the move was from `order` until `end`. `None` where
/// the guest's TSC is not this host's: then what it says is not between these two.
pub fn stood(switch: &Value, order: Moment, end: Moment) -> Option<(Instant, Instant)> {
    let tsc = switch["tsc"].as_u64().filter(|tsc| (order.tsc..end.tsc).contains(tsc))?;
    let gap = Duration::from_secs_f64(switch["gap_us"].as_f64()? / 1e6);
    let share = (tsc - order.tsc) as f64 / (end.tsc - order.tsc) as f64;
    let went_on = order.at + (end.at - order.at).mul_f64(share);
    Some((went_on - gap, went_on))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn the_switch_is_where_the_guest_says() {
        let at = Instant::now();
        let after = |ms| at + Duration::from_millis(ms);
        let (order, end) = (Moment { at, tsc: 1000 }, Moment { at: after(100), tsc: 2000 });
        let switch = |tsc| json!({ "tsc": tsc, "gap_us": 5000.0 });
        assert_eq!(stood(&switch(1500), order, end), Some((after(45), after(50))));
        assert_eq!(stood(&switch(999), order, end), None);
        assert_eq!(stood(&switch(2000), order, end), None);
    }
}
