//! What a user writes after `--cpu`.

use std::fmt;
use std::str::FromStr;

use super::features::{Feature, ALIASES, REQUIRES};
use super::model::{Model, DERIVED, INDISPENSABLE, NOT_CARRIED};
use super::CpuError;

/// A CPU model with features added and removed: `x86-64-v3,+aes,-movbe`.
///
/// Feature names are those of `/proc/cpuinfo`. Adding a feature adds what it needs (`+avx2` adds
/// `avx` and `xsave`), removing one removes what needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuSpec {
    pub(super) model: Model,
    pub(super) added: Vec<Feature>,
    pub(super) removed: Vec<Feature>,
}

impl CpuSpec {
    /// Reads a specification.
    ///
    /// # Errors
    ///
    /// When a name is unknown, a feature cannot be had or cannot be removed, or two wishes
    /// contradict each other.
    pub fn parse(text: &str) -> Result<Self, CpuError> {
        let mut parts = text.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let model = Model::ALL
            .into_iter()
            .find(|model| model.name() == name)
            .ok_or_else(|| CpuError::UnknownModel { name: name.to_owned() })?;

        let mut spec = Self { model, added: Vec::new(), removed: Vec::new() };
        for part in parts {
            if let Some(name) = part.strip_prefix('+') {
                spec.added.push(addable(name)?);
            } else if let Some(name) = part.strip_prefix('-') {
                spec.removed.push(removable(name)?);
            } else {
                return Err(CpuError::NoSign { part: part.to_owned() });
            }
        }
        for added in &spec.added {
            let needed = with_requirements(*added);
            if let Some(removed) = spec.removed.iter().find(|removed| needed.contains(removed)) {
                let (added, removed) = (added.name, removed.name);
                return Err(CpuError::Contradiction { added, removed });
            }
        }
        Ok(spec)
    }

    /// The model.
    pub fn model(&self) -> Model {
        self.model
    }
}

impl FromStr for CpuSpec {
    type Err = CpuError;

    fn from_str(text: &str) -> Result<Self, CpuError> {
        Self::parse(text)
    }
}

impl fmt::Display for CpuSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.model)?;
        self.added.iter().try_for_each(|feature| write!(f, ",+{}", feature.name))?;
        self.removed.iter().try_for_each(|feature| write!(f, ",-{}", feature.name))
    }
}

fn known(name: &str) -> Result<Feature, CpuError> {
    let feature = Feature::by_name(name)
        .ok_or_else(|| CpuError::UnknownFeature { name: name.to_owned(), close: close(name) })?;
    match DERIVED.iter().find(|(derived, _)| *derived == name) {
        Some(&(_, reason)) => Err(CpuError::Derived { feature: feature.name, reason }),
        None => Ok(feature),
    }
}

fn addable(name: &str) -> Result<Feature, CpuError> {
    let feature = known(name)?;
    match NOT_CARRIED.iter().find(|(names, _)| names.contains(&name)) {
        Some(&(_, reason)) => Err(CpuError::NotCarried { feature: feature.name, reason }),
        None => Ok(feature),
    }
}

fn removable(name: &str) -> Result<Feature, CpuError> {
    let feature = known(name)?;
    if INDISPENSABLE.contains(&name) {
        return Err(CpuError::Indispensable { feature: feature.name });
    }
    Ok(feature)
}

/// The feature and all that it needs.
pub(super) fn with_requirements(feature: Feature) -> Vec<Feature> {
    closure(feature, |name| {
        REQUIRES.iter().filter(move |(user, _)| *user == name).map(|(_, needed)| *needed)
    })
}

/// The feature and all that need it.
pub(super) fn with_users(feature: Feature) -> Vec<Feature> {
    closure(feature, |name| {
        REQUIRES.iter().filter(move |(_, needed)| *needed == name).map(|(user, _)| *user)
    })
}

fn closure<I: Iterator<Item = &'static str>>(
    start: Feature,
    next: impl Fn(&'static str) -> I,
) -> Vec<Feature> {
    let mut found = vec![start];
    let mut done = 0;
    while done < found.len() {
        for feature in next(found[done].name).filter_map(Feature::by_name) {
            if !found.contains(&feature) {
                found.push(feature);
            }
        }
        done += 1;
    }
    found
}

/// At most this many names are suggested.
const SUGGESTIONS: usize = 3;
/// No feature has so long a name that something longer than this could be meant for it.
const LONGEST_GUESS: usize = 32;

/// Known names that somebody who wrote `name` may have meant, the closest first.
fn close(name: &str) -> Vec<&'static str> {
    if name.len() > LONGEST_GUESS {
        return Vec::new();
    }
    let name = name.to_ascii_lowercase().replace('.', "_");
    if let Some((_, feature)) = ALIASES.iter().find(|(alias, _)| *alias == name) {
        return vec![feature];
    }
    let mut candidates: Vec<(usize, &'static str)> = Feature::all()
        .map(|feature| (distance(&name, feature.name), feature.name))
        .filter(|(distance, candidate)| {
            *distance <= 2.min(candidate.len() / 2)
                || (name.len() >= 3 && candidate.contains(name.as_str()))
        })
        .collect();
    candidates.sort_unstable();
    candidates.truncate(SUGGESTIONS);
    candidates.into_iter().map(|(_, candidate)| candidate).collect()
}

