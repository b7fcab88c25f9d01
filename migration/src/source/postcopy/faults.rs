//! What page faults over the network tell of the way that memory came.

use serde::Serialize;

use crate::destination::DrainReport;

/// How far faults over the network could be avoided. Nobody sees which pages the guest touches once they are there:
/// what it would have asked for without push and pre-paging has no exact figure, and these are its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FaultReport {
    /// Pages that were asked for, of all that the destination lacked, 0 to 1. What the guest used meanwhile (its working set)
    /// was at most that: of it the share is no less.
    pub network_share: f64,
    /// Pages that were asked for when they were on their way already, and came by push.
    pub overtaken_pages: u64,
    /// Pages that push brought before anybody touched them: it avoided at most so many faults.
    pub push_avoided_at_most: u64,
    /// Pages that pre-paging brought before anybody touched them: it avoided at most so many faults.
    pub prepaging_avoided_at_most: u64,
}

impl FaultReport {
    /// Of `missing` pages that the destination lacked, `first` of which went with the state, in units of `unit` pages.
    /// `there` are a peer's figures, and may be anything.
    pub(super) fn new(missing: u64, first: u64, unit: u64, there: &DrainReport) -> Self {
        // The last unit of a region may have fewer pages.
        let asked = there.requests.saturating_mul(unit).min(missing);
        let overtaken = asked.saturating_sub(there.demand_pages);
        Self {
            network_share: asked as f64 / missing.max(1) as f64,
            overtaken_pages: overtaken,
            push_avoided_at_most: there.pushed_pages.saturating_sub(overtaken),
            prepaging_avoided_at_most: there.prepaged_pages.saturating_sub(first),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there(requests: u64, demand: u64, prepaged: u64, pushed: u64) -> DrainReport {
        DrainReport {
            requests,
            demand_pages: demand,
            prepaged_pages: prepaged,
            pushed_pages: pushed,
            ..DrainReport::default()
        }
    }

    #[test]
    fn what_came_unasked_may_have_avoided_a_fault() {
        // Of 25 that were asked for, 5 had been pushed before the request came.
        let report = FaultReport::new(100, 3, 1, &there(25, 20, 13, 67));
        let expected = FaultReport {
            network_share: 0.25,
            overtaken_pages: 5,
            push_avoided_at_most: 62,
            prepaging_avoided_at_most: 10,
        };
        assert_eq!(report, expected);
    }

    #[test]
    fn units_are_counted_in_pages_and_lies_stay_within_bounds() {
        let report = FaultReport::new(1024, 0, 512, &there(1, 512, 0, 512));
        assert_eq!((report.network_share, report.overtaken_pages), (0.5, 0));
        let report = FaultReport::new(0, 0, 512, &there(u64::MAX, 0, 0, 0));
        assert_eq!((report.network_share, report.overtaken_pages), (0.0, 0));
    }
}
