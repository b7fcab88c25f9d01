//! Every fault in every phase, and every way in which memory follows its guest.

use std::sync::Mutex;
use std::time::Instant;

use tests::fire::{self, Case};
use tests::ways::Way;

use crate::event::Event;
use crate::options::Options;
use crate::part::Part;
use crate::summary::Summary;

/// One case, here; it fails by panicking.
pub fn case(case: Case) {
    let came = format!("{:?}", fire::run(case));
    Event::Fault { case: case.to_string(), fault: format!("{:?}", case.fault), came }.say();
}

/// A way in which memory follows, here; it fails by panicking.
pub fn way(way: Way) {
    way.run();
    let fault = format!("none, {}", way.mode);
    Event::Fault { case: way.to_string(), fault, came: "Destination".to_owned() }.say();
}

/// All cases, so many at a time.
pub fn run(options: &Options, summary: &mut Summary) {
    let faults = Case::all().into_iter().map(|case| case.to_string());
    let cases: Vec<String> = faults.chain(Way::all().iter().map(Way::to_string)).collect();
    let (count, summary) = (cases.len(), Mutex::new(summary));
    let next = Mutex::new(cases.into_iter().zip(1..));
    let work = || loop {
        // In a statement of its own, so that the lock is held no longer.
        let next = next.lock().unwrap().next();
        let Some((name, number)) = next else { return };
        let begun = Instant::now();
        let mut events = Vec::new();
        let part = Part { name: name.clone(), args: vec!["case".to_owned(), name.clone()] };
        let result = part.run(&options.logs, |event| events.push(event));
        let seconds = begun.elapsed().as_secs_f64();
        match (&result, events.first()) {
            (Ok(()), Some(event)) => println!("case {number} of {count}: {event}, {seconds:.1} s"),
            _ => println!("case {number} of {count}: {name}: FAILED, {seconds:.1} s"),
        }
        let mut summary = summary.lock().unwrap();
        events.into_iter().for_each(|event| summary.matrix(event));
        summary.ended(result);
    };
    std::thread::scope(|scope| {
        (0..options.jobs).for_each(|_| {
            scope.spawn(work);
        });
    });
}
