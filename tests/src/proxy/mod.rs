//! A network that fails where a test wants it to: it stands between the source and the destination
//! of a migration and knows the records that pass (docs/PROTOCOL.md).
//!
//! ```text
//!   minivmm migrate --to PROXY          minivmm receive
//!            |                                  |
//!            |  accept  +-------------------+   |
//!            `--------->| Connection        |-->'  connect
//!               Forth ->|  pump, pump       |-> Forth     one thread for each direction; a second one
//!              <- Back  |                   |<- Back      where bytes are on their way for some time
//!                       +-------------------+
//!                    rules: hold, flip, truncate, duplicate, delay at a Spot
//! ```
//!
//! A test names [`Spot`]s before the migration begins, waits until one is reached, does what it
//! wants to happen there (kills a process, cuts connections), and releases it:
//!
//! ```no_run
//! # use tests::proxy::{Cut, On, Proxy, Spot, Way};
//! # use migration::stream::RecordType;
//! let proxy = Proxy::to("127.0.0.1:4444");
//! let commit = proxy.hold(Spot::new(On::Main, Way::Forth, RecordType::Commit));
//! // minivmm migrate vm --to {proxy.address()}
//! commit.wait(); // The source has sent COMMIT, the destination has not got it.
//! proxy.cut(On::Main, Cut::Reset);
//! ```
//!
//! Bytes pass as they come, not record by record, so that nothing is slower than it has to be. With
//! [`Shape`] it is a link of a certain bandwidth and latency.

mod connection;
mod pump;
mod rules;
mod shape;
#[cfg(test)]
mod tests;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::net::sockopt::set_socket_recv_buffer_size;

pub use rules::{Held, On, Spot, Touched, Way};
pub use shape::Shape;

use connection::Connection;
use rules::{Action, Rule, RuleId};
use shape::Link;

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// As a process ends that has read everything: both ends read an end.
    Fin,
    /// As a host comes back that knows nothing of it: both ends get an error.
    Reset,
}

/// What is done to one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edit {
    /// Inverts a byte of its header.
    FlipHeader(usize),
    /// Inverts a byte of its payload.
    FlipPayload(u64),
    /// Inverts the last byte of its payload.
    FlipLast,
    /// Lets one half of it through and cuts the connection.
    Truncate(Cut),
    /// Sends it twice.
    Duplicate,
    /// Lets it, and all that follows, come later.
    Delay(std::time::Duration),
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    forth: Link,
    back: Link,
}

#[derive(Debug)]
struct State {
    target: SocketAddr,
    rules: Vec<Rule>,
    connections: Vec<Arc<Connection>>,
    /// Page connections that came so far.
    pages: u16,
    /// What happens to connections that come.
    closed: bool,
    swallows: bool,
    ending: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// A proxy; everything is cut when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Proxy {
    /// In front of `target`, as quick as can be.
    ///
    /// # Panics
    /// `target` is no `ADDRESS:PORT`, or no socket can be had.
    #[must_use]
    pub fn to(target: &str) -> Self {
        Self::shaped(target, Shape::default(), Shape::default())
    }

    /// As [`Proxy::to`], with an address of its own: who connects to it sees no connection within one host.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn apart(target: &str) -> Self {
        Self::listening("127.0.0.2:0", target, Shape::default(), Shape::default())
    }

    /// In front of `target`, over a link that is so in each direction.
    ///
    /// # Panics
    /// As [`Proxy::to`].
    #[must_use]
    pub fn shaped(target: &str, forth: Shape, back: Shape) -> Self {
        Self::listening("127.0.0.1:0", target, forth, back)
    }

    fn listening(at: &str, target: &str, forth: Shape, back: Shape) -> Self {
        let listener = TcpListener::bind(at).unwrap();
        if let Some(bytes) = forth.window() {
            // What waits before the link is the sender's, not ours.
            set_socket_recv_buffer_size(&listener, bytes).unwrap();
        }
        let address = listener.local_addr().unwrap();
        let state = State {
            target: target.parse().unwrap(),
            rules: Vec::new(),
            connections: Vec::new(),
            pages: 0,
            closed: false,
            swallows: false,
            ending: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            forth: Link::new(forth),
            back: Link::new(back),
        });
        let accepting = Arc::clone(&shared);
        let accept = move || accept(&accepting, &listener);
        thread::Builder::new().name("proxy".into()).spawn(accept).unwrap();
        Self { shared, address }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Connections that come from now on go to `target`.
    ///
    /// # Panics
    /// `target` is no `ADDRESS:PORT`.
    pub fn retarget(&self, target: &str) {
        self.shared.lock().target = target.parse().unwrap();
    }

    /// Stops the stream at a spot until the handle is released or dropped. What comes the other way,
    /// and on other connections, goes on.
    #[must_use]
    pub fn hold(&self, spot: Spot) -> Held {
        Held::new(Arc::clone(&self.shared), self.rule(spot, Action::Hold))
    }

    /// Changes a record at a spot.
    pub fn edit(&self, spot: Spot, edit: Edit) -> Touched {
        Touched::new(Arc::clone(&self.shared), self.rule(spot, Action::Edit(edit)))
    }

    fn rule(&self, spot: Spot, action: Action) -> RuleId {
        let mut state = self.shared.lock();
        let id = RuleId(state.rules.len());
        state.rules.push(Rule::new(spot, action));
        id
    }

    /// Cuts the connections that `on` names.
    pub fn cut(&self, on: On, how: Cut) {
        let mut state = self.shared.lock();
        state.connections.retain(|connection| {
            let hit = connection.is(on);
            if hit {
                connection.cut(how);
            }
            !hit
        });
        self.shared.changed.notify_all();
    }

    /// Both directions of the connections that `on` names swallow everything from now on, and
    /// nobody is told.
    pub fn stall(&self, on: On) {
        let state = self.shared.lock();
        for connection in state.connections.iter().filter(|connection| connection.is(on)) {
            connection.swallow();
        }
        self.shared.changed.notify_all();
    }

    /// Connections that come are closed, or let in again.
    pub fn close_door(&self, closed: bool) {
        self.shared.lock().closed = closed;
    }

    /// Connections that come are accepted, and lead nowhere; or let in again.
    pub fn stall_new(&self, stalled: bool) {
        self.shared.lock().swallows = stalled;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut(On::Any, Cut::Reset);
        self.shared.lock().ending = true;
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    while let Ok((source, _)) = listener.accept() {
        let (target, closed, swallows) = {
            let state = shared.lock();
            if state.ending {
                return;
            }
            (state.target, state.closed, state.swallows)
        };
        if !closed {
            // Fails where nobody listens any more: then this connection ends too.
            let _ = connection::open(shared, source, target, swallows);
        }
    }
}
