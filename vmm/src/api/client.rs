//! A client of the API that blocks: for the command line and for tests.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::Serialize;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::{ErrorReply, SaveRequest, StatusReply};
use crate::control::{MigrateRequest, MigrationInfo, SaveReport, VmInfo, VmStats, VmStatus};
use crate::events::Event;
use crate::runtime_dir::{Found, RuntimeDir, RuntimeDirError};

/// Longest wait for an answer that takes no work.
const QUICK: Duration = Duration::from_secs(10);
/// Longest wait for a command other than `save`.
const COMMAND: Duration = Duration::from_secs(60);
/// How long a VM is looked up again whose socket is gone. Longer than a process keeps its name that
/// has given its VM away: the VM is found where it came to only then.
pub const LOOK_UP: Duration = Duration::from_secs(5);
/// How long to wait before that.
pub const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Largest answer that is read, bytes.
const MAX_REPLY: usize = 16 << 20;
/// Longest event that is read, bytes.
const MAX_EVENT: usize = 1 << 20;

/// Why a request brought no answer, or a refusal.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot connect to {socket}: {source}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The VM is not there any more.
    #[error(transparent)]
    Lookup(#[from] Box<RuntimeDirError>),
    /// The answer did not come in time.
    #[error("no answer from {socket} within {timeout:?}: is its process stopped or overloaded?")]
    Timeout {
        /// The socket.
        socket: PathBuf,
        /// How long was waited.
        timeout: Duration,
    },
    /// The VM refused.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What the VM said.
        message: String,
    },
    /// The connection broke, or what came is no answer of this API.
    #[error("the VM's answer cannot be used: {0}")]
    Protocol(String),
    /// The client itself could not start.
    #[error("cannot start the API client: {0}")]
    Start(io::Error),
}

impl ClientError {
    /// Nobody listens there any more, or nobody does yet: no request was sent.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        matches!(self, Self::Connect { source, .. } if matches!(source.kind(), NotFound | ConnectionRefused))
    }
}

fn protocol(error: impl std::fmt::Display) -> ClientError {
    ClientError::Protocol(error.to_string())
}

/// A client of one VM. Each request has its own connection.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    /// The VM by name, to be looked up again.
    name: Option<(RuntimeDir, String)>,
    runtime: Runtime,
    quick: Duration,
}

