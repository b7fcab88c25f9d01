//! A snapshot that does anything.

use arbitrary::{Result, Unstructured};
use devices::virtio::VirtioControl;
use devices::{Payload, Persist};

use super::subjects::{Ballast, Card, Disk, Echo, Entropy, Screen, Subject};
use super::world::{memory, World};

/// Restores devices from payloads that nobody wrote, and runs what was accepted.
pub fn restore(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    // The end of the input is the end of the run.
    let _ = match input.int_in_range(0..=5) {
        Ok(0) => hostile::<Disk>(&mut input),
        Ok(1) => hostile::<Card>(&mut input),
        Ok(2) => hostile::<Entropy>(&mut input),
        Ok(3) => hostile::<Ballast>(&mut input),
        Ok(4) => hostile::<Screen>(&mut input),
        Ok(_) => hostile::<Echo>(&mut input),
        Err(error) => Err(error),
    };
}

fn hostile<S: Subject>(input: &mut Unstructured<'_>) -> Result<()> {
    let mut here = World::<S>::new(memory());
    here.prepare(input)?;
    let good = [here.transport.save_payload(0), here.handle.save_device(0)].map(|p| p.unwrap());
    let mut there = World::<S>::new(here.memory.clone());
    let [registers, device] = good;
    let registers = changed(registers, input)?;
    let device = changed(device, input)?;
    let accepted = there.transport.restore_payload(&registers).is_ok();
    let accepted = accepted && there.handle.restore_device(&device).is_ok();
    if accepted {
        // What was accepted is what is there, and can be saved by the next.
        let saved = there.transport.save_payload(0).unwrap();
        let mut again = World::<S>::new(here.memory.clone());
        again.transport.restore_payload(&saved).unwrap();
        there.run_on(input)?;
    }
    there.must_recover();
    Ok(())
}

/// Some bytes are others, or more, or fewer, or none of them is what it was.
fn changed(mut payload: Payload, input: &mut Unstructured<'_>) -> Result<Payload> {
    match input.int_in_range(0..=9)? {
        0 => payload.version = input.arbitrary()?,
        1 => payload.data = input.bytes(input.len().min(64))?.to_vec(),
        2 => payload.data.truncate(input.int_in_range(0..=payload.data.len())?),
        3 => payload.data.push(input.arbitrary()?),
        4 => {}
        _ => {
            for _ in 0..input.int_in_range(1..=4)? {
                if let Some(last) = payload.data.len().checked_sub(1) {
                    let at = input.int_in_range(0..=last)?;
                    payload.data[at] = input.arbitrary()?;
                }
            }
        }
    }
    Ok(payload)
}
