//! One connection: two sockets, two directions.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;

use super::pump::Pump;
use super::rules::covers;
use super::{Cut, On, Shared, Way};

/// How often somebody who cannot write looks whether the connection still is to be.
const LOOK: Duration = Duration::from_millis(100);

/// What happens to what comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Flow {
    Passes,
    Swallowed,
    Cut,
}

#[derive(Debug)]
pub(super) struct Connection {
    source: TcpStream,
    destination: TcpStream,
    /// What it is for, once its first bytes have told.
    on: Mutex<Option<On>>,
    flow: AtomicU8,
    /// Directions that have ended.
    ended: AtomicU8,
}

impl Connection {
    /// Its two ends in the order of a direction: where bytes come from, and where they go.
    pub(super) fn ends(&self, way: Way) -> (&TcpStream, &TcpStream) {
        match way {
            Way::Forth => (&self.source, &self.destination),
            Way::Back => (&self.destination, &self.source),
        }
    }

    pub(super) fn on(&self) -> Option<On> {
        *self.on.lock().unwrap()
    }

    pub(super) fn is_for(&self, on: On) {
        *self.on.lock().unwrap() = Some(on);
    }

    pub(super) fn is(&self, on: On) -> bool {
        on == On::Any || self.on().is_some_and(|one| covers(on, one))
    }

    pub(super) fn flow(&self) -> Flow {
        match self.flow.load(Ordering::Acquire) {
            0 => Flow::Passes,
            1 => Flow::Swallowed,
            _ => Flow::Cut,
        }
    }

    pub(super) fn swallow(&self) {
        self.flow.fetch_max(Flow::Swallowed as u8, Ordering::AcqRel);
    }

    /// One direction has ended; whether it was the last.
    pub(super) fn ends_one(&self) -> bool {
        self.ended.fetch_add(1, Ordering::AcqRel) == 1
    }

    /// Ends it. A reset goes out when its threads have let go of it.
    pub(super) fn cut(&self, how: Cut) {
        self.flow.store(Flow::Cut as u8, Ordering::Release);
        for end in [&self.source, &self.destination] {
            // Fails when that end is gone, which is as good.
            let _ = match how {
                Cut::Fin => end.shutdown(Shutdown::Both),
                Cut::Reset => {
                    let _ = set_socket_linger(end, Some(Duration::ZERO));
                    end.shutdown(Shutdown::Read)
                }
            };
        }
    }
}

/// Connects to the target and moves bytes until the end.
pub(super) fn open(
    shared: &Arc<Shared>,
    source: TcpStream,
    target: SocketAddr,
    swallows: bool,
) -> io::Result<()> {
    let destination = TcpStream::connect(target)?;
    for end in [&source, &destination] {
        end.set_nodelay(true)?;
        end.set_write_timeout(Some(LOOK))?;
    }
    let flow = if swallows { Flow::Swallowed } else { Flow::Passes };
    let connection = Arc::new(Connection {
        source,
        destination,
        on: Mutex::new(None),
        flow: AtomicU8::new(flow as u8),
        ended: AtomicU8::new(0),
    });
    {
        let mut state = shared.lock();
        state.connections.push(Arc::clone(&connection));
    }
    for (way, name) in [(Way::Forth, "proxy-forth"), (Way::Back, "proxy-back")] {
        let mut pump = Pump::new(Arc::clone(shared), Arc::clone(&connection), way);
        thread::Builder::new().name(name.into()).spawn(move || pump.run())?;
    }
    Ok(())
}
