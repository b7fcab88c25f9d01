//! A choice of cases in which every two values meet that can (pairwise testing, IEEE Std
//! 29119-4).

use std::collections::HashSet;

use super::Case;

/// Two values that meet: which fields, and what they hold.
type Pair = (u8, String);

fn pairs(case: &Case) -> Vec<Pair> {
    let Case { fault, phase, connections, mode } = case;
    let fields = [
        format!("{fault:?}"),
        format!("{phase:?}"),
        connections.to_string(),
        mode.name().to_owned(),
    ];
    let mut pairs = Vec::new();
    for one in 0..fields.len() {
        for other in one + 1..fields.len() {
            // Both are below 4.
            let which = (one * fields.len() + other) as u8;
            pairs.push((which, format!("{} {}", fields[one], fields[other])));
        }
    }
    pairs
}

/// As few of `cases` as a greedy choice finds, in which all their pairs occur.
#[must_use]
pub fn pairwise(cases: &[Case]) -> Vec<Case> {
    let mut missing: HashSet<Pair> = cases.iter().flat_map(pairs).collect();
    let mut chosen: Vec<Case> = Vec::new();
    while !missing.is_empty() {
        let gain = |case: &&Case| pairs(case).iter().filter(|pair| missing.contains(*pair)).count();
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

    #[test]
    fn every_pair_occurs_and_few_cases_are_needed() {
        let all = Case::all();
        let chosen = pairwise(&all);
        let of = |cases: &[Case]| cases.iter().flat_map(pairs).collect::<HashSet<_>>();
        assert_eq!(of(&all), of(&chosen));
        assert!(chosen.len() * 2 < all.len(), "{} of {}", chosen.len(), all.len());
    }
}
