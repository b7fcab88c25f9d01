//! All that happens while the guest stands: the state, the last pages, and the destination's word
//! that everything is loaded.

use std::sync::Arc;
use std::time::Instant;

use crate::handover::{Cause, SourceEvent};
use crate::page_set::PageSet;
use crate::report::as_micros;
use crate::snapshot::{check_sections, Stop};
use crate::source::engine::{Engine, Failure};
use crate::source::peer::Message;
use crate::source::sender::Pass;
use crate::stream::session::Complete;
use crate::stream::{encode_section, RecordType};
use crate::verify::hash_memory;
use crate::vm::{Mode, VmError};

/// How many times as long as this end the other one may take to hash memory.
const HASHES_SLOWER: u32 = 5;

impl Engine<'_, '_, '_> {
    pub(super) fn stop_and_send(&mut self) -> Result<SourceEvent, Failure> {
        let vm = self.around.vm;
        // Before the last look at memory: taking the state may write to it.
        let sections = vm.save_sections()?;
        check_sections(&sections).map_err(|stop| match stop {
            Stop::Stream(error) => error.into(),
            Stop::Other(error) => Failure::new(Cause::Failed, error.to_string()),
        })?;
        self.pause.save = self.part_of_pause();

        let pages = match self.mode() {
            Mode::Cold => {
                let populated = vm.populated()?;
                self.announce(&populated)?;
                populated
            }
            Mode::Postcopy => vm.populated()?,
            Mode::Precopy | Mode::Hybrid => {
                let mut pages = self.collect()?;
                if let Some(pending) = self.pending.take() {
                    pages.union(&pending);
                }
                pages
            }
        };
        if !self.switching {
            self.pause.pages = pages.count();
        }
        self.pause.harvest = self.part_of_pause();

        if self.switching {
            self.switch(whole_units(pages, vm.unit_pages())?, &sections)?;
        } else {
            let number = u32::try_from(self.rounds.len()).unwrap_or(u32::MAX);
            self.begin_pass(&Pass { number, pages: Arc::new(pages), live: false, last: true })?;
        }
        // Meanwhile on the main connection.
        let hashing = Instant::now();
        let hashes = match self.around.options.verify {
            true => Some(hash_memory(vm)?),
            false => None,
        };
        let hashing = hashing.elapsed();
        let paused = self.pause_started.map_or(0, |started| as_micros(started.elapsed()));
        let link = Arc::clone(self.link()?);
        let sent = link.write(|out| {
            if let Some(hashes) = hashes {
                let bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect();
                out.write(RecordType::Hash, &[&bytes])?;
            }
            for section in &sections {
                let payload = encode_section(section).map_err(|problem| out.error(problem))?;
                out.write(RecordType::State, &[&payload])?;
            }
            let sections = u32::try_from(sections.len()).unwrap_or(u32::MAX);
            out.send(&Complete { sections, paused_us: paused })
        });
        sent.map_err(|error| self.explained(error.into()))?;
        let stats = self.finish_pass()?;
        self.pause.bytes = stats.bytes;
        self.pause.send = self.part_of_pause();

        // It hashes as much, perhaps on a slower machine.
        let limit = self.around.options.timing.loaded + HASHES_SLOWER * hashing;
        match self.wait_for_message(limit, "load the state")? {
            Message::Loaded { load } => {
                self.pause.load = self.part_of_pause();
                self.pause.destination_load = load;
                Ok(SourceEvent::Loaded)
            }
            other => {
                Err(Failure::new(Cause::Protocol, format!("{other:?} came instead of LOADED")))
            }
        }
    }
}

/// The same pages and all others that can only be missing together with them.
pub(super) fn whole_units(pages: PageSet, unit: u64) -> Result<PageSet, VmError> {
    if unit == 1 {
        return Ok(pages);
    }
    let mut whole = PageSet::empty(pages.layout());
    for piece in pages.layout().regions().flat_map(|region| region.chunks(unit)) {
        if pages.intersects(piece) {
            whole.insert(piece)?;
        }
    }
    Ok(whole)
}