/// Letters to add, drop, replace or swap with their neighbour to come from `a` to `b` (Levenshtein's
/// distance with transpositions, "optimal string alignment").
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    // table[i][j] is the distance between the first i letters of a and the first j of b.
    let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            if i == 0 || j == 0 {
                table[i][j] = i + j;
                continue;
            }
            let replaced = table[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(table[i - 1][j] + 1).min(table[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(table[i - 2][j - 2] + 1);
            }
            table[i][j] = least;
        }
    }
    table[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn error(text: &str) -> String {
        CpuSpec::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_specification_is_read() {
        let spec = CpuSpec::parse("x86-64-v3, +aes,-rdrand").unwrap();
        assert_eq!(spec.model(), Model::V3);
        assert_eq!(spec.to_string(), "x86-64-v3,+aes,-rdrand");
        assert_eq!(CpuSpec::parse(&spec.to_string()).unwrap(), spec);
        assert_eq!(CpuSpec::parse("host").unwrap().model(), Model::Host);
    }

    #[test]
    fn an_unknown_model_is_refused() {
        for text in ["", "+aes", "x86-64-v5", "Skylake"] {
            assert!(error(text).contains("host, x86-64-v2, x86-64-v3, x86-64-v4"), "{text}");
        }
    }

    #[test]
    fn an_unknown_feature_is_refused_with_close_ones() {
        assert!(error("host,+ase").contains("did you mean aes"), "{}", error("host,+ase"));
        assert!(error("host,-avx512").contains("avx512"), "{}", error("host,-avx512"));
        assert!(error("host,+sse3").contains("did you mean pni?"), "{}", error("host,+sse3"));
        assert!(error("host,+SSE4.1").contains("sse4_1"), "{}", error("host,+SSE4.1"));
        assert!(error("host,+qqqqqqqq").contains("/proc/cpuinfo"));
        assert!(error("host,+").contains("/proc/cpuinfo"));
        assert!(error("host,aes").contains("+aes"), "{}", error("host,aes"));
    }

    #[test]
    fn what_cannot_be_carried_is_refused() {
        assert!(error("host,+svm").contains("nested"));
        assert!(error("x86-64-v3,+vmx").contains("nested"));
        assert!(error("host,+perfctr_core").contains("performance monitoring"));
        assert!(CpuSpec::parse("host,-svm,-vmx").is_ok(), "removing what is never there is fine");
    }

    #[test]
    fn what_a_guest_cannot_do_without_stays() {
        assert!(error("host,-lm").contains("no 64-bit guest"));
        assert!(error("host,-hypervisor").contains("always"));
        assert!(error("host,+ht").contains("number of vCPUs"));
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(error("host,+aes,-aes").contains("+aes"));
        let text = error("x86-64-v2,-xsave,+avx2");
        assert!(text.contains("+avx2") && text.contains("-xsave"), "{text}");
        assert!(CpuSpec::parse("x86-64-v2,+xsave,-avx2").is_ok());
    }

    #[test]
    fn every_name_in_a_list_is_a_feature_and_none_has_two() {
        let mut names: Vec<_> = Feature::all().map(|feature| feature.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));

        let lists = Model::ALL.into_iter().flat_map(Model::features);
        let pairs = REQUIRES.iter().flat_map(|(user, needed)| [*user, *needed]);
        let masked = NOT_CARRIED.iter().flat_map(|(names, _)| names.iter().copied());
        let others = super::super::model::PROVIDED_BY_KVM.iter().chain(INDISPENSABLE).copied();
        let derived = DERIVED.iter().map(|(name, _)| *name);
        let aliases = ALIASES.iter().map(|(_, name)| *name);
        for name in lists.chain(pairs).chain(masked).chain(others).chain(derived).chain(aliases) {
            assert!(Feature::by_name(name).is_some(), "{name}");
        }
    }

    #[test]
    fn the_distance_counts_edits() {
        for (a, b, expected) in [
            ("", "abc", 3),
            ("kitten", "sitting", 3),
            ("aes", "aes", 0),
            ("ase", "aes", 1),
            ("aes", "rtm", 3),
        ] {
            assert_eq!((distance(a, b), distance(b, a)), (expected, expected));
        }
    }

    #[test]
    fn odd_text_is_refused_in_peace() {
        let long = format!("host,+{}", "é".repeat(10_000));
        for text in ["host,", "host,,", "host,+,-", "host,+\u{1F600}", "host,+-aes", "-", &long] {
            assert!(CpuSpec::parse(text).is_err(), "{text}");
        }
    }
}