impl Client {
    /// A client for the API socket of a VM; connects with the first request.
    ///
    /// # Errors
    /// No runtime can be created.
    pub fn new(socket: &Path) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(ClientError::Start)?;
        Ok(Self { socket: socket.to_owned(), name: None, runtime, quick: QUICK })
    }

    /// A client of the VM `name`. Where its socket is gone when a request is to be sent, because the
    /// VM was moved on this host and takes its name over, it is looked up again for [`LOOK_UP`].
    ///
    /// # Errors
    /// There is no such VM, or no runtime can be created.
    pub fn of(dir: RuntimeDir, name: &str) -> Result<Self, ClientError> {
        let Found { socket, .. } = dir.find(name).map_err(Box::new)?;
        Ok(Self { name: Some((dir, name.to_owned())), ..Self::new(&socket)? })
    }

    /// Waits no longer than this for answers that take no work.
    #[must_use]
    pub fn with_quick_timeout(mut self, quick: Duration) -> Self {
        self.quick = quick;
        self
    }

    /// Name, status, configuration.
    ///
    /// # Errors
    /// See [`ClientError`], here and below.
    pub fn info(&self) -> Result<VmInfo, ClientError> {
        self.ask(Method::GET, "/v1/vm", Bytes::new(), Some(self.quick))
    }

    /// Counters.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stats(&self) -> Result<VmStats, ClientError> {
        self.ask(Method::GET, "/v1/vm/stats", Bytes::new(), Some(self.quick))
    }

    /// One of the commands `pause`, `resume`, `power-button`, `kill` and `reset`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn command(&self, command: &str) -> Result<VmStatus, ClientError> {
        let path = format!("/v1/vm/{command}");
        let reply: StatusReply = self.ask(Method::PUT, &path, Bytes::new(), Some(COMMAND))?;
        Ok(reply.status)
    }

    /// As [`Client::command`], of a command with a body: `balloon`, `link` and `console-size`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn command_with(
        &self,
        command: &str,
        body: &impl Serialize,
    ) -> Result<VmStatus, ClientError> {
        let path = format!("/v1/vm/{command}");
        let body = serde_json::to_vec(body).map_err(protocol)?;
        let reply: StatusReply = self.ask(Method::PUT, &path, body.into(), Some(COMMAND))?;
        Ok(reply.status)
    }

    /// Migrates the VM; gives the report, or of a detached migration the id. Takes as long as it takes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn migrate(&self, request: &MigrateRequest) -> Result<Value, ClientError> {
        let body = serde_json::to_vec(request).map_err(protocol)?;
        self.ask(Method::PUT, "/v1/vm/migrate", body.into(), None)
    }

    /// The migration that is under way, and the last one.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn migration(&self) -> Result<MigrationInfo, ClientError> {
        self.ask(Method::GET, "/v1/vm/migration", Bytes::new(), Some(self.quick))
    }

    /// Saves the VM. Takes as long as it takes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn save(&self, request: &SaveRequest) -> Result<SaveReport, ClientError> {
        let body = serde_json::to_vec(request).map_err(protocol)?;
        self.ask(Method::PUT, "/v1/vm/save", body.into(), None)
    }

    /// Events so far with a number above `after`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn events(&self, after: u64) -> Result<Vec<Event>, ClientError> {
        let path = format!("/v1/vm/events?after={after}");
        let bytes = self.bytes(Method::GET, &path, Bytes::new(), Some(self.quick))?;
        let lines = bytes.split(|&b| b == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).map_err(protocol)).collect()
    }

    /// Events with a number above `after`, those to come too.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn follow(&self, after: u64) -> Result<EventStream<'_>, ClientError> {
        let path = format!("/v1/vm/events?after={after}&follow=true");
        let request = self.request(Method::GET, &path, Bytes::new());
        let body = self.wait(Some(self.quick), request)?.into_body();
        Ok(EventStream { client: self, body, buffer: VecDeque::new() })
    }

    fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        timeout: Option<Duration>,
    ) -> Result<T, ClientError> {
        let bytes = self.bytes(method, path, body, timeout)?;
        serde_json::from_slice(&bytes).map_err(protocol)
    }

    fn bytes(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        timeout: Option<Duration>,
    ) -> Result<Bytes, ClientError> {
        self.wait(timeout, async { collect(self.request(method, path, body).await?).await })
    }

    fn wait<T>(
        &self,
        timeout: Option<Duration>,
        work: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        self.runtime.block_on(async {
            let Some(timeout) = timeout else { return work.await };
            match tokio::time::timeout(timeout, work).await {
                Ok(result) => result,
                Err(_) => Err(ClientError::Timeout { socket: self.socket.clone(), timeout }),
            }
        })
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let deadline = Instant::now() + LOOK_UP;
        let mut socket = self.socket.clone();
        loop {
            let error = match UnixStream::connect(&socket).await {
                Ok(stream) => return Ok(stream),
                Err(source) => ClientError::Connect { socket, source },
            };
            let Some((dir, name)) = &self.name else { return Err(error) };
            if !error.is_gone() || Instant::now() >= deadline {
                return Err(error);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
            socket = dir.find(name).map_err(Box::new)?.socket;
        }
    }

    /// Sends a request; a refusal is an error.
    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(protocol)?;
        // Runs while the facade waits for something; ends with the connection.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            // HTTP/1.1 requires the header; on a Unix socket it says nothing.
            .header(hyper::header::HOST, "minivmm")
            .body(Full::new(body))
            .map_err(protocol)?;
        let response = sender.send_request(request).await.map_err(protocol)?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(response);
        }
        let text = collect(response).await?;
        let message = match serde_json::from_slice::<ErrorReply>(&text) {
            Ok(reply) => reply.error,
            Err(_) => format!("HTTP status {status}"),
        };
        Err(ClientError::Refused { status: status.as_u16(), message })
    }
}

async fn collect(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), MAX_REPLY).collect().await;
    body.map(http_body_util::Collected::to_bytes).map_err(protocol)
}

/// Events as they come; see [`Client::follow`].
#[derive(Debug)]
pub struct EventStream<'a> {
    client: &'a Client,
    body: Incoming,
    buffer: VecDeque<u8>,
}

impl EventStream<'_> {
    /// Waits for the next event; `None` when the VM has closed its log. Without a `timeout` it
    /// waits for as long as it takes.
    ///
    /// # Errors
    /// [`ClientError::Timeout`], after which one may go on waiting; the connection broke.
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Option<Event>, ClientError> {
        let client = self.client;
        client.wait(timeout, self.read())
    }

    /// Safe to cancel: nothing taken from the body is lost.
    async fn read(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).map(Some).map_err(protocol);
            }
            if self.buffer.len() > MAX_EVENT {
                return Err(protocol(format!("an event of more than {MAX_EVENT} bytes")));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame.map_err(protocol)?.into_data() {
                        self.buffer.extend(data);
                    }
                }
            }
        }
    }
}
