//! From the offer until the VM is made and its memory is waited for.

use std::sync::Arc;
use std::time::Instant;

use crate::destination::door::Guests;
use crate::destination::failure::Failure;
use crate::destination::receiver::Receiver;
use crate::destination::session::{Joined, Session};
use crate::destination::{Input, Stage};
use crate::handover::{Cause, DestinationEvent};
use crate::identity::Token;
use crate::link::MainLink;
use crate::report::as_micros;
use crate::stream::session::{
    shortened, Accept, Hello, Ready, Refuse, FEATURE_FRAMES, MAX_REASONS, MAX_REASON_BYTES,
};
use crate::stream::{RecordReader, RecordType, RecordWriter, StreamKind};
use crate::transport::{Stream, Transport};
use crate::userfault::Userfault;
use crate::verify::hash_count;

impl Session<'_, '_, '_> {
    /// Says hello, and has the host look at the offer.
    pub(super) fn negotiate(&mut self) -> Result<DestinationEvent, Failure> {
        let link = Arc::new(MainLink::open(Arc::clone(&self.main), StreamKind::Migration)?);
        self.link = Some(Arc::clone(&link));
        link.send(&Hello {
            id: self.offer.id.0,
            program: env!("CARGO_PKG_VERSION"),
            features: FEATURE_FRAMES,
        })?;
        let interval = self.offer.alive;
        self.spawn("mig-alive", move || link.keep_alive(interval))?;
        let mut reasons = self.around.host.check(&self.offer);
        let hash_bytes = hash_count(&self.offer.layout) * 8;
        if self.offer.verify && hash_bytes > RecordType::Hash.max_bytes() {
            reasons.push("its memory is too large for verify mode".to_owned());
        }
        if self.offer.mode.may_switch() {
            match Userfault::open() {
                Ok(userfault) => self.userfault = Some(userfault),
                Err(reason) => reasons.push(reason),
            }
        }
        match reasons.is_empty() {
            true => Ok(DestinationEvent::Acceptable),
            false => Err(Failure { cause: Cause::Refused, reasons }),
        }
    }

    pub(super) fn accept(&mut self) -> Result<(), Failure> {
        let token = Token::random()?;
        let offer = &self.offer;
        self.entry = Some(self.around.journal.begin_destination(
            offer.id,
            &offer.name,
            &offer.peer,
            &token,
        )?);
        let joined = vec![false; usize::from(self.connections)];
        let requests = offer.mode.may_switch();
        self.token = Some(token);
        self.door.expect(Some(Guests { id: offer.id, token, joined, requests, recover: false }));
        self.stage.set(Stage::ACCEPTED);
        let connections = self.connections;
        Ok(self.link()?.send(&Accept { token: token.bytes(), connections })?)
    }

    pub(super) fn refuse(&self) {
        let Some(link) = &self.link else { return };
        let reasons = self
            .reasons
            .iter()
            .take(MAX_REASONS)
            .map(|reason| shortened(reason, MAX_REASON_BYTES))
            .collect();
        if let Err(error) = link.send(&Refuse { reasons }) {
            tracing::debug!(%error, "the refusal was not sent");
        }
        // Closing a socket with unread data resets it, and the refusal might be lost.
        let deadline = Instant::now() + self.offer.alive;
        while let Ok(input) =
            self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            if matches!(input, Input::Lost { .. } | Input::Aborted(_)) {
                break;
            }
        }
    }

    /// Has the host make the VM, and waits for the page connections.
    pub(super) fn prepare(&mut self) -> Result<DestinationEvent, Failure> {
        let deadline = Instant::now() + self.around.options.timing.ready;
        let mut blobs = self.offer.blobs.is_empty().then(Vec::new);
        loop {
            if let Some(blobs) = blobs.take() {
                let vm = self
                    .around
                    .host
                    .prepare(&self.offer, blobs)
                    .map_err(|reasons| Failure { cause: Cause::Refused, reasons })?;
                let same = vm.layout().as_ref() == &self.offer.layout;
                self.vm = Some(vm);
                if !same {
                    let reason = "the memory that its configuration asks for is laid out otherwise";
                    return Err(Failure::new(Cause::Refused, reason));
                }
            }
            let requests = self.requests_joined.is_some() == self.offer.mode.may_switch();
            if self.vm.is_some() && requests && self.joined.len() == usize::from(self.connections) {
                return Ok(DestinationEvent::Prepared);
            }
            match self.next_or_end(deadline)? {
                Some(Input::Blobs(all)) => blobs = Some(all),
                Some(Input::Joined { index, records, out, transport }) => {
                    self.take_joined(index, records, out, transport);
                }
                Some(_) => {}
                None => {
                    let reason = "the source did not send or join what it announced in time";
                    return Err(Failure::new(Cause::Deadline, reason));
                }
            }
        }
    }

    /// A connection was let in.
    pub(super) fn take_joined(
        &mut self,
        index: Option<u16>,
        records: RecordReader<Stream>,
        out: RecordWriter<Stream>,
        transport: Arc<dyn Transport>,
    ) {
        self.page_transports.push(Arc::clone(&transport));
        match index {
            Some(index) => self.joined.push(Joined { index, records, out }),
            None => self.requests_joined = Some((records, out, transport)),
        }
    }

    pub(super) fn send_ready(&mut self) -> Result<(), Failure> {
        let vm = Arc::clone(self.vm()?);
        // A VM that was just made has none, or very little.
        for run in vm.populated()?.runs() {
            vm.zero(run)?;
        }
        for Joined { index, records, out } in std::mem::take(&mut self.joined) {
            let (vm, pages) = (Arc::clone(&vm), Arc::clone(&self.pages));
            let receiver = Receiver { index, vm, records, out, pages };
            let inbox = self.sender.clone();
            self.spawn(&format!("mig-recv-{index}"), move || receiver.run(&inbox))?;
        }
        if let Some(entry) = &mut self.entry {
            entry.stage()?;
        }
        self.stage.set(Stage::READY);
        let load_us = as_micros(vm.expected_load());
        Ok(self.link()?.send(&Ready { load_us })?)
    }
}
