//! Accepts connections and finds out what each is for. Until then nobody is trusted with more than a
//! thread and a few kilobytes, for a limited time.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{mpsc, Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use crate::destination::incoming::{read_main, read_offer};
use crate::destination::Input;
use crate::handover::Verdict;
use crate::identity::{MigrationId, Token};
use crate::journal::{Journal, Side};
use crate::link::{MainLink, Timing};
use crate::stream::session::{
    Hello, Join, Joined, Query, Recover, Refuse, VerdictWire, ROLE_PAGES, ROLE_REQUESTS,
};
use crate::stream::{Problem, RecordReader, RecordWriter, StreamError, StreamKind};
use crate::threads;
use crate::transport::{Listener, Stream, Transport};

/// How often the door looks whether it is to close, and whose time is over.
pub(super) const ACCEPT_INTERVAL: Duration = Duration::from_millis(100);
/// Connections that have a thread here: of unknown purpose, asking, or the main one.
const MAX_STRANGERS: usize = 64;

/// Why an offer is refused, and why a source that comes again is.
const BUSY: &str = "another migration is under way there";
const DRAINED: &str =
    "nothing of that migration is waited for: all of its memory came, or its VM has ended";

/// Who may join the migration that is under way.
pub(super) struct Guests {
    pub(super) id: MigrationId,
    pub(super) token: Token,
    /// Which page connections have joined.
    pub(super) joined: Vec<bool>,
    /// Whether the connection for requests may join.
    pub(super) requests: bool,
    /// Whether the source may come again to go on after its connections were lost, which it may know first.
    pub(super) recover: bool,
}

/// What a connection has shown itself to be.
#[derive(Debug, Default)]
pub(super) struct Standing(AtomicU8);

impl Standing {
    const UNKNOWN: u8 = 0;
    const ASKS: u8 = 1;
    const MAIN: u8 = 2;

    /// It asks for a verdict: it gets its answer also when all else is over, if it does not take its time.
    fn asks(&self) {
        self.0.store(Self::ASKS, Ordering::Release);
    }

    /// It is a main connection with an offer: the session sees to its time limits.
    pub(super) fn is_main(&self) {
        self.0.store(Self::MAIN, Ordering::Release);
    }

    /// Whether its time is over.
    fn must_end(&self, too_late: bool, closed: bool) -> bool {
        match self.0.load(Ordering::Acquire) {
            Self::UNKNOWN => too_late || closed,
            Self::ASKS => too_late,
            _ => closed,
        }
    }
}

/// A connection with a thread, which forgets it at its end.
struct Stranger {
    deadline: Instant,
    transport: Arc<dyn Transport>,
    standing: Arc<Standing>,
}

pub(super) struct Door {
    journal: Journal,
    timing: Timing,
    /// `None`: nothing may come in.
    inbox: Option<mpsc::Sender<Input>>,
    /// A migration is under way, or none may come.
    busy: AtomicBool,
    guests: Mutex<Option<Guests>>,
    strangers: Mutex<Vec<Stranger>>,
    /// A stranger is gone.
    fewer: Condvar,
    /// Migrations whose source has asked for this end's verdict, and got one that decides.
    told: Mutex<Vec<MigrationId>>,
    closed: AtomicBool,
}

impl Door {
    pub(super) fn new(
        journal: Journal,
        timing: Timing,
        inbox: Option<mpsc::Sender<Input>>,
    ) -> Self {
        Self {
            journal,
            timing,
            busy: AtomicBool::new(inbox.is_none()),
            inbox,
            guests: Mutex::new(None),
            strangers: Mutex::new(Vec::new()),
            fewer: Condvar::new(),
            told: Mutex::new(Vec::new()),
            closed: AtomicBool::new(false),
        }
    }

