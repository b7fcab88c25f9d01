//! From the first connection until the destination has made the VM.

use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

use crate::handover::{Cause, SourceEvent};
use crate::link::MainLink;
use crate::snapshot::{write_blob, Stop};
use crate::source::engine::{unexpected, Engine, Failure, SenderHandle};
use crate::source::peer::{read_main, Message};
use crate::source::postcopy::Joint;
use crate::source::sender::Sender;
use crate::stream::session::{Hello, Join, Joined, OfferWire, ROLE_PAGES, ROLE_REQUESTS};
use crate::stream::{encode_layout, RecordReader, RecordType, RecordWriter, StreamKind};
use crate::transport::{Connector, Stream, Transport};

impl Engine<'_, '_, '_> {
    /// Connects, offers, waits for the answer.
    pub(super) fn offer(&mut self) -> Result<SourceEvent, Failure> {
        let around = &self.around;
        let (options, id) = (around.options, around.control.id());
        let timing = options.timing;
        let address = around.connector.address();
        let entry = around.journal.begin_source(id, &self.offering.name, &address);
        self.entry = Some(entry.map_err(|error| Failure::new(Cause::Failed, error.to_string()))?);
        let transport = self.connect_to(self.around.connector)?;
        let link = Arc::new(MainLink::open(Arc::clone(&transport), StreamKind::Migration)?);
        self.link = Some(Arc::clone(&link));
        let inbox = self.sender.clone();
        let (offered, may_switch) = (options.connections, self.mode().may_switch());
        self.spawn("mig-main-in", move || read_main(id, offered, may_switch, transport, &inbox))?;
        self.send_offer(&link)?;
        self.spawn("mig-alive", move || link.keep_alive(timing.alive))?;
        match self.wait_for_message(timing.accept, "answer the offer")? {
            Message::Accept { token, connections, frames } => {
                if let Some(entry) = &mut self.entry {
                    entry
                        .set_token(&token)
                        .map_err(|error| Failure::new(Cause::Failed, error.to_string()))?;
                }
                self.token = Some(token);
                self.connections = connections;
                self.takes_frames = frames;
                Ok(SourceEvent::Accepted)
            }
            other => Err(unexpected(&other)),
        }
    }

    fn send_offer(&self, link: &MainLink) -> Result<(), Failure> {
        let around = &self.around;
        let options = around.options;
        let populated_pages = around.vm.populated()?.count();
        let offering = &self.offering;
        link.write(|out| -> Result<(), Failure> {
            out.send(&Hello {
                id: around.control.id().0,
                program: env!("CARGO_PKG_VERSION"),
                features: 0,
            })?;
            for (record_type, payload) in [
                (RecordType::Machine, offering.machine.encode()),
                (RecordType::Config, offering.config.encode()),
                (RecordType::Layout, encode_layout(around.vm.layout())),
            ] {
                let payload = payload.map_err(|problem| out.error(problem))?;
                out.write(record_type, &[&payload])?;
            }
            out.send(&OfferWire {
                name: &offering.name,
                mode: self.mode() as u16,
                connections: options.connections,
                verify: options.verify,
                downtime_us: crate::report::as_micros(options.downtime),
                populated_pages,
                alive_ms: millis(options.timing.alive),
                dead_ms: millis(options.timing.dead),
                resources_version: offering.resources.version,
                resources: &offering.resources.data,
                blobs: offering.blobs.iter().map(|b| (b.kind as u16, b.length)).collect(),
            })?;
            Ok(())
        })
    }

    /// Joins the page connections, sends the blobs, waits until the VM is made.
    pub(super) fn prepare(&mut self) -> Result<SourceEvent, Failure> {
        if let Err(failure) = self.join_all(self.around.connector) {
            return Err(self.explained(failure));
        }
        let link = Arc::clone(self.link()?);
        for blob in std::mem::take(&mut self.offering.blobs) {
            let sent = link.write(|out| write_blob(out, blob));
            if let Err(stop) = sent {
                let failure = match stop {
                    Stop::Stream(error) => error.into(),
                    Stop::Other(error) => Failure::new(Cause::Failed, error.to_string()),
                };
                return Err(self.explained(failure));
            }
        }
        match self.wait_for_message(self.around.options.timing.ready, "make the VM")? {
            Message::Ready { load } => {
                self.expected_load = load;
                Ok(SourceEvent::Ready)
            }
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn connect_to(
        &self,
        connector: &dyn Connector,
    ) -> Result<Arc<dyn Transport>, Failure> {
        let timing = &self.around.options.timing;
        connector
            .connect(timing.connect)
            .and_then(|transport| {
                // The peer speaks at least every `alive`, so silence is death.
                transport.set_timeouts(Some(timing.dead), Some(timing.dead))?;
                Ok(transport)
            })
            .map_err(|error| {
                let address = connector.address();
                Failure::new(Cause::Lost, format!("cannot connect to {address}: {error}"))
            })
    }

    /// Makes all connections but the main one.
    pub(super) fn join_all(&mut self, connector: &dyn Connector) -> Result<(), Failure> {
        for index in 0..self.connections {
            self.join_pages(connector, index)?;
        }
        if self.mode().may_switch() {
            self.requests = Some(self.join(connector, StreamKind::Requests, ROLE_REQUESTS, 0)?);
        }
        Ok(())
    }

    fn join(
        &self,
        connector: &dyn Connector,
        kind: StreamKind,
        role: u16,
        index: u16,
    ) -> Result<Joint, Failure> {
        let Some(token) = &self.token else {
            return Err(Failure::new(Cause::Failed, "no token"));
        };
        let transport = self.connect_to(connector)?;
        let mut writer = RecordWriter::new(Stream(Arc::clone(&transport)), kind)?;
        let id = self.around.control.id().0;
        writer.send(&Join { id, role, index, token: token.bytes() })?;
        let mut answers = RecordReader::new(Stream(Arc::clone(&transport)), kind)?;
        let joined: Joined = answers.next_record()?.decode("JOINED")?;
        if joined.index != index {
            return Err(Failure::new(Cause::Protocol, "another connection was joined"));
        }
        // How long the destination takes for a round is its own affair; whether it lives shows on
        // the main connection.
        let dead = self.around.options.timing.dead;
        transport
            .set_timeouts(None, Some(dead))
            .map_err(|error| Failure::new(Cause::Failed, format!("connection {index}: {error}")))?;
        Ok(Joint { records: answers, writer, transport })
    }

    fn join_pages(&mut self, connector: &dyn Connector, index: u16) -> Result<(), Failure> {
        let started = Instant::now();
        let Joint { records: answers, writer, transport } =
            self.join(connector, StreamKind::Pages, ROLE_PAGES, index)?;
        let round_trip = started.elapsed();
        if index == 0 || round_trip < self.round_trip {
            self.round_trip = round_trip;
        }
        let (passes, work) = mpsc::channel();
        let inbox = self.sender.clone();
        let shared = Arc::clone(&self.shared);
        let sender = Sender::new(self.around.vm, shared, index, self.connections, writer, answers);
        self.spawn(&format!("mig-send-{index}"), move || sender.run(&work, &inbox))?;
        self.senders.push(SenderHandle { passes, transport });
        if self.connection_bytes.len() < self.senders.len() {
            self.connection_bytes.push(0);
        }
        Ok(())
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
