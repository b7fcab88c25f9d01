//! What answers on the network: echo, discard and character generator, over smoltcp's sockets.
#![allow(unsafe_code)]

use core::mem::MaybeUninit;

use beacon_core::memory::FreeRam;
use smoltcp::iface::{SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::{tcp, udp};

use crate::phys;

const ECHO: u16 = 7;
const DISCARD: u16 = 9;
const CHARGEN: u16 = 19;

/// Connections of each TCP service at a time.
const EACH: usize = 2;
const SERVERS: usize = 3 * EACH;
/// The servers, the UDP echo, and the client's socket.
const SOCKETS: usize = SERVERS + 2;

/// Buffers, in bytes: of bulk data, of an echo, of the side that carries nothing.
const BULK: usize = 512 << 10;
const BOTH: usize = 64 << 10;
const LITTLE: usize = 4 << 10;
/// Of a UDP socket: what comes at once after a pause is not to be lost here.
const DATAGRAMS: usize = 2048;
const UDP: usize = 128 << 10;

/// Most bytes that are copied for a connection in a turn.
const COPY: usize = 16 << 10;
/// Most bytes that are generated for a connection in a turn.
const GENERATE: usize = 64 << 10;
/// Datagrams that are echoed in a turn: as many as frames are taken, so that few wait in the socket, which has less room than the ring.
const ECHOES: usize = 16;

/// Counters since boot.
#[derive(Default)]
pub struct Counters {
    /// Datagrams echoed.
    pub udp_echoes: u64,
    /// Connections accepted.
    pub accepted: u64,
    /// Bytes echoed, discarded, and generated over TCP.
    pub echoed: u64,
    /// See `echoed`.
    pub discarded: u64,
    /// See `echoed`.
    pub generated: u64,
}

struct Server {
    handle: SocketHandle,
    port: u16,
    active: bool,
    /// Bytes generated on this connection.
    offset: u64,
}

/// All services.
pub struct Services {
    servers: [Server; SERVERS],
    udp: SocketHandle,
    /// The client's socket.
    pub client: SocketHandle,
    scratch: &'static mut [u8],
    /// Counters.
    pub count: Counters,
}

impl Services {
    /// Makes the sockets. `client_port` is where the client sends from.
    pub fn new(ram: &mut FreeRam, client_port: u16) -> Option<(Self, SocketSet<'static>)> {
        // SAFETY: each is written before it is read.
        let storage = unsafe { phys::allocate::<MaybeUninit<SocketStorage>>(ram, SOCKETS)? };
        for place in storage.iter_mut() {
            place.write(SocketStorage::EMPTY);
        }
        // SAFETY: all were written.
        let storage =
            unsafe { &mut *(storage as *mut [MaybeUninit<SocketStorage>] as *mut [SocketStorage]) };
        let mut sockets = SocketSet::new(storage);
        let mut add = |port, receive, transmit| {
            let socket = tcp(ram, receive, transmit)?;
            Some(Server { handle: sockets.add(socket), port, active: false, offset: 0 })
        };
        let servers = [
            add(ECHO, BOTH, BOTH)?,
            add(ECHO, BOTH, BOTH)?,
            add(DISCARD, BULK, LITTLE)?,
            add(DISCARD, BULK, LITTLE)?,
            add(CHARGEN, LITTLE, BULK)?,
            add(CHARGEN, LITTLE, BULK)?,
        ];
        let udp = sockets.add(udp(ram, ECHO)?);
        let client = sockets.add(self::udp(ram, client_port)?);
        let scratch = phys::bytes(ram, COPY)?;
        let services = Self { servers, udp, client, scratch, count: Counters::default() };
        Some((services, sockets))
    }

    /// One turn of all of them.
    pub fn turn(&mut self, sockets: &mut SocketSet) {
        let Self { servers, scratch, count, .. } = self;
        for server in servers {
            server.turn(sockets.get_mut(server.handle), scratch, count);
        }
        let socket: &mut udp::Socket = sockets.get_mut(self.udp);
        for _ in 0..ECHOES {
            if !socket.can_send() {
                break;
            }
            let Ok((length, meta)) = socket.recv_slice(self.scratch) else { break };
            if socket.send_slice(&self.scratch[..length], meta.endpoint).is_ok() {
                self.count.udp_echoes += 1;
            }
        }
    }
}

impl Server {
    fn turn(&mut self, socket: &mut tcp::Socket, scratch: &mut [u8], count: &mut Counters) {
        match socket.state() {
            tcp::State::Closed => {
                self.active = false;
                // Fails only for port 0.
                let _ = socket.listen(self.port);
                return;
            }
            // Nobody waits for what is under way: be ready for the next.
            tcp::State::TimeWait => return socket.abort(),
            tcp::State::Listen | tcp::State::SynReceived => return,
            _ => (),
        }
        if !core::mem::replace(&mut self.active, true) {
            self.offset = 0;
            count.accepted += 1;
        }
        match self.port {
            ECHO => {
                let room = (socket.send_capacity() - socket.send_queue()).min(scratch.len());
                if let Ok(length @ 1..) = socket.recv_slice(&mut scratch[..room]) {
                    // There is room for all of it.
                    if let Ok(sent) = socket.send_slice(&scratch[..length]) {
                        count.echoed += sent as u64;
                    }
                }
            }
            _ => {
                while let Ok(length @ 1..) = socket.recv(|data| (data.len(), data.len())) {
                    count.discarded += length as u64;
                }
            }
        }
        if self.port == CHARGEN {
            self.generate(socket, count);
        }
        // The other side is done, and so are we.
        if socket.state() == tcp::State::CloseWait && !socket.can_recv() {
            socket.close();
        }
    }

    fn generate(&mut self, socket: &mut tcp::Socket, count: &mut Counters) {
        let offset = self.offset;
        let sent = socket.send(|buffer| {
            let length = buffer.len().min(GENERATE);
            for (place, byte) in (offset..).zip(&mut buffer[..length]) {
                *byte = generated(place);
            }
            (length, length)
        });
        if let Ok(length) = sent {
            self.offset += length as u64;
            count.generated += length as u64;
        }
    }
}

/// The byte at an offset of what the generator sends.
fn generated(offset: u64) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 16) as u8
}

fn tcp(ram: &mut FreeRam, receive: usize, transmit: usize) -> Option<tcp::Socket<'static>> {
    let receive = tcp::SocketBuffer::new(phys::bytes(ram, receive)?);
    let mut socket = tcp::Socket::new(receive, tcp::SocketBuffer::new(phys::bytes(ram, transmit)?));
    socket.set_nagle_enabled(false);
    Some(socket)
}

fn udp(ram: &mut FreeRam, port: u16) -> Option<udp::Socket<'static>> {
    let mut buffer = || {
        // SAFETY: each is written before it is read.
        let meta = unsafe { phys::allocate::<MaybeUninit<udp::PacketMetadata>>(ram, DATAGRAMS)? };
        for place in meta.iter_mut() {
            place.write(udp::PacketMetadata::EMPTY);
        }
        // SAFETY: all were written.
        let meta = unsafe {
            &mut *(meta as *mut [MaybeUninit<udp::PacketMetadata>] as *mut [udp::PacketMetadata])
        };
        Some(udp::PacketBuffer::new(meta, phys::bytes(ram, UDP)?))
    };
    let (receive, transmit) = (buffer()?, buffer()?);
    let mut socket = udp::Socket::new(receive, transmit);
    // Fails only for port 0.
    let _ = socket.bind(port);
    Some(socket)
}
