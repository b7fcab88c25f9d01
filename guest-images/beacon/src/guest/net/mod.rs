//! The network: the card, smoltcp on top of it, and who uses it.

mod card;
mod client;
mod services;

use beacon_core::devices::DeviceOptions;
use beacon_core::json::Line;
use beacon_core::memory::FreeRam;
use beacon_core::queue::{Queue, Segment};
use beacon_core::time::TscScale;
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketSet};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint, Ipv4Address};

use self::card::{Card, F_CTRL_VQ, F_GUEST_ANNOUNCE};
use self::client::Client;
use self::services::Services;
use crate::console;
use crate::cpu::tsc;
use crate::phys::{self, Memory};
use crate::virtio::{Device, Signal};

/// Time of a turn that goes to the network, if there is something to do.
const TURN_US: u64 = 25;
/// Frames that are taken in a turn.
const FRAMES: usize = 16;
/// Segments that each socket may send in a turn.
const SEGMENTS: usize = 16;

const CONTROL: u32 = 2;
const CONTROL_QUEUE: u16 = 8;
const STATUS_OFFSET: u64 = 6;
const STATUS_ANNOUNCE: u8 = 2;
/// Class and command: acknowledge an announcement.
const ANNOUNCE_ACK: [u8; 2] = [3, 0];
/// What the device answers, and what it does not.
const CONTROL_OK: u8 = 0;
const NO_ANSWER: u8 = 0xFF;

/// The control queue, and 16 bytes for a command.
struct Control {
    queue: Queue,
    memory: &'static mut [u8],
    /// Commands that the device took.
    good: u64,
}

impl Control {
    /// Takes what the last command left, if it is done.
    fn collect(&mut self) {
        while let Ok(Some(_)) = self.queue.take(&Memory) {
            let answer = self.memory.as_ptr() as u64 + 2;
            self.good += u64::from(phys::read8(answer) == CONTROL_OK);
        }
    }
}

/// The network card and all that talks through it.
pub struct Net {
    device: Device,
    signal: Signal,
    scale: TscScale,
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    services: Services,
    client: Option<Client>,
    control: Option<Control>,
    ip: Ipv4Address,
    start: u64,
    /// The stack's clock in microseconds, which must not fall.
    clock: i64,
    turn: u64,
    announces: u64,
}

fn ipv4([a, b, c, d]: [u8; 4]) -> Ipv4Address {
    Ipv4Address::new(a, b, c, d)
}

