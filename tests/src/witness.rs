//! Sees from outside whether a guest ran twice, whatever the processes say.
//!
//! With `beat=MS` beacon writes numbered beats to its console. The number is in the guest's memory and moves
//! with it, so of one boot no number can be written twice: not by two consoles at a time, and not
//! by one after the other. Each console of a boot is known here with its first and its last number;
//! where two of these stretches overlap, two processes have run one guest.
//!
//! ```text
//!   moved      console 1  1 2 3 4          rolled back     console 1  1 2 3 4 5 6
//!              console 2          5 6 7                    console 2
//!
//!   ran twice  console 1  1 2 3 4 5 6      ran again       console 1  1 2 3 4           5 6
//!              console 2          5 6 7                    console 2          5 6 7
//! ```
//!
//! Every [`Console`](crate::Console) reports its beats here by itself, and fails when its guest ran
//! twice.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Which numbers a console has had of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    console: u64,
    first: u64,
    last: u64,
}

/// By boot: the time stamp of the first instruction, which no other guest of this host has.
static BOOTS: Mutex<BTreeMap<u64, Vec<Stretch>>> = Mutex::new(BTreeMap::new());

fn boots() -> MutexGuard<'static, BTreeMap<u64, Vec<Stretch>>> {
    BOOTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number for a console.
pub(crate) fn new_console() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A console has seen a beat.
pub(crate) fn beat(console: u64, boot: u64, number: u64) {
    let mut boots = boots();
    let stretches = boots.entry(boot).or_default();
    match stretches.iter_mut().find(|stretch| stretch.console == console) {
        Some(mine) => {
            mine.first = mine.first.min(number);
            mine.last = mine.last.max(number);
        }
        None => stretches.push(Stretch { console, first: number, last: number }),
    }
}

/// The last beat that a console has seen, of whatever boot: its boot and number.
pub(crate) fn last_beat(console: u64) -> Option<(u64, u64)> {
    let boots = boots();
    let mine = boots.iter().rev().find_map(|(boot, stretches)| {
        let mine = stretches.iter().find(|stretch| stretch.console == console)?;
        Some((*boot, mine.last))
    });
    mine
}

/// How a guest that this console had ran twice, if one did.
pub(crate) fn ran_twice(console: u64) -> Option<String> {
    let boots = boots();
    let of_console = |stretches: &&Vec<Stretch>| stretches.iter().any(|s| s.console == console);
    let twice = boots.values().filter(of_console).find_map(|stretches| overlap(stretches));
    twice
}

fn overlap(stretches: &[Stretch]) -> Option<String> {
    for (index, one) in stretches.iter().enumerate() {
        for other in &stretches[index + 1..] {
            if one.first <= other.last && other.first <= one.last {
                return Some(format!(
                    "the guest ran twice: beats {} to {} on console {}, {} to {} on console {}",
                    one.first, one.last, one.console, other.first, other.last, other.console
                ));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_moves_there_and_back_ran_once() {
        let (boot, [a, b, c]) = (1, [(); 3].map(|()| new_console()));
        for (console, numbers) in [(a, 1..5), (b, 5..9), (c, 9..12), (b, 5..9)] {
            numbers.for_each(|number| beat(console, boot, number));
        }
        assert_eq!(last_beat(b), Some((1, 8)));
        assert!([a, b, c].iter().all(|console| ran_twice(*console).is_none()));
    }

    #[test]
    fn a_guest_that_runs_on_after_it_was_moved_ran_twice() {
        let (boot, [a, b, other]) = (2, [(); 3].map(|()| new_console()));
        (1..5).for_each(|number| beat(a, boot, number));
        beat(b, boot, 5);
        beat(other, 3, 5);
        assert_eq!(ran_twice(a), None);
        // A number of its own is enough: the other one had gone beyond it.
        beat(a, boot, 6);
        assert!(ran_twice(a).is_some() && ran_twice(b).is_some());
        assert_eq!(ran_twice(other), None);
    }
}
