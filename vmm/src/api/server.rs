//! The server: one thread, one task per connection.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixStream;
use tokio::sync::{watch, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::routes::{router, Shared};
use crate::control::Control;

/// What clients may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once; more are told so and closed.
    pub connections: usize,
    /// Clients that follow the event log at once.
    pub followers: usize,
    /// Commands that run at once; more wait.
    pub commands: usize,
    /// Time for a whole request header, and for a kept connection to send the next.
    pub header_timeout: Duration,
    /// Time for a whole request body.
    pub body_timeout: Duration,
    /// Time that a shutdown leaves for answers on their way.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            followers: 32,
            commands: 4,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(10),
            grace: Duration::from_secs(1),
        }
    }
}

/// Threads of the blocking pool beyond those that commands may take.
const QUICK_THREADS: usize = 4;

/// Largest request header, bytes; 8192 is the least that hyper takes.
const MAX_HEADER: usize = 16 << 10;

/// Pause after a failed accept: it fails again at once while descriptors are short.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Told to those who come when all connections are taken.
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
    content-length: 58\r\nconnection: close\r\n\r\n\
    {\"error\":\"too many connections: close some and try again\"}";

/// A running server. Dropping it ends it too.
#[derive(Debug)]
pub struct ApiHandle {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl ApiHandle {
    /// Accepts no more, lets answers on their way be sent within [`Limits::grace`], and returns
    /// when the server's thread has ended. A command that still runs is not waited for.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl Drop for ApiHandle {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            if thread.join().is_err() {
                tracing::error!("the API thread panicked");
            }
        }
    }
}

/// Serves the API of `control` on `listener`, on a thread of its own named `api`.
///
/// # Errors
/// The thread or its runtime cannot be created.
pub fn serve(listener: UnixListener, control: Arc<dyn Control>) -> io::Result<ApiHandle> {
    serve_with(listener, control, Limits::default())
}

/// [`serve`] with other limits.
///
/// # Errors
/// As there.
pub fn serve_with(
    listener: UnixListener,
    control: Arc<dyn Control>,
    limits: Limits,
) -> io::Result<ApiHandle> {
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(limits.commands + QUICK_THREADS)
        .thread_name("api-call")
        .build()?;
    let listener = {
        let _context = runtime.enter();
        tokio::net::UnixListener::from_std(listener)?
    };
    let (stop, stopped) = watch::channel(false);
    let shared = Shared {
        control,
        limits,
        commands: Arc::new(Semaphore::new(limits.commands)),
        followers: Arc::new(Semaphore::new(limits.followers)),
        stop: stopped,
    };
    let thread = std::thread::Builder::new().name("api".to_owned()).spawn(move || {
        runtime.block_on(run(listener, shared));
        // Not waited for: a save or a pause that hangs must not keep the process.
        runtime.shutdown_background();
    })?;
    Ok(ApiHandle { stop, thread: Some(thread) })
}

async fn run(listener: tokio::net::UnixListener, shared: Shared) {
    let limits = shared.limits;
    let mut stop = shared.stop.clone();
    let stopped = shared.stop.clone();
    let router = router(shared);
    let free = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    loop {
        // Forgets tasks that have ended.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => match Arc::clone(&free).try_acquire_owned() {
                Ok(permit) => {
                    let (router, stopped) = (router.clone(), stopped.clone());
                    connections.spawn(connection(stream, router, limits, permit, stopped));
                }
                Err(_) => {
                    // A fresh socket's buffer has room for it.
                    let _ = stream.try_write(BUSY);
                }
            },
            Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept an API connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    drop(listener);
    let all_answered = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.grace, all_answered).await.is_err() {
        tracing::debug!(left = connections.len(), "API connections cut");
    }
}

async fn connection(
    stream: UnixStream,
    router: Router,
    limits: Limits,
    _permit: OwnedSemaphorePermit,
    mut stop: watch::Receiver<bool>,
) {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(MAX_HEADER);
    let connection =
        builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let stopped = async { drop(stop.wait_for(|stop| *stop).await) };
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stopped => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "API connection ended");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_busy_answer_has_the_length_that_it_says() {
        let text = std::str::from_utf8(BUSY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
        serde_json::from_str::<super::super::ErrorReply>(body).unwrap();
    }
}
