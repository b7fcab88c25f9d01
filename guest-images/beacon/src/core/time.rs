//! Time stamp counter arithmetic and the KVM paravirtual clock.

/// Set in [`ClockPage::flags`] when the host stopped the vCPU (Documentation/virt/kvm/x86/msr.rst,
/// `MSR_KVM_SYSTEM_TIME_NEW`); the guest clears it.
pub const GUEST_STOPPED: u8 = 1 << 1;

/// Converts between TSC ticks and nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct TscScale {
    khz: u64,
    /// Nanoseconds per tick, as a 32.32 fixed-point number.
    nanoseconds_per_tick: u64,
}

impl TscScale {
    /// A scale for a frequency in kHz; 0 is taken as 1 GHz, since a guest without any idea of
    /// its frequency still has to run.
    #[must_use]
    pub const fn new(khz: u64) -> Self {
        let khz = if khz == 0 { 1_000_000 } else { khz };
        Self { khz, nanoseconds_per_tick: (1_000_000 << 32) / khz }
    }

    /// The frequency in kHz.
    #[must_use]
    pub const fn khz(self) -> u64 {
        self.khz
    }

    /// Nanoseconds in `ticks`.
    #[must_use]
    pub const fn nanoseconds(self, ticks: u64) -> u64 {
        ((ticks as u128 * self.nanoseconds_per_tick as u128) >> 32) as u64
    }

    /// Ticks in `microseconds`.
    #[must_use]
    pub const fn ticks_of_micros(self, microseconds: u64) -> u64 {
        (microseconds as u128 * self.khz as u128 / 1000) as u64
    }
}

/// A consistent copy of `struct pvclock_vcpu_time_info`
/// (Documentation/virt/kvm/x86/msr.rst), as far as time is computed from it.
#[derive(Clone, Copy, Debug)]
pub struct ClockPage {
    /// TSC at `system_time`.
    pub tsc_timestamp: u64,
    /// Nanoseconds at `tsc_timestamp`.
    pub system_time: u64,
    /// Multiplier, 0.32 fixed point.
    pub tsc_to_system_mul: u32,
    /// Shift before the multiplication, left if positive.
    pub tsc_shift: i8,
}

impl ClockPage {
    /// The clock at `tsc`, in nanoseconds.
    #[must_use]
    pub fn nanoseconds(&self, tsc: u64) -> u64 {
        let delta = tsc.wrapping_sub(self.tsc_timestamp);
        let shift = self.tsc_shift.clamp(-63, 63);
        let delta = if shift < 0 { delta >> -shift } else { delta << shift };
        let scaled = (u128::from(delta) * u128::from(self.tsc_to_system_mul)) >> 32;
        self.system_time.wrapping_add(scaled as u64)
    }

    /// The TSC frequency in kHz that the page implies.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u64> {
        if self.tsc_to_system_mul == 0 {
            return None;
        }
        let khz = (1_000_000_u128 << 32) / u128::from(self.tsc_to_system_mul);
        let shift = self.tsc_shift.clamp(-31, 31);
        let khz = if shift < 0 { khz << -shift } else { khz >> shift };
        u64::try_from(khz).ok().filter(|&khz| khz != 0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn scale_goes_both_ways() {
        let scale = TscScale::new(2_596_000);
        assert_eq!(scale.ticks_of_micros(1_000_000), 2_596_000_000);
        let ns = scale.nanoseconds(2_596_000_000);
        assert!((999_999_000..=1_000_000_000).contains(&ns), "{ns}");
        // A year of ticks must not overflow.
        let year = scale.ticks_of_micros(365 * 86_400 * 1_000_000);
        assert!(scale.nanoseconds(year) / 1_000_000_000 >= 365 * 86_400 - 1);
    }

    #[test]
    fn clock_page_follows_the_specification() {
        // 2 GHz: one tick is half a nanosecond: (delta >> 0) * 2^31 >> 32.
        let page = ClockPage {
            tsc_timestamp: 1000,
            system_time: 5_000,
            tsc_to_system_mul: 1 << 31,
            tsc_shift: 0,
        };
        assert_eq!(page.nanoseconds(3000), 6_000);
        assert_eq!(page.tsc_khz(), Some(2_000_000));
        // 1 GHz expressed with a shift: (delta << 1) * 2^31 >> 32.
        let page = ClockPage { tsc_shift: 1, ..page };
        assert_eq!(page.nanoseconds(3000), 7_000);
        assert_eq!(page.tsc_khz(), Some(1_000_000));
        // 4 GHz: (delta >> 1) * 2^31 >> 32.
        let page = ClockPage { tsc_shift: -1, ..page };
        assert_eq!(page.nanoseconds(3000), 5_500);
        assert_eq!(page.tsc_khz(), Some(4_000_000));
    }
}
