//! What the engine wishes of the connections that memory follows its guest by.

use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use migration::prepaging::Prepaging;
use migration::report::Outcome;
use migration::simulated::{Cut, LocalNetwork};
use migration::source::{PostcopyOptions, SourceOptions};
use migration::transport::{Connector, Listener, Transport};
use migration::Mode;
use vm_memory::VolatileSlice;

use super::common::*;

/// Of one end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Wishes {
    hurry: bool,
    backlog: Option<usize>,
}

/// One end of a connection, with a note of what is wished.
struct Noting {
    inner: Arc<dyn Transport>,
    wishes: Arc<Mutex<Wishes>>,
}

impl Transport for Noting {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer)
    }

    fn write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.inner.write_vectored(buffers)
    }

    fn write_guest(&self, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.inner.write_guest(head, slices)
    }

    fn read_guest(&self, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.inner.read_guest(slices)
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.inner.set_timeouts(read, write)
    }

    fn hurry(&self) {
        self.wishes.lock().unwrap().hurry = true;
    }

    fn bound_backlog(&self, bytes: usize) {
        self.wishes.lock().unwrap().backlog = Some(bytes);
    }

    fn shutdown(&self) {
        self.inner.shutdown();
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

/// One side's ends, in the order in which connections are made.
struct Side<'a> {
    network: &'a LocalNetwork,
    ends: Mutex<Vec<Arc<Mutex<Wishes>>>>,
}

impl<'a> Side<'a> {
    fn of(network: &'a LocalNetwork) -> Self {
        Self { network, ends: Mutex::default() }
    }

    fn note(&self, inner: Arc<dyn Transport>) -> Arc<dyn Transport> {
        let wishes = Arc::default();
        self.ends.lock().unwrap().push(Arc::clone(&wishes));
        Arc::new(Noting { inner, wishes })
    }

    fn wishes(&self) -> Vec<Wishes> {
        self.ends.lock().unwrap().iter().map(|wishes| *wishes.lock().unwrap()).collect()
    }
}

impl Connector for Side<'_> {
    fn connect(&self, timeout: Duration) -> io::Result<Arc<dyn Transport>> {
        Ok(self.note(self.network.connect(timeout)?))
    }

    fn address(&self) -> String {
        self.network.address()
    }
}

impl Listener for Side<'_> {
    fn accept(&self, wait: Duration) -> io::Result<Option<Arc<dyn Transport>>> {
        Ok(self.network.accept(wait)?.map(|transport| self.note(transport)))
    }
}

const CONNECTIONS: u16 = 2;
/// Main, those for pages, the one for requests.
const ALL: usize = CONNECTIONS as usize + 2;

/// Of both ends of a migration. With post-copy the guest asks for all of its memory, and the connection for requests is cut
/// meanwhile, so that all connections are made twice.
fn wishes(mode: Mode) -> (Vec<Wishes>, Vec<Wishes>) {
    let world = World::new();
    let follows = mode == Mode::Postcopy;
    if follows {
        let cut = Cut { connection: ALL - 1, bytes: 600, outgoing: false, for_good: false };
        world.network.cut(Some(cut));
    }
    let postcopy =
        PostcopyOptions { push: false, prepaging: Prepaging::Off, ..PostcopyOptions::default() };
    let options = SourceOptions { mode, postcopy, ..options(CONNECTIONS) };
    let (source, destination) = (Side::of(&world.network), Side::of(&world.network));
    let outcome = thread::scope(|scope| {
        scope.spawn(|| follows.then(|| read_all(&running(&world))));
        world.migrate_over(&source, &destination, &options, &Hooks::default())
    });
    assert_eq!(outcome.report.outcome, Outcome::HandedOver, "{:?}", outcome.report);
    world.assert_moved();
    (source.wishes(), destination.wishes())
}

#[test]
fn requests_and_answers_hurry_and_little_of_what_is_pushed_is_on_its_way() {
    let (source, destination) = wishes(Mode::Postcopy);
    for (end, pushes) in [(&source, true), (&destination, false)] {
        assert!(end.len() >= 2 * ALL, "lost once: {end:?}");
        // The first ones, and the last ones: in between the source may have come too early.
        for made in [&end[..ALL], &end[end.len() - ALL..]] {
            for (number, wishes) in made.iter().enumerate() {
                assert_eq!(wishes.hurry, number == ALL - 1, "connection {number}: {made:?}");
                let bounded = pushes && (1..ALL - 1).contains(&number);
                assert_eq!(wishes.backlog.is_some(), bounded, "connection {number}: {made:?}");
                // At least 128 KiB of all together.
                assert!(wishes.backlog.is_none_or(|bytes| bytes >= 64 << 10), "{made:?}");
            }
        }
    }
}

#[test]
fn precopy_wishes_nothing() {
    let (source, destination) = wishes(Mode::Precopy);
    for wishes in source.iter().chain(&destination) {
        assert_eq!(*wishes, Wishes::default());
    }
}
