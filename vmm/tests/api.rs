//! The control API over a real socket, with a VM that is not one.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use common::{serve_vm, FakeVm, Served, PATIENCE};
use vmm::api::{serve, ApiHandle, Client, ClientError, Limits, SaveRequest, ROUTES};
use vmm::control::{ControlError, VmStatus};
use vmm::runtime_dir::{ClaimedName, RuntimeDir};
use vmm_sys_util::tempdir::TempDir;

fn served() -> Served {
    serve_vm(FakeVm::new("vm"), Limits::default())
}

fn connect(served: &Served) -> UnixStream {
    let stream = UnixStream::connect(&served.socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends a request as raw text and reads the whole answer: status, head and body.
fn raw(served: &Served, request: impl AsRef<[u8]>) -> (u16, String, String) {
    let mut stream = connect(served);
    // A refusal may come, and the connection go, before all is sent.
    let _ = stream.write_all(request.as_ref());
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0);
    (status, head.to_owned(), body.to_owned())
}

fn request(method: &str, path: &str, body: &str) -> String {
    let length = body.len();
    format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
}

fn error_of(body: &str) -> String {
    let json: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(json.as_object().unwrap().len(), 1, "{body}");
    json["error"].as_str().unwrap().to_owned()
}

#[test]
fn the_client_can_ask_everything() {
    let served = served();
    let client = Client::new(&served.socket).unwrap();
    let info = client.info().unwrap();
    assert_eq!((info.name.as_str(), info.status), ("vm", VmStatus::Running));
    assert_eq!(info.config, common::config("vm"));
    assert_eq!(client.stats().unwrap().reboots, 3);
    assert_eq!(client.command("pause").unwrap(), VmStatus::Paused);
    assert_eq!(client.command("resume").unwrap(), VmStatus::Running);
    client.command("reset").unwrap();
    let save = SaveRequest { path: "/tmp/x".into(), then_stop: true, incomplete: false };
    assert_eq!(client.save(&save).unwrap().pages, 7);
    let save = SaveRequest { path: "/tmp/y".into(), then_stop: false, incomplete: true };
    assert_eq!(client.save(&save).unwrap().pages, 7);
    assert_eq!(client.command("power-button").unwrap(), VmStatus::Stopped);
    client.command("kill").unwrap();
    assert_eq!(
        served.vm.calls(),
        [
            "pause",
            "resume",
            "reset",
            "save /tmp/x true",
            "save-incomplete /tmp/y",
            "power-button",
            "kill"
        ]
    );
}

#[test]
fn the_configuration_is_served_alone_too() {
    let served = served();
    let (status, head, body) = raw(&served, request("GET", "/v1/vm/config", ""));
    assert_eq!(status, 200);
    assert!(head.contains("content-type: application/json"), "{head}");
    let config: vmm::config::VmConfig = serde_json::from_str(&body).unwrap();
    assert_eq!(config, common::config("vm"));
}

#[test]
fn refusals_of_the_vm_keep_their_text_and_kind() {
    let served = served();
    let client = Client::new(&served.socket).unwrap();
    for (error, expected) in [
        (ControlError::Conflict("the VM migrates".into()), 409),
        (ControlError::BadRequest("no".into()), 400),
        (ControlError::Failed("disk full".into()), 500),
    ] {
        let text = error.to_string();
        *served.vm.pause_answer.lock().unwrap() = Err(error);
        match client.command("pause").unwrap_err() {
            ClientError::Refused { status, message } => {
                assert_eq!((status, message), (expected, text));
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn malformed_json_is_refused_with_its_position() {
    let served = served();
    for (body, part) in [
        ("{\"path\": \n nonsense}", "line 2 column 3"),
        ("", "line 1 column 0"),
        ("{}", "missing field `path`"),
        ("{\"path\": 5}", "expected path string at line 1 column 10"),
        ("{\"path\": \"/x\", \"force\": true}", "unknown field `force`"),
        ("{\"path\": \"x\"}", "not absolute"),
        ("\u{feff}{}", "line 1 column 1"),
    ] {
        let (status, _, answer) = raw(&served, request("PUT", "/v1/vm/save", body));
        assert_eq!(status, 400, "{body}");
        assert!(error_of(&answer).contains(part), "{body}: {answer}");
    }
    let deep = "[".repeat(60_000);
    assert_eq!(raw(&served, request("PUT", "/v1/vm/save", &deep)).0, 400);
    assert!(served.vm.calls().is_empty());
}

#[test]
fn an_oversized_body_is_refused_with_or_without_its_length() {
    let served = served();
    let body = format!("{{\"path\": \"/{}\"}}", "x".repeat(64 << 10));
    let (status, _, answer) = raw(&served, request("PUT", "/v1/vm/save", &body));
    assert_eq!(status, 413);
    assert!(error_of(&answer).contains("65536"), "{answer}");

    let mut chunked = "PUT /v1/vm/save HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    for _ in 0..20 {
        chunked += &format!("1000\r\n{}\r\n", "x".repeat(4096));
    }
    chunked += "0\r\n\r\n";
    assert_eq!(raw(&served, chunked).0, 413);
    assert!(served.vm.calls().is_empty());
}

#[test]
fn an_oversized_header_is_refused() {
    let served = served();
    let huge = format!("GET /v1/vm HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "x".repeat(1 << 20));
    let (status, ..) = raw(&served, huge);
    assert!(status == 431 || status == 0, "{status}");
    Client::new(&served.socket).unwrap().info().unwrap();
}

#[test]
fn unknown_paths_methods_and_queries_are_refused_as_json() {
    let served = served();
    let (status, _, body) = raw(&served, request("GET", "/v2/vm", ""));
    assert_eq!(status, 404);
    assert!(error_of(&body).contains("GET /v2/vm"), "{body}");

    let (status, head, body) = raw(&served, request("DELETE", "/v1/vm/pause", ""));
    assert_eq!(status, 405);
    assert!(head.to_lowercase().contains("allow: put"), "{head}");
    assert!(error_of(&body).contains("use PUT"), "{body}");

    for query in ["after=x", "after=-1", "follow=maybe", "until=5"] {
        let (status, _, body) = raw(&served, request("GET", &format!("/v1/vm/events?{query}"), ""));
        assert_eq!(status, 400, "{query}");
        error_of(&body);
    }
}

#[test]
fn what_is_not_http_is_refused() {
    let served = served();
    assert_eq!(raw(&served, "hello there\r\n\r\n").0, 400);
    assert_eq!(raw(&served, [0xffu8; 4096]).0, 400);
    Client::new(&served.socket).unwrap().info().unwrap();
}

#[test]
fn events_can_be_read_and_followed_to_the_end() {
    let served = served();
    let client = Client::new(&served.socket).unwrap();
    let kinds = |events: &[vmm::events::Event]| -> Vec<String> {
        events.iter().map(|e| e.kind.clone()).collect()
    };
    assert_eq!(kinds(&client.events(0).unwrap()), ["running"]);
    assert!(client.events(1).unwrap().is_empty());

    let mut stream = client.follow(0).unwrap();
    assert_eq!(stream.next(Some(PATIENCE)).unwrap().unwrap().kind, "running");
    let early = stream.next(Some(Duration::from_millis(1)));
    assert!(matches!(early, Err(ClientError::Timeout { .. })), "{early:?}");
    served.vm.events.push("paused", serde_json::json!({"why": "test"}));
    let event = stream.next(Some(PATIENCE)).unwrap().unwrap();
    assert_eq!((event.seq, event.detail["why"].as_str()), (2, Some("test")));
    served.vm.events.push("power-off", serde_json::json!({}));
    served.vm.events.close();
    assert_eq!(stream.next(Some(PATIENCE)).unwrap().unwrap().kind, "power-off");
    assert!(stream.next(Some(PATIENCE)).unwrap().is_none());
}

#[test]
fn a_follower_that_goes_away_gives_its_place_back() {
    let limits = Limits { followers: 1, ..Default::default() };
    let served = serve_vm(FakeVm::new("vm"), limits);
    let client = Client::new(&served.socket).unwrap();
    let mut first = connect(&served);
    first.write_all(b"GET /v1/vm/events?follow=true HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut byte = [0];
    first.read_exact(&mut byte).unwrap();
    match client.follow(0) {
        Err(ClientError::Refused { status: 503, message }) => {
            assert!(message.contains("follow"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    // No event comes that would make the server notice: it must see the closed connection.
    drop(first);
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        match client.follow(0) {
            Ok(mut stream) => {
                assert_eq!(stream.next(Some(PATIENCE)).unwrap().unwrap().seq, 1);
                break;
            }
            Err(e) => assert!(std::time::Instant::now() < deadline, "place not given back: {e}"),
        }
    }
}

#[test]
fn a_follower_that_does_not_read_holds_up_nobody() {
    let served = served();
    let mut idle = connect(&served);
    idle.write_all(b"GET /v1/vm/events?follow=true HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    // More than socket and channel can hold.
    for _ in 0..1024 {
        served.vm.events.push("noise", serde_json::json!({"text": "x".repeat(4096)}));
    }
    Client::new(&served.socket).unwrap().info().unwrap();
    served.api.shutdown();
}

#[test]
fn a_silent_client_is_cut_off() {
    let limits = Limits {
        header_timeout: Duration::from_millis(50),
        body_timeout: Duration::from_millis(50),
        ..Default::default()
    };
    let served = serve_vm(FakeVm::new("vm"), limits);
    let read_end = |stream: &mut UnixStream| {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    // Says nothing; stops within the header; stops within the body; keeps its connection idle.
    assert_eq!(read_end(&mut connect(&served)), "");
    let mut stream = connect(&served);
    stream.write_all(b"GET /v1/vm HTTP/1.1\r\nhost:").unwrap();
    read_end(&mut stream);
    let mut stream = connect(&served);
    stream.write_all(b"PUT /v1/vm/save HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{").unwrap();
    assert!(read_end(&mut stream).starts_with("HTTP/1.1 408 "));
    let mut stream = connect(&served);
    stream.write_all(b"GET /v1/vm HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    assert!(read_end(&mut stream).starts_with("HTTP/1.1 200 "));
}

#[test]
fn too_many_connections_are_told_so() {
    let limits = Limits { connections: 2, ..Default::default() };
    let served = serve_vm(FakeVm::new("vm"), limits);
    let (_one, _two) = (connect(&served), connect(&served));
    let (status, _, body) = raw(&served, request("GET", "/v1/vm", ""));
    assert_eq!(status, 503);
    assert!(error_of(&body).contains("too many connections"), "{body}");
    // A real client understands it too.
    match Client::new(&served.socket).unwrap().info() {
        Err(ClientError::Refused { status: 503, message }) => {
            assert!(message.contains("too many connections"), "{message}");
        }
        // It may find the connection closed before it has sent its request.
        Err(ClientError::Protocol(_)) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn info_and_an_end_do_not_wait_for_commands_that_take_their_time() {
    let served = served();
    served.vm.gate.close();
    let savers: Vec<_> = (0..Limits::default().commands + 4)
        .map(|i| {
            let socket = served.socket.clone();
            std::thread::spawn(move || {
                let path = format!("/tmp/{i}").into();
                Client::new(&socket).unwrap().save(&SaveRequest {
                    path,
                    then_stop: false,
                    incomplete: false,
                })
            })
        })
        .collect();
    while served.vm.calls().len() < Limits::default().commands {
        std::thread::yield_now();
    }
    let client = Client::new(&served.socket).unwrap();
    client.info().unwrap();
    assert_eq!(served.vm.calls().len(), Limits::default().commands);
    let refused = client.command("migrate-cancel").unwrap_err();
    assert!(matches!(refused, ClientError::Refused { status: 409, .. }), "{refused}");
    client.command("kill").unwrap();
    served.vm.gate.open();
    for saver in savers {
        saver.join().unwrap().unwrap();
    }
}

#[test]
fn a_shutdown_sends_the_last_events_and_closes_the_rest() {
    let served = served();
    let client = Client::new(&served.socket).unwrap();
    let mut stream = client.follow(0).unwrap();
    served.vm.events.push("power-off", serde_json::json!({}));
    let _silent = connect(&served);
    served.api.shutdown();
    assert_eq!(stream.next(Some(PATIENCE)).unwrap().unwrap().kind, "running");
    assert_eq!(stream.next(Some(PATIENCE)).unwrap().unwrap().kind, "power-off");
    assert!(stream.next(Some(PATIENCE)).unwrap().is_none());
    assert!(matches!(client.info(), Err(ClientError::Connect { .. })));
}

#[test]
fn a_vm_that_does_not_answer_is_named() {
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let socket = dir.as_path().join("s");
    let _nobody_accepts = vmm::runtime_dir::listen(&socket).unwrap();
    let client = Client::new(&socket).unwrap().with_quick_timeout(Duration::from_millis(1));
    let error = client.info().unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    assert!(error.to_string().contains(socket.to_str().unwrap()));
}

#[test]
fn every_route_is_there_and_takes_no_other_method() {
    let served = served();
    for (method, path) in ROUTES {
        let (status, _, body) = raw(&served, request(method, path, "{}"));
        assert!(![404, 405].contains(&status), "{method} {path}: {status} {body}");
        for other in ["GET", "PUT", "POST", "DELETE", "PATCH"] {
            let listed = ROUTES.contains(&(other, path));
            if !listed {
                assert_eq!(raw(&served, request(other, path, "")).0, 405, "{other} {path}");
            }
        }
    }
}

/// A runtime directory with the VM `vm`, which belongs to one process and is moved to another.
fn moving(temp: &TempDir) -> (RuntimeDir, ClaimedName, ClaimedName) {
    let dir = RuntimeDir::at(temp.as_path().join("rt")).unwrap();
    let (source, destination) = (dir.claim("vm").unwrap(), dir.claim_incoming("vm").unwrap());
    (dir, source, destination)
}

fn serve_at(name: &ClaimedName) -> ApiHandle {
    serve(name.listen().unwrap(), Arc::new(FakeVm::new("vm"))).unwrap()
}

#[test]
fn a_client_finds_a_vm_that_took_its_name_over() {
    let temp = TempDir::new().unwrap();
    let (dir, source, mut destination) = moving(&temp);
    let _api = serve_at(&destination);
    drop(source);
    let client = Client::of(dir.clone(), "vm").unwrap();
    destination.take_over().unwrap();
    assert_eq!(client.info().unwrap().name, "vm");
    drop(destination);
    let error = client.info().unwrap_err();
    assert!(matches!(error, ClientError::Lookup(_)), "{error}");
    assert!(error.to_string().contains("no VM named vm"), "{error}");
    assert!(matches!(Client::of(dir, "vm").unwrap_err(), ClientError::Lookup(_)));
}

#[test]
fn a_client_waits_for_the_source_to_give_the_name_up() {
    let temp = TempDir::new().unwrap();
    let (dir, source, destination) = moving(&temp);
    let _api = serve_at(&destination);
    // Nobody listens any more, and the name is still this one's.
    drop(source.listen().unwrap());
    let client = Client::of(dir, "vm").unwrap();
    let asking = std::thread::spawn(move || client.info().map(|info| info.name));
    drop(source);
    assert_eq!(asking.join().unwrap().unwrap(), "vm");
}
