//! Measuring several VMMs in turn.

use crate::figures::{Better, Figure, Row};
use crate::guest::Vmm;
use crate::{Bench, Result};

/// What is measured of each, one figure for each quantity, in this order.
pub type Figures = Vec<(Vmm, Vec<Figure>)>;

/// Runs `measure` with each VMM in turn, `runs` times and once before that to warm up, and collects
/// the quantities that it gives.
pub fn alternate(
    bench: &Bench,
    vmms: &[Vmm],
    runs: usize,
    quantities: usize,
    mut measure: impl FnMut(Vmm) -> Result<Vec<std::result::Result<f64, String>>>,
) -> Result<Figures> {
    let mut all: Figures = vmms.iter().map(|vmm| (*vmm, vec![Figure::new(); quantities])).collect();
    for run in 0..=runs {
        bench.run(run, runs);
        for (vmm, figures) in &mut all {
            let measured = match (*vmm, &bench.tools.qemu) {
                (Vmm::Minivmm, _) => measure(*vmm)?,
                (_, Err(why)) => vec![Err(why.clone()); quantities],
                // Another program's failure is a finding, not the end.
                (_, Ok(_)) => match measure(*vmm) {
                    Ok(samples) => samples,
                    Err(error) => vec![Err(error.to_string()); quantities],
                },
            };
            if run > 0 {
                for (figure, sample) in figures.iter_mut().zip(measured) {
                    figure.add(sample);
                }
            }
        }
    }
    Ok(all)
}

/// A row of the quantity with this index; the first VMM is minivmm.
pub fn row(figures: &Figures, index: usize, template: Row) -> Row {
    let mut of = figures.iter().map(|(vmm, figures)| (vmm.name(), figures[index].clone()));
    let minivmm = of.next().map_or_else(Figure::new, |(_, figure)| figure);
    let peers = of.map(|(name, figure)| (name.to_owned(), figure)).collect();
    Row { minivmm, peers, ..template }
}

/// A row without figures; lower is better, one decimal.
pub fn template(bench: &'static str, what: impl Into<String>, unit: &'static str) -> Row {
    Row {
        bench,
        what: what.into(),
        unit,
        better: Better::Lower,
        digits: 1,
        minivmm: Figure::new(),
        target: None,
        peers: Vec::new(),
    }
}
