//! What the API can be asked, and how each request reaches [`Control`].

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::{header, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Frame;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::{mpsc, watch, OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use super::{
    BalloonRequest, ConsoleSizeRequest, EventsQuery, Limits, LinkRequest, SaveRequest, StatusReply,
    MAX_BODY,
};
use crate::config::VmConfig;
use crate::control::{
    Control, ControlError, MigrateRequest, MigrateSettings, MigrationInfo, RecoverRequest,
    SaveReport, VmInfo, VmStats,
};
use crate::events::{Event, EventLog};

/// Every route: method and path.
pub const ROUTES: &[(&str, &str)] = &[
    ("GET", "/v1/vm"),
    ("GET", "/v1/vm/config"),
    ("GET", "/v1/vm/stats"),
    ("GET", "/v1/vm/events"),
    ("PUT", "/v1/vm/pause"),
    ("PUT", "/v1/vm/resume"),
    ("PUT", "/v1/vm/power-button"),
    ("PUT", "/v1/vm/kill"),
    ("PUT", "/v1/vm/reset"),
    ("PUT", "/v1/vm/save"),
    ("PUT", "/v1/vm/balloon"),
    ("PUT", "/v1/vm/link"),
    ("PUT", "/v1/vm/console-size"),
    ("PUT", "/v1/vm/migrate"),
    ("GET", "/v1/vm/migration"),
    ("PUT", "/v1/vm/migrate-set"),
    ("PUT", "/v1/vm/migrate-start-postcopy"),
    ("PUT", "/v1/vm/migrate-recover"),
    ("PUT", "/v1/vm/migrate-cancel"),
];

/// What handlers share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) control: Arc<dyn Control>,
    pub(super) limits: Limits,
    /// One permit per command that runs, but for those that end others: the rest of the blocking pool is left for `info`.
    pub(super) commands: Arc<Semaphore>,
    pub(super) followers: Arc<Semaphore>,
    /// True once the server is to end.
    pub(super) stop: watch::Receiver<bool>,
}

pub(super) fn router(shared: Shared) -> Router {
    Router::new()
        .route("/v1/vm", get(info))
        .route("/v1/vm/config", get(config))
        .route("/v1/vm/stats", get(stats))
        .route("/v1/vm/events", get(events))
        .route("/v1/vm/pause", put(pause))
        .route("/v1/vm/resume", put(resume))
        .route("/v1/vm/power-button", put(power_button))
        .route("/v1/vm/kill", put(kill))
        .route("/v1/vm/reset", put(reset))
        .route("/v1/vm/save", put(save))
        .route("/v1/vm/balloon", put(balloon))
        .route("/v1/vm/link", put(link))
        .route("/v1/vm/console-size", put(console_size))
        .route("/v1/vm/migrate", put(migrate))
        .route("/v1/vm/migration", get(migration))
        .route("/v1/vm/migrate-set", put(migrate_set))
        .route("/v1/vm/migrate-start-postcopy", put(migrate_start_postcopy))
        .route("/v1/vm/migrate-recover", put(migrate_recover))
        .route("/v1/vm/migrate-cancel", put(migrate_cancel))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .with_state(shared)
}

type Reply<T> = Result<Json<T>, ApiError>;

async fn not_found(method: Method, uri: Uri) -> ApiError {
    let message = format!("there is no {method} {}: docs/openapi.yaml has the list", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, message)
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let path = uri.path();
    let allowed = ROUTES.iter().find(|(_, p)| *p == path).map_or("another method", |(m, _)| m);
    let message = format!("{method} is not possible on {path}: use {allowed}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn info(State(shared): State<Shared>) -> Reply<VmInfo> {
    blocking(&shared, None, |control| control.info()).await.map(Json)
}

async fn config(State(shared): State<Shared>) -> Reply<VmConfig> {
    blocking(&shared, None, |control| control.info().config).await.map(Json)
}

async fn stats(State(shared): State<Shared>) -> Reply<VmStats> {
    blocking(&shared, None, |control| control.stats()).await.map(Json)
}

async fn pause(State(shared): State<Shared>) -> Reply<StatusReply> {
    command(&shared, |control| control.pause()).await
}

async fn resume(State(shared): State<Shared>) -> Reply<StatusReply> {
    command(&shared, |control| control.resume()).await
}

async fn power_button(State(shared): State<Shared>) -> Reply<StatusReply> {
    command(&shared, |control| control.power_button()).await
}

async fn kill(State(shared): State<Shared>) -> Reply<StatusReply> {
    urgent_command(&shared, |control| control.kill()).await
}

async fn reset(State(shared): State<Shared>) -> Reply<StatusReply> {
    command(&shared, |control| control.reset()).await
}

async fn balloon(State(shared): State<Shared>, request: Request) -> Reply<StatusReply> {
    let BalloonRequest { target_bytes } = read_json(request, &shared.limits).await?;
    command(&shared, move |control| control.set_balloon(target_bytes)).await
}

async fn link(State(shared): State<Shared>, request: Request) -> Reply<StatusReply> {
    let LinkRequest { card, up } = read_json(request, &shared.limits).await?;
    command(&shared, move |control| control.set_link(&card, up)).await
}

async fn console_size(State(shared): State<Shared>, request: Request) -> Reply<StatusReply> {
    let ConsoleSizeRequest { columns, rows } = read_json(request, &shared.limits).await?;
    command(&shared, move |control| control.resize_console(columns, rows)).await
}

/// Goes on when the client is gone.
async fn migrate(State(shared): State<Shared>, request: Request) -> Reply<Value> {
    let request: MigrateRequest = read_json(request, &shared.limits).await?;
    let permit = command_permit(&shared).await?;
    let report = blocking(&shared, permit, move |control| control.migrate(&request)).await?;
    Ok(Json(report?))
}

async fn migration(State(shared): State<Shared>) -> Reply<MigrationInfo> {
    blocking(&shared, None, |control| control.migration()).await.map(Json)
}

async fn migrate_set(State(shared): State<Shared>, request: Request) -> Reply<StatusReply> {
    let settings: MigrateSettings = read_json(request, &shared.limits).await?;
    command(&shared, move |control| control.set_migration(&settings)).await
}

async fn migrate_start_postcopy(State(shared): State<Shared>) -> Reply<StatusReply> {
    command(&shared, |control| control.start_postcopy()).await
}

async fn migrate_recover(State(shared): State<Shared>, request: Request) -> Reply<StatusReply> {
    let request: RecoverRequest = read_json(request, &shared.limits).await?;
    command(&shared, move |control| control.recover_migration(&request)).await
}

async fn migrate_cancel(State(shared): State<Shared>) -> Reply<StatusReply> {
    urgent_command(&shared, |control| control.cancel_migration()).await
}

/// Goes on when the client is gone: half a saved file would be worse than an unwanted one.
async fn save(State(shared): State<Shared>, request: Request) -> Reply<SaveReport> {
    let SaveRequest { path, then_stop, incomplete } = read_json(request, &shared.limits).await?;
    if !path.is_absolute() {
        let message = format!("the path {} is not absolute: begin it with /", path.display());
        return Err(ApiError::bad_request(message));
    }
    if then_stop && incomplete {
        return Err(ApiError::bad_request(
            "then_stop and incomplete exclude one another".to_owned(),
        ));
    }
    let permit = command_permit(&shared).await?;
    let report = blocking(&shared, permit, move |control| match incomplete {
        true => control.save_incomplete(path),
        false => control.save(path, then_stop),
    });
    let report = report.await?;
    Ok(Json(report?))
}

async fn command(
    shared: &Shared,
    work: impl FnOnce(&dyn Control) -> Result<(), ControlError> + Send + 'static,
) -> Reply<StatusReply> {
    let permit = command_permit(shared).await?;
    permitted(shared, permit, work).await
}

/// What ends others that wait does not wait for them.
async fn urgent_command(
    shared: &Shared,
    work: impl FnOnce(&dyn Control) -> Result<(), ControlError> + Send + 'static,
) -> Reply<StatusReply> {
    permitted(shared, None, work).await
}

async fn permitted(
    shared: &Shared,
    permit: Option<OwnedSemaphorePermit>,
    work: impl FnOnce(&dyn Control) -> Result<(), ControlError> + Send + 'static,
) -> Reply<StatusReply> {
    let status = blocking(shared, permit, |control| {
        work(control)?;
        Ok::<_, ControlError>(control.info().status)
    })
    .await??;
    Ok(Json(StatusReply { status }))
}

async fn command_permit(shared: &Shared) -> Result<Option<OwnedSemaphorePermit>, ApiError> {
    let permit = Arc::clone(&shared.commands).acquire_owned().await;
    permit.map(Some).map_err(|_| ending())
}

fn ending() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the VM is ending")
}

/// Calls the VM on the blocking pool.
async fn blocking<T: Send + 'static>(
    shared: &Shared,
    permit: Option<OwnedSemaphorePermit>,
    work: impl FnOnce(&dyn Control) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let control = Arc::clone(&shared.control);
    let task = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work(&*control)
    });
    task.await.map_err(|e| {
        let message = format!("a fault in minivmm itself: {e}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    })
}

/// Reads a body as JSON, whatever its content type says: `curl -d` sends another.
async fn read_json<T: DeserializeOwned>(request: Request, limits: &Limits) -> Result<T, ApiError> {
    let body = Limited::new(request.into_body(), MAX_BODY).collect();
    let bytes = match tokio::time::timeout(limits.body_timeout, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(e)) if e.is::<LengthLimitError>() => {
            let message = format!("the body is more than {MAX_BODY} bytes long");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message));
        }
        Ok(Err(e)) => return Err(ApiError::bad_request(format!("the body broke off: {e}"))),
        Err(_) => {
            let message = format!("the body did not come within {:?}", limits.body_timeout);
            return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message));
        }
    };
    serde_json::from_slice(&bytes)
        .map_err(|e| ApiError::bad_request(format!("the body is not the JSON expected: {e}")))
}

