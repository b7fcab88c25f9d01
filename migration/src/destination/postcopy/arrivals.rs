//! Which pages are missing, who waits for them, and putting them in. Shared by all threads that bring pages and the
//! one that reads faults.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::address::{Gfn, PageRange, PAGE_BYTES};
use crate::destination::postcopy::DrainReport;
use crate::histogram::Histogram;
use crate::layout::MemoryLayout;
use crate::page_set::PageSet;
use crate::stream::Problem;
use crate::userfault::{Fault, Put, Userfault};
use crate::vm::VmError;

/// Which way a page came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::destination) enum Way {
    /// On the connection for requests.
    Demand,
    /// On a page connection.
    Push,
}

/// A page that was asked for.
struct Waiting {
    since: Instant,
    threads: Vec<(i32, Instant)>,
}

#[derive(Default)]
struct Book {
    waiting: HashMap<Gfn, Waiting>,
    latency: Histogram,
    /// Microseconds by thread.
    blocked: HashMap<i32, Duration>,
}

/// See the module's documentation.
pub(in crate::destination) struct Arrivals {
    userfault: Userfault,
    layout: Arc<MemoryLayout>,
    unit: u64,
    /// Not here yet. A page is put in first and taken out of here then, so that one that is not in here is there, or
    /// never was anywhere.
    missing: Mutex<PageSet>,
    left: AtomicU64,
    book: Mutex<Book>,
    /// Length of `book.waiting`, so that who brings pages need not look when nobody waits.
    waiting: AtomicUsize,
    requests: AtomicU64,
    demand_pages: AtomicU64,
    prepaged_pages: AtomicU64,
    pushed_pages: AtomicU64,
    zero_pages: AtomicU64,
    local_pages: AtomicU64,
    duplicate_pages: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Arrivals {
    /// `userfault` is registered; `missing` consists of whole units of `unit` pages.
    pub(in crate::destination) fn new(userfault: Userfault, unit: u64, missing: PageSet) -> Self {
        Self {
            userfault,
            layout: Arc::clone(missing.layout()),
            unit,
            left: AtomicU64::new(missing.count()),
            missing: Mutex::new(missing),
            book: Mutex::default(),
            waiting: AtomicUsize::new(0),
            requests: AtomicU64::new(0),
            demand_pages: AtomicU64::new(0),
            prepaged_pages: AtomicU64::new(0),
            pushed_pages: AtomicU64::new(0),
            zero_pages: AtomicU64::new(0),
            local_pages: AtomicU64::new(0),
            duplicate_pages: AtomicU64::new(0),
        }
    }

    pub(in crate::destination) fn userfault(&self) -> &Userfault {
        &self.userfault
    }

    pub(super) fn layout(&self) -> &Arc<MemoryLayout> {
        &self.layout
    }

    /// Pages that are missing.
    pub(in crate::destination) fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    pub(in crate::destination) fn missing(&self) -> PageSet {
        lock(&self.missing).clone()
    }

    /// Sees to a fault: makes the page here if it never was at the source, or has to be asked for, which `ask` is told then.
    pub(super) fn fault(
        &self,
        fault: Fault,
        now: Instant,
        ask: &mut Vec<PageRange>,
    ) -> Result<(), VmError> {
        let page = self.unit_of(fault.gfn)?;
        {
            let mut book = lock(&self.book);
            // Held until the wait is in the book: who brings the page takes it out of `missing` first, and looks for who waits
            // then.
            let missing = lock(&self.missing);
            if missing.intersects(page) {
                let waiting = book.waiting.entry(page.start()).or_insert_with(|| {
                    ask.push(page);
                    self.requests.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(page = %page, thread = fault.thread, "a page is asked for");
                    Waiting { since: now, threads: Vec::new() }
                });
                waiting.threads.push((fault.thread, now));
                self.waiting.store(book.waiting.len(), Ordering::Release);
                return Ok(());
            }
        }
        match self.zeros(page)? {
            Put::Done => {
                self.local_pages.fetch_add(page.pages(), Ordering::Relaxed);
            }
            // It came meanwhile.
            Put::Already => self.userfault.wake(page)?,
        }
        Ok(())
    }

    /// All pages that somebody waits for, to be asked for again.
    pub(super) fn outstanding(&self) -> Vec<PageRange> {
        let book = lock(&self.book);
        book.waiting.keys().map(|gfn| PageRange::trusted(*gfn, self.unit)).collect()
    }

    /// Since when somebody has been waiting longest.
    pub(super) fn oldest(&self) -> Option<Instant> {
        lock(&self.book).waiting.values().map(|waiting| waiting.since).min()
    }

    /// Waits begin anew: nobody is to blame for the time without a connection.
    pub(super) fn restart_waits(&self) {
        let now = Instant::now();
        lock(&self.book).waiting.values_mut().for_each(|waiting| waiting.since = now);
    }

    /// Puts pages in that came; `data` is `None` for zeros. Returns whether these were the last ones.
    ///
    /// # Errors
    /// The pages are not missing, or not whole units.
    pub(super) fn bring(
        &self,
        range: PageRange,
        data: Option<&[u8]>,
        way: Way,
    ) -> Result<bool, Problem> {
        self.check(range)?;
        let put = match data {
            Some(data) => self.userfault.put(range, data)?,
            None => self.zeros(range)?,
        };
        if put == Put::Already {
            self.bring_singly(range, data)?;
        }
        let removed = lock(&self.missing).remove(range)?;
        // Two connections may have brought a page at one time.
        self.duplicate_pages.fetch_add(range.pages() - removed, Ordering::Relaxed);
        self.account(range, data.is_none(), way);
        Ok(self.left.fetch_sub(removed, Ordering::AcqRel) == removed)
    }

    /// Some of the pages are there although they were missing: nothing may write over them.
    fn bring_singly(&self, range: PageRange, data: Option<&[u8]>) -> Result<(), Problem> {
        let mut at = 0;
        for piece in range.chunks(self.unit) {
            let bytes = piece.bytes() as usize;
            let put = match data {
                Some(data) => self.userfault.put(piece, &data[at..at + bytes])?,
                None => self.zeros(piece)?,
            };
            if put == Put::Already {
                self.userfault.wake(piece)?;
            }
            at += bytes;
        }
        Ok(())
    }

    fn check(&self, range: PageRange) -> Result<(), Problem> {
        if lock(&self.missing).contains(range) && self.is_whole(range) {
            return Ok(());
        }
        self.duplicate_pages.fetch_add(range.pages(), Ordering::Relaxed);
        Err(Problem::DuplicatePages(range))
    }

    fn is_whole(&self, range: PageRange) -> bool {
        let region = self.layout.regions().find(|region| region.contains(range));
        region.is_some_and(|region| {
            let first = range.start().0 - region.start().0;
            first % self.unit == 0
                && (range.pages() % self.unit == 0 || range.end() == region.end())
        })
    }

    fn account(&self, range: PageRange, zeros: bool, way: Way) {
        let mut asked = 0;
        if self.waiting.load(Ordering::Acquire) > 0 {
            let now = Instant::now();
            let mut book = lock(&self.book);
            for piece in range.chunks(self.unit) {
                let Some(waiting) = book.waiting.remove(&piece.start()) else { continue };
                asked += piece.pages();
                let nanos = now.saturating_duration_since(waiting.since).as_nanos();
                book.latency.add(u64::try_from(nanos).unwrap_or(u64::MAX));
                for (thread, since) in waiting.threads {
                    *book.blocked.entry(thread).or_default() +=
                        now.saturating_duration_since(since);
                }
            }
            self.waiting.store(book.waiting.len(), Ordering::Release);
        }
        let count = |counter: &AtomicU64, pages| {
            counter.fetch_add(pages, Ordering::Relaxed);
        };
        match way {
            Way::Push => count(&self.pushed_pages, range.pages()),
            Way::Demand => {
                count(&self.demand_pages, asked);
                count(&self.prepaged_pages, range.pages() - asked);
            }
        }
        if zeros {
            count(&self.zero_pages, range.pages());
        }
    }

    /// Zeros; the kernel has no ready-made huge page of them.
    fn zeros(&self, range: PageRange) -> Result<Put, VmError> {
        if self.unit == 1 {
            return self.userfault.put_zeros(range);
        }
        let zeros = vec![0; self.unit as usize * PAGE_BYTES];
        let mut all = Put::Done;
        for piece in range.chunks(self.unit) {
            if self.userfault.put(piece, &zeros[..piece.bytes() as usize])? == Put::Already {
                all = Put::Already;
            }
        }
        Ok(all)
    }

    /// What can only come together with a page.
    fn unit_of(&self, gfn: Gfn) -> Result<PageRange, VmError> {
        let page = PageRange::new(gfn, 1)?;
        if self.unit == 1 {
            return Ok(page);
        }
        let region = self.layout.regions().find(|region| region.contains(page));
        let region = region.ok_or(crate::address::RangeError::Outside(page))?;
        let start = gfn.0 - (gfn.0 - region.start().0) % self.unit;
        Ok(PageRange::new(Gfn(start), self.unit.min(region.end().0 - start))?)
    }

    /// What was done so far; times of threads by their names.
    pub(super) fn report(&self) -> DrainReport {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (latency, blocked) = {
            let book = lock(&self.book);
            (book.latency.clone(), book.blocked.clone())
        };
        let mut by_name: BTreeMap<String, u64> = BTreeMap::new();
        for (thread, time) in blocked {
            *by_name.entry(name_of(thread)).or_default() += crate::report::as_micros(time);
        }
        let blocked_us = by_name.into_iter().collect();
        DrainReport {
            complete: self.left() == 0,
            missing_pages: self.left(),
            requests: load(&self.requests),
            demand_pages: load(&self.demand_pages),
            prepaged_pages: load(&self.prepaged_pages),
            pushed_pages: load(&self.pushed_pages),
            zero_pages: load(&self.zero_pages),
            local_pages: load(&self.local_pages),
            duplicate_pages: load(&self.duplicate_pages),
            latency,
            blocked_us,
            ..DrainReport::default()
        }
    }
}

/// The name of a thread of this process, as the kernel has it; others that touch guest memory are the kernel's own, which
/// bring pages in for a vCPU that meanwhile does something else (asynchronous page faults of KVM).
fn name_of(thread: i32) -> String {
    let path = format!("/proc/self/task/{thread}/comm");
    let name = std::fs::read_to_string(path);
    name.map_or_else(|_| "kernel".to_owned(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::simulated::SimulatedVm;
    use crate::vm::GuestMemory;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(Gfn(start), pages).unwrap()
    }

    #[test]
    fn only_whole_units_that_are_missing_are_put_in() {
        let Ok(mut userfault) = Userfault::open().inspect_err(|error| println!("skipped: {error}"))
        else {
            return;
        };
        let vm = SimulatedVm::new(MemoryLayout::new([range(3, 10)]).unwrap()).unwrap();
        userfault.register(&vm).unwrap();
        let missing = PageSet::full(vm.layout());
        let arrivals = Arrivals::new(userfault, 4, missing);
        let data = vec![9; 10 * PAGE_BYTES];
        let bring = |range: PageRange| {
            arrivals.bring(range, Some(&data[..range.bytes() as usize]), Way::Push)
        };
        for part in [range(3, 3), range(4, 4), range(3, 5), range(11, 1), range(7, 5)] {
            assert!(bring(part).is_err(), "{part} is not whole");
        }
        assert!(!bring(range(7, 4)).unwrap());
        assert!(bring(range(7, 4)).is_err(), "it is there");
        assert!(bring(range(3, 8)).is_err(), "a part of it is there");
        assert_eq!(arrivals.left(), 6);
        assert!(!bring(range(11, 2)).unwrap(), "the last unit of a region may be short");
        assert!(bring(range(3, 4)).unwrap(), "the last one");
        arrivals.userfault().finish().unwrap();
    }
}