    /// Accepts until the door is closed, and sees to it that everybody is gone soon then: whoever waits
    /// for the threads here must not depend on what a peer does.
    pub(super) fn serve<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        listener: &dyn Listener,
    ) {
        while !self.closed.load(Ordering::Acquire) {
            match listener.accept(ACCEPT_INTERVAL) {
                Ok(Some(transport)) => self.admit(scope, transport),
                Ok(None) => {}
                Err(error) => {
                    // Out of descriptors, most likely: it gets better by itself or not at all.
                    tracing::warn!(%error, "no connection can be accepted");
                    thread::sleep(ACCEPT_INTERVAL);
                }
            }
            self.look_at_strangers();
        }
        loop {
            self.look_at_strangers();
            let strangers = self.strangers();
            if strangers.is_empty() {
                return;
            }
            let waited = self.fewer.wait_timeout(strangers, ACCEPT_INTERVAL);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn admit<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        transport: Arc<dyn Transport>,
    ) {
        let standing = Arc::new(Standing::default());
        {
            let mut strangers = self.strangers();
            if strangers.len() >= MAX_STRANGERS {
                tracing::warn!(peer = transport.peer(), "too many connections: closed");
                return transport.shutdown();
            }
            strangers.push(Stranger {
                deadline: Instant::now() + self.timing.accept,
                transport: Arc::clone(&transport),
                standing: Arc::clone(&standing),
            });
        }
        let met = (Arc::clone(&transport), Arc::clone(&standing));
        let spawned = threads::spawn(scope, "mig-stranger", move || {
            let (transport, standing) = met;
            if let Err(error) = self.meet(&transport, &standing) {
                tracing::info!(peer = transport.peer(), %error, "a connection was closed");
                transport.shutdown();
            }
            self.forget(&standing);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a connection");
            // Its peer need not wait until its time is over.
            transport.shutdown();
            self.forget(&standing);
        }
    }

    fn forget(&self, standing: &Arc<Standing>) {
        self.strangers().retain(|stranger| !Arc::ptr_eq(&stranger.standing, standing));
        self.fewer.notify_all();
    }

    /// Finds out what a connection is for, and sees to it.
    fn meet(&self, transport: &Arc<dyn Transport>, standing: &Standing) -> Result<(), StreamError> {
        let limit = Some(self.timing.accept);
        if let Err(error) = transport.set_timeouts(limit, limit) {
            let problem = Problem::Read(error);
            return Err(StreamError { record: 0, offset: 0, problem });
        }
        let kinds = [
            StreamKind::Migration,
            StreamKind::Pages,
            StreamKind::Query,
            StreamKind::Requests,
            StreamKind::Continue,
        ];
        let stream = Stream(Arc::clone(transport));
        let records = match RecordReader::of_kinds(stream, &kinds) {
            Ok(records) => records,
            Err(error) => {
                // Another version learns ours from the preamble.
                if matches!(error.problem, Problem::Version(_)) {
                    MainLink::open(Arc::clone(transport), StreamKind::Migration)?
                        .abort(3, &error.problem.to_string());
                }
                return Err(error);
            }
        };
        match records.kind() {
            StreamKind::Pages | StreamKind::Requests => self.join(records, transport),
            StreamKind::Continue => self.recover(records, transport),
            StreamKind::Query => {
                standing.asks();
                self.answer(records, transport)
            }
            _ => self.begin(records, transport, standing),
        }
    }

    /// A source offers a VM. Only a whole offer keeps other sources out: who dribbles does not.
    fn begin(
        &self,
        mut records: RecordReader<Stream>,
        transport: &Arc<dyn Transport>,
        standing: &Standing,
    ) -> Result<(), StreamError> {
        let inbox = match &self.inbox {
            Some(inbox) if !self.busy.load(Ordering::Acquire) => inbox,
            _ => {
                let hello: Hello<'_> = records.next_record()?.decode("HELLO")?;
                let id = hello.id;
                return self.refuse(id, BUSY, records, transport);
            }
        };
        let offer = read_offer(&mut records)?;
        if self.busy.swap(true, Ordering::AcqRel) {
            return self.refuse(offer.id.0, BUSY, records, transport);
        }
        let begun = read_main(offer, records, transport, inbox, standing);
        if begun.is_err() {
            // Nobody has heard of it.
            self.busy.store(false, Ordering::Release);
        }
        begun
    }

    fn refuse(
        &self,
        id: [u8; 16],
        reason: &str,
        mut records: RecordReader<Stream>,
        transport: &Arc<dyn Transport>,
    ) -> Result<(), StreamError> {
        let link = MainLink::open(Arc::clone(transport), records.kind())?;
        link.write(|out| -> Result<(), StreamError> {
            out.send(&Hello { id, program: env!("CARGO_PKG_VERSION"), features: 0 })?;
            out.send(&Refuse { reasons: vec![reason] })
        })?;
        // What the source has sent meanwhile must be read, or its kernel may drop the answer.
        while records.next_record().is_ok() {}
        transport.shutdown();
        Ok(())
    }

    fn join(
        &self,
        mut records: RecordReader<Stream>,
        transport: &Arc<dyn Transport>,
    ) -> Result<(), StreamError> {
        let kind = records.kind();
        let record = records.next_record()?;
        let join: Join = record.decode("JOIN")?;
        let refused = |what: &str| {
            let what = what.to_owned();
            record.error(Problem::Malformed { record_type: record.record_type, what })
        };
        let Some(inbox) = &self.inbox else { return Err(refused("no migration is under way")) };
        {
            let mut guests = self.guests();
            let Some(guests) = admitted(&mut guests, &join.id, join.token) else {
                return Err(refused("no such migration, or the wrong token"));
            };
            let place = match (join.role, kind) {
                (ROLE_PAGES, StreamKind::Pages) => guests.joined.get_mut(usize::from(join.index)),
                (ROLE_REQUESTS, StreamKind::Requests) if guests.requests && join.index == 0 => {
                    guests.requests = false;
                    None
                }
                _ => return Err(refused("no such connection")),
            };
            match place {
                Some(joined) if !*joined => *joined = true,
                None if join.role == ROLE_REQUESTS => {}
                _ => return Err(refused("no such page connection, or it has joined before")),
            }
        }
        let mut out = RecordWriter::new(Stream(Arc::clone(transport)), kind)?;
        out.send(&Joined { index: join.index })?;
        // It may be idle from now on; who closes the main connection closes this one too.
        if let Err(error) = transport.set_timeouts(None, Some(self.timing.dead)) {
            return Err(records.error(Problem::Read(error)));
        }
        let transport = Arc::clone(transport);
        let index = (join.role == ROLE_PAGES).then_some(join.index);
        // Fails when the session has just ended, and closes the connection.
        let _ = inbox.send(Input::Joined { index, records, out, transport });
        Ok(())
    }

    /// A source goes on with a migration whose connections were lost.
    fn recover(
        &self,
        mut records: RecordReader<Stream>,
        transport: &Arc<dyn Transport>,
    ) -> Result<(), StreamError> {
        let hello: Hello<'_> = records.next_record()?.decode("HELLO")?;
        let id = hello.id;
        let record = records.next_record()?;
        let recover: Recover = record.decode("RECOVER")?;
        let welcome = admitted(&mut self.guests(), &id, recover.token).is_some_and(|g| g.recover);
        let inbox = self.inbox.as_ref().filter(|_| welcome);
        let Some(inbox) = inbox else {
            let token = Token::from_bytes(recover.token);
            if self.journal.is_drained(MigrationId(id), &token).unwrap_or(false) {
                // The source keeps nothing then: only who knows its token says so.
                return self.refuse(id, DRAINED, records, transport);
            }
            // It may be too early, or another host: the source keeps what it has and tries again.
            let what = "no such migration, the wrong token, or too early".to_owned();
            let record_type = record.record_type;
            return Err(record.error(Problem::Malformed { record_type, what }));
        };
        let (connections, transport) = (recover.connections, Arc::clone(transport));
        // As above.
        let _ = inbox.send(Input::Recover { connections, records, transport });
        Ok(())
    }

    fn answer(
        &self,
        mut records: RecordReader<Stream>,
        transport: &Arc<dyn Transport>,
    ) -> Result<(), StreamError> {
        let record = records.next_record()?;
        let query: Query = record.decode("QUERY")?;
        let (id, token) = (MigrationId(query.id), Token::from_bytes(query.token));
        let verdict = match query.side {
            1 => self.journal.verdict(id, Side::Source, Some(&token)),
            2 if query.reclaim => self.journal.reclaim(id, &token),
            2 => self.journal.verdict(id, Side::Destination, Some(&token)),
            other => {
                let what = format!("side {other}");
                let record_type = record.record_type;
                return Err(record.error(Problem::Malformed { record_type, what }));
            }
        };
        let verdict = verdict.unwrap_or_else(|error| {
            tracing::error!(%error, "a verdict query cannot be answered");
            Verdict::Undecided
        });
        tracing::info!(%id, ?verdict, reclaim = query.reclaim, "a verdict query was answered");
        let mut out = RecordWriter::new(Stream(Arc::clone(transport)), StreamKind::Query)?;
        out.send(&VerdictWire { verdict: verdict.number() })?;
        let decides = matches!(verdict, Verdict::RunningHere | Verdict::NotHere);
        // Who has got the answer closes the connection.
        let got = decides
            && records.next_record().is_err_and(|e| matches!(e.problem, Problem::Truncated));
        if got && query.side == Side::Destination as u16 {
            self.told().push(id);
        }
        Ok(())
    }

    /// Migrations whose source knows what was decided here, because it asked.
    pub(super) fn told(&self) -> MutexGuard<'_, Vec<MigrationId>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes connections whose time is over; their threads then end.
    fn look_at_strangers(&self) {
        let now = Instant::now();
        let closed = self.closed.load(Ordering::Acquire);
        for stranger in self.strangers().iter() {
            if stranger.standing.must_end(now >= stranger.deadline, closed) {
                stranger.transport.shutdown();
            }
        }
    }

    /// From now on these may join.
    pub(super) fn expect(&self, guests: Option<Guests>) {
        *self.guests() = guests;
    }

    /// Accepts no more, and closes everything but questions that are being answered.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.look_at_strangers();
    }

    fn guests(&self) -> MutexGuard<'_, Option<Guests>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn strangers(&self) -> MutexGuard<'_, Vec<Stranger>> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who is waited for, if this is it.
fn admitted<'a>(
    guests: &'a mut Option<Guests>,
    id: &[u8; 16],
    token: [u8; 16],
) -> Option<&'a mut Guests> {
    guests
        .as_mut()
        .filter(|guests| guests.token.matches(&Token::from_bytes(token)) && guests.id.0 == *id)
}
