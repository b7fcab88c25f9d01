//! A choice of cases in which every two values meet that can (pairwise testing, IEEE Std
//! 29119-4).

use std::collections::HashSet;

/// A case that is a combination of values.
pub trait Fields {
    /// Its values; those of a field are at the same place in each case.
    fn fields(&self) -> Vec<String>;
}

/// Two values that meet: of which fields, and what they are.
type Pair = (usize, usize, String);

fn pairs(case: &impl Fields) -> Vec<Pair> {
    let fields = case.fields();
    let mut pairs = Vec::new();
    for (one, first) in fields.iter().enumerate() {
        for (other, second) in fields.iter().enumerate().skip(one + 1) {
            pairs.push((one, other, format!("{first} {second}")));
        }
    }
    pairs
}

/// As few of `cases` as a greedy choice finds, in which all their pairs occur.
#[must_use]
pub fn pairwise<T: Fields + Copy>(cases: &[T]) -> Vec<T> {
    let mut missing: HashSet<Pair> = cases.iter().flat_map(pairs).collect();
    let mut chosen = Vec::new();
    while !missing.is_empty() {
        let gain = |case: &&T| pairs(*case).iter().filter(|pair| missing.contains(*pair)).count();
        // The last one of the best, so that the choice is the same each time.
        let Some(best) = cases.iter().max_by_key(gain) else { break };
        for pair in pairs(best) {
            missing.remove(&pair);
        }
        chosen.push(*best);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fire::Case;
    use crate::ways::Way;

    fn every_pair_occurs_in_few_of<T: Fields + Copy>(all: &[T]) {
        let chosen = pairwise(all);
        let of = |cases: &[T]| cases.iter().flat_map(pairs).collect::<HashSet<_>>();
        assert_eq!(of(all), of(&chosen));
        assert!(chosen.len() * 2 < all.len(), "{} of {}", chosen.len(), all.len());
    }

    #[test]
    fn every_pair_occurs_and_few_cases_are_needed() {
        every_pair_occurs_in_few_of(&Case::all());
        every_pair_occurs_in_few_of(&Way::all());
    }
}