impl Net {
    /// Starts the device and the stack.
    pub fn new(
        device: Device,
        options: &DeviceOptions,
        scale: TscScale,
        ram: &mut FreeRam,
    ) -> Result<Self, &'static str> {
        const NO_MEMORY: &str = "no memory for the network";
        const NO_IP: &str = "there is a network card, and no ip=";
        let (address, prefix) = options.net.ip.ok_or(NO_IP)?;
        let mut card = Card::new(device, options.net.offload, ram)?;
        let control = if card.features & F_CTRL_VQ == 0 {
            None
        } else {
            let queue = device.queue(ram, CONTROL, CONTROL_QUEUE, 0)?;
            Some(Control { queue, memory: phys::bytes(ram, 16).ok_or(NO_MEMORY)?, good: 0 })
        };
        let (services, sockets) = Services::new(ram, client::PORT).ok_or(NO_MEMORY)?;
        let client = match options.net.udp_to {
            Some((to, port)) => {
                let to = IpEndpoint::new(IpAddress::Ipv4(ipv4(to)), port);
                Some(Client::new(ram, to, options.net.udp_rate, scale).ok_or(NO_MEMORY)?)
            }
            None => None,
        };
        device.go();
        card.fill();

        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(card.mac)));
        config.random_seed = tsc();
        let mut interface = Interface::new(config, &mut card, Instant::ZERO);
        let ip = ipv4(address);
        interface.update_ip_addrs(|list| {
            // The list is empty, and has room for one at least.
            let _ = list.push(IpCidr::new(IpAddress::Ipv4(ip), prefix));
        });
        if let Some(gateway) = options.net.gateway {
            // The same is true of the routes.
            let _ = interface.routes_mut().add_default_ipv4_route(ipv4(gateway));
        }
        Ok(Self {
            device,
            signal: Signal::new(device, "net", options.notify, scale),
            scale,
            card,
            interface,
            sockets,
            services,
            client,
            control,
            ip,
            start: tsc(),
            clock: 0,
            turn: scale.ticks_of_micros(TURN_US),
            announces: 0,
        })
    }

    /// Begins a new window.
    pub fn mark(&mut self) {
        if let Some(client) = &mut self.client {
            client.replies.mark();
        }
    }

    /// One turn's share.
    pub fn turn(&mut self, now: u64, elapsed: u64) {
        let micros = self.scale.nanoseconds(now.saturating_sub(self.start)) / 1000;
        self.clock = self.clock.max(micros as i64);
        let time = Instant::from_micros(self.clock);
        let deadline = tsc() + self.turn;
        let Self { signal, card, .. } = self;
        if signal.look(now, elapsed, || card.has_used()) {
            self.receive(time, deadline);
        }
        self.services.turn(&mut self.sockets);
        if let Some(client) = &mut self.client {
            client.turn(self.sockets.get_mut(self.services.client), now, elapsed);
        }
        for _ in 0..SEGMENTS {
            let sent = self.interface.poll_egress(time, &mut self.card, &mut self.sockets);
            if sent == PollResult::None || tsc() >= deadline {
                break;
            }
        }
        if let Some(control) = &mut self.control {
            control.collect();
        }
        if self.signal.take_config_change() {
            self.look_at_status();
        }
        self.card.publish();
    }

    fn receive(&mut self, time: Instant, deadline: u64) {
        self.card.reclaim();
        for _ in 0..FRAMES {
            let result =
                self.interface.poll_ingress_single(time, &mut self.card, &mut self.sockets);
            if result == PollIngressSingleResult::None {
                break;
            }
            if tsc() >= deadline {
                return;
            }
        }
        if !self.card.has_used() {
            self.signal.emptied(&self.card.queues());
        }
    }

    /// Announces this guest if the device asks for it.
    fn look_at_status(&mut self) {
        let wanted = self.card.features & F_GUEST_ANNOUNCE != 0
            && self.device.config8(STATUS_OFFSET) & STATUS_ANNOUNCE != 0;
        let Some(control) = self.control.as_mut().filter(|_| wanted) else { return };
        let mut frame = [0; 42];
        gratuitous_arp(&mut frame, self.card.mac, self.ip.octets());
        let sent = self.card.send_raw(&frame);
        self.announces += 1;
        control.collect();
        control.memory[..2].copy_from_slice(&ANNOUNCE_ACK);
        control.memory[2] = NO_ANSWER;
        let at = control.memory.as_mut_ptr() as u64;
        let added =
            control.queue.add(&Memory, &[Segment::read(at, 2), Segment::write(at + 2, 1)], 0);
        if added && control.queue.publish(&Memory) {
            self.device.notify(CONTROL);
        }
        let mut line = Line::event("announce");
        line.number("count", self.announces);
        line.flag("sent", sent);
        console::offer(&mut line);
    }

    /// The device, as it was found.
    pub fn announce(&self) {
        let mut line = Line::event("net");
        line.hex("base", self.device.base());
        line.hex("features", self.card.features);
        line.array("mac", |list| self.card.mac.iter().for_each(|&byte| list.item(byte.into())));
        line.array("ip", |list| self.ip.octets().iter().for_each(|&byte| list.item(byte.into())));
        line.number("mtu", self.card.mtu() as u64);
        console::send(&mut line);
    }

    /// The fields of the `report` event.
    pub fn report(&self, line: &mut Line) {
        let (card, services) = (&self.card.count, &self.services.count);
        line.number("net_rx_frames", card.received);
        line.number("net_rx_bytes", card.received_bytes);
        line.number("net_tx_frames", card.sent);
        line.number("net_tx_bytes", card.sent_bytes);
        line.number("net_broken", card.broken);
        line.number("net_notifies", card.notifies);
        line.number("net_irqs", self.signal.irqs);
        line.number("net_irqs_lost", self.signal.lost);
        line.number("net_announces", self.announces);
        let good = self.control.as_ref().map_or(0, |control| control.good);
        line.number("net_announces_acked", good);
        line.number("udp_echoes", services.udp_echoes);
        line.number("tcp_accepted", services.accepted);
        line.number("tcp_echoed", services.echoed);
        line.number("tcp_discarded", services.discarded);
        line.number("tcp_generated", services.generated);
        if let Some(client) = &self.client {
            let replies = &client.replies;
            line.number("udp_sent", replies.sent());
            line.number("udp_replies", replies.replies);
            line.number("udp_waiting", replies.waiting());
            line.number("udp_lost", replies.lost);
            line.number("udp_late", replies.late);
            line.number("udp_duplicates", replies.duplicates);
            line.number("udp_reordered", replies.reordered);
            line.number("udp_strays", replies.strays);
            line.micros("udp_gap_max_us", self.scale.nanoseconds(replies.gap));
        }
    }
}

/// An ARP request for the own address, to everybody (RFC 826, RFC 5227).
fn gratuitous_arp(frame: &mut [u8; 42], mac: [u8; 6], ip: [u8; 4]) {
    frame[..6].fill(0xFF);
    frame[6..12].copy_from_slice(&mac);
    // ARP; Ethernet, IPv4, lengths of the addresses, request.
    frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&ip);
    frame[38..].copy_from_slice(&ip);
}
