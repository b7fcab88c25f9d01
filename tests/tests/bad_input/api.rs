//! Nonsense on a VM's control socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use tests::{add, Host, Suite, Vm, PATIENCE};

pub fn add(suite: &mut Suite, kvm: &Result<(), String>) {
    add!(suite, &[kvm];
        malformed_json_is_refused,
        bodies_about_devices_that_are_wrong,
        oversized_json_is_refused,
        what_is_no_http_is_refused,
        a_path_that_cannot_be_saved_to_is_refused,
    );
}

fn start(host: &Host) -> Vm {
    host.run("ws=1 dirty=100 report=100 pace=0", &[]).ready()
}

fn connect(host: &Host) -> UnixStream {
    let stream = UnixStream::connect(host.runtime_dir().join("vm.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends bytes; gives all of the answer.
fn exchange(host: &Host, request: &[u8]) -> String {
    let mut stream = connect(host);
    // The other side may answer and close before it has read everything.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn put(host: &Host, path: &str, body: &[u8]) -> (u16, String) {
    let length = body.len();
    let head = format!(
        "PUT {path} HTTP/1.1\r\nHost: vm\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    let answer = exchange(host, &[head.as_bytes(), body].concat());
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status: {answer:?}"));
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    (status, body["error"].as_str().unwrap().to_owned())
}

fn malformed_json_is_refused() {
    let host = Host::new();
    let mut vm = start(&host);
    for (body, words) in [
        (&b""[..], "EOF"),
        (b"{", "line 1 column 1"),
        (b"{\"path\": \"/x\",\n \"then_stop\": maybe}", "line 2 column"),
        (b"[1, 2]", "path"),
        (b"{\"path\": 5}", "line 1 column 10"),
        (b"{\"path\": \"/x\", \"then_shout\": true}", "then_shout"),
        (b"{}", "missing field `path`"),
        (b"\xFF\xFE", "line 1 column 1"),
        (b"{\"path\": \"relative\"}", "not absolute"),
    ] {
        let (status, error) = put(&host, "/v1/vm/save", body);
        assert_eq!(status, 400, "{error}");
        assert!(error.contains(words), "nothing about {words:?}: {error}");
    }
    // Nested as deep as there is room: the parser has a limit of its own.
    let (status, error) = put(&host, "/v1/vm/save", &b"[".repeat(60 << 10));
    assert_eq!(status, 400, "{error}");
    let (status, error) = put(&host, "/v1/vm/explode", b"");
    assert_eq!(status, 404, "{error}");
    vm.verify();
}

fn bodies_about_devices_that_are_wrong() {
    let host = Host::new();
    let mut vm =
        host.run("ws=1 dirty=100 report=100 pace=0", &["--balloon", "--virtio-console"]).ready();
    for (route, body, status, words) in [
        ("balloon", "", 400, "EOF"),
        ("balloon", "{}", 400, "missing field `target_bytes`"),
        ("balloon", r#"{"target_bytes": -4096}"#, 400, "target_bytes|-4096|u64"),
        ("balloon", r#"{"target_bytes": 4096.5}"#, 400, "line 1"),
        ("balloon", r#"{"target_bytes": "16M"}"#, 400, "line 1"),
        ("balloon", r#"{"target_bytes": 18446744073709551616}"#, 400, "line 1"),
        ("balloon", r#"{"target_bytes": 4096, "now": true}"#, 400, "now"),
        ("balloon", r#"{"target_bytes": 1}"#, 400, "whole pages"),
        ("balloon", r#"{"target_bytes": 67112960}"#, 400, "at most the 67108864 bytes"),
        ("link", "{}", 400, "missing field `card`"),
        ("link", r#"{"card": "eth0"}"#, 400, "missing field `up`"),
        ("link", r#"{"card": "eth0", "up": "yes"}"#, 400, "line 1"),
        ("link", r#"{"card": ["eth0"], "up": true}"#, 400, "line 1"),
        ("link", r#"{"card": "eth0", "up": true}"#, 409, "no network card eth0"),
        ("link", r#"{"card": "", "up": true}"#, 409, "no network card"),
        ("console-size", "{}", 400, "missing field `columns`"),
        ("console-size", r#"{"columns": 80, "rows": 65536}"#, 400, "65536"),
        ("console-size", r#"{"columns": -1, "rows": 25}"#, 400, "-1"),
        ("console-size", r#"{"columns": 80, "rows": 25, "depth": 3}"#, 400, "depth"),
    ] {
        let (answer, error) = put(&host, &format!("/v1/vm/{route}"), body.as_bytes());
        assert_eq!(answer, status, "{route} {body}: {error}");
        let found = words.split('|').any(|word| error.contains(word));
        assert!(found, "nothing about {words:?}: {error}");
    }
    let devices = host.json(&["stats", "vm"])["devices"].clone();
    assert_eq!(devices[0]["counters"]["target_pages"], 0, "nothing of it was used");
    vm.verify();
}

fn oversized_json_is_refused() {
    let host = Host::new();
    let mut vm = start(&host);
    let long = format!("{{\"path\": \"/{}\"}}", "x".repeat(65 << 10));
    let (status, error) = put(&host, "/v1/vm/save", long.as_bytes());
    assert_eq!(status, 413, "{error}");
    assert!(error.contains("65536 bytes"), "{error}");
    // A length alone costs nothing, and a body without an end is cut off.
    let head = b"PUT /v1/vm/save HTTP/1.1\r\nHost: vm\r\nContent-Length: 99999999999999\r\n\r\n";
    let answer = exchange(&host, &[&head[..], &b"x".repeat(1 << 20)].concat());
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let head = b"PUT /v1/vm/save HTTP/1.1\r\nHost: vm\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunk = [&b"10000\r\n"[..], &b"x".repeat(0x1_0000), b"\r\n"].concat();
    let answer = exchange(&host, &[&head[..], &chunk.repeat(4)].concat());
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    vm.verify();
}

fn what_is_no_http_is_refused() {
    let host = Host::new();
    let mut vm = start(&host);
    // A client that says nothing holds up nobody.
    let _silent = connect(&host);
    for request in [
        &b"\0\0\0\0\0\0\0\0\r\n\r\n"[..],
        b"MINIVMMS\x01\0\0\0\r\n\r\n",
        b"GET /v1/vm HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
    ] {
        let answer = exchange(&host, request);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    let header = format!("GET /v1/vm HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    let answer = exchange(&host, header.as_bytes());
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    assert_eq!(host.json(&["info", "vm"])["status"], "running");
    vm.verify();
}

fn a_path_that_cannot_be_saved_to_is_refused() {
    let host = Host::new();
    let mut vm = start(&host);
    let directory = host.root().to_str().unwrap();
    host.cli(&["save", "vm", directory]).refused(1, &[directory, "not a regular file"]);
    host.cli(&["save", "vm", "/dev/null"]).refused(1, &["/dev/null", "not a regular file"]);
    let nowhere = host.file("no/such/directory/vm.snapshot");
    host.cli(&["save", "vm", &nowhere]).refused(1, &["no/such/directory", "no such file"]);
    // Not even with --stop is a VM ended that was not saved.
    host.cli(&["save", "vm", &nowhere, "--stop"]).refused(1, &["no such file"]);
    assert_eq!(host.json(&["info", "vm"])["status"], "running");
    vm.verify();
    assert!(host.files().is_empty());
}