async fn events(
    State(shared): State<Shared>,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(EventsQuery { after, follow }) =
        query.map_err(|e| ApiError::bad_request(e.body_text()))?;
    let log = shared.control.events().clone();
    let body = if follow {
        let permit = Arc::clone(&shared.followers).try_acquire_owned().map_err(|_| {
            let message = format!(
                "{} clients follow the events already: end one, or ask without follow",
                shared.limits.followers
            );
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message)
        })?;
        let (sender, receiver) = mpsc::channel(16);
        let stop = shared.stop.clone();
        tokio::spawn(async move {
            let _permit = permit;
            follow_events(&log, after, &sender, stop).await;
        });
        Body::new(ChannelBody(receiver))
    } else {
        let lines: Vec<u8> = log.after(after).iter().flat_map(|e| line(e).to_vec()).collect();
        Body::from(lines)
    };
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// Sends events until the log is closed, the server ends, or the client is gone.
async fn follow_events(
    log: &EventLog,
    mut after: u64,
    sender: &mpsc::Sender<Bytes>,
    mut stop: watch::Receiver<bool>,
) {
    let mut changed = log.subscribe();
    loop {
        changed.borrow_and_update();
        // Asked before the events are read: what comes later is then not taken for the last.
        let last = log.is_closed() || *stop.borrow_and_update();
        for event in log.after(after) {
            after = event.seq;
            if sender.send(line(&event)).await.is_err() {
                return;
            }
        }
        if last {
            return;
        }
        tokio::select! {
            _ = changed.changed() => {}
            _ = stop.changed() => {}
            () = sender.closed() => return,
        }
    }
}

/// An event as a line of JSON.
fn line(event: &Event) -> Bytes {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    Bytes::from(line)
}

/// A response body that arrives through a channel, and ends when its sender is dropped.
struct ChannelBody(mpsc::Receiver<Bytes>);

impl HttpBody for ChannelBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|bytes| bytes.map(|b| Ok(Frame::data(b))))
    }
}
