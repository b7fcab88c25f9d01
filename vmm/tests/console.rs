//! Consoles without a VM: sockets, pseudo-terminals and files, from both ends.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vmm::config::ConsoleConfig;
use vmm::console::{
    attach, AttachEnd, Console, ConsoleInput, ConsolePaths, ConsoleWriter, OUTPUT_BUFFER, REFUSAL,
    REPLAY,
};
use vmm_sys_util::tempdir::TempDir;

/// Only a failing test waits that long.
const PATIENCE: Duration = Duration::from_secs(20);

/// A device with room for so many bytes.
#[derive(Default)]
struct Device {
    got: Mutex<(Vec<u8>, usize)>,
    changed: Condvar,
}

impl ConsoleInput for Device {
    fn feed(&self, bytes: &[u8]) -> usize {
        let mut got = self.got.lock().unwrap();
        let taken = bytes.len().min(got.1);
        got.0.extend_from_slice(&bytes[..taken]);
        got.1 -= taken;
        self.changed.notify_all();
        taken
    }
}

impl Device {
    fn make_room(&self, bytes: usize) {
        self.got.lock().unwrap().1 = bytes;
    }

    fn wait_for(&self, bytes: &[u8]) {
        let got = self.got.lock().unwrap();
        let (got, timeout) = self
            .changed
            .wait_timeout_while(got, PATIENCE, |got| got.0.len() < bytes.len())
            .unwrap();
        assert!(!timeout.timed_out(), "only {:?}", String::from_utf8_lossy(&got.0));
        assert_eq!(got.0, bytes);
    }
}

struct Bench {
    console: Console,
    writer: ConsoleWriter,
    device: Arc<Device>,
    dir: TempDir,
}

fn open(config: impl Fn(&TempDir) -> ConsoleConfig) -> Bench {
    let dir = TempDir::new().unwrap();
    let paths = ConsolePaths {
        socket: dir.as_path().join("vm.console"),
        pty_link: dir.as_path().join("vm.pty"),
    };
    let (console, writer) = Console::open(&config(&dir), &paths).unwrap();
    let device = Arc::new(Device::default());
    device.make_room(usize::MAX);
    console.connect(device.clone(), || panic!("nobody can leave here"));
    Bench { console, writer, device, dir }
}

fn socket() -> Bench {
    open(|_| ConsoleConfig::Socket)
}

fn client(bench: &Bench) -> UnixStream {
    let stream = UnixStream::connect(bench.console.path().unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn read(from: &mut impl Read, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

/// Waits for what another thread does, without a rhythm of its own.
fn until(mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !happened() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::yield_now();
    }
}

#[test]
fn a_socket_carries_both_directions() {
    let mut bench = socket();
    let mut stream = client(&bench);
    stream.write_all(b"typed").unwrap();
    bench.device.wait_for(b"typed");
    bench.writer.write_all(b"printed").unwrap();
    assert_eq!(read(&mut stream, 7), b"printed");
    assert_eq!(bench.console.handle().written_bytes(), 7);
    let path = bench.console.path().unwrap().to_owned();
    bench.console.close(PATIENCE);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert!(!path.exists());
}

#[test]
fn a_new_client_gets_the_last_output() {
    let mut bench = socket();
    let old: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
    bench.writer.write_all(&old).unwrap();
    // The first client's first byte shows that what came before was put aside; the next gets it
    // again, with what the first had read.
    let mut first = client(&bench);
    let replayed = read(&mut first, REPLAY);
    bench.writer.write_all(b"more").unwrap();
    let mut rest = read(&mut first, 4);
    // Under load the client may have come before all was put aside.
    while !rest.ends_with(b"more") {
        rest.extend(read(&mut first, 1));
    }
    let seen = [replayed, rest].concat();
    assert!([&old[..], b"more"].concat().ends_with(&seen), "not the last output");
    drop(first);

    let mut second = None;
    until(|| {
        // Until the console has noticed that the first is gone, it refuses.
        let mut stream = client(&bench);
        let start = read(&mut stream, REFUSAL.len());
        let refused = start == REFUSAL.as_bytes();
        second = Some([start, read_if(!refused, &mut stream, REPLAY - REFUSAL.len())].concat());
        !refused
    });
    let expected = [&old[..], b"more"].concat();
    assert_eq!(second.unwrap(), expected[expected.len() - REPLAY..]);
    assert_eq!(bench.console.handle().dropped_bytes(), 0);
}

fn read_if(yes: bool, from: &mut impl Read, length: usize) -> Vec<u8> {
    if yes {
        read(from, length)
    } else {
        Vec::new()
    }
}

#[test]
fn a_second_client_is_refused_with_a_message() {
    let mut bench = socket();
    let mut first = client(&bench);
    bench.writer.write_all(b"x").unwrap();
    read(&mut first, 1);
    let mut text = String::new();
    client(&bench).read_to_string(&mut text).unwrap();
    assert!(text.starts_with(REFUSAL), "{text}");
    assert!(text.contains(&std::process::id().to_string()), "{text}");
    first.write_all(b"still here").unwrap();
    bench.device.wait_for(b"still here");
}

#[test]
fn a_client_that_does_not_read_loses_the_newest_output_and_holds_up_nobody() {
    let mut bench = socket();
    let mut stream = client(&bench);
    bench.writer.write_all(b"start").unwrap();
    assert_eq!(read(&mut stream, 5), b"start");
    let line = [b'.'; 4096];
    let flood = 16 * OUTPUT_BUFFER as u64;
    for _ in 0..flood / 4096 {
        bench.writer.write_all(&line).unwrap();
    }
    let handle = bench.console.handle();
    let dropped = handle.dropped_bytes();
    assert_eq!(handle.written_bytes(), 5 + flood);
    assert!(dropped > 0 && dropped < flood, "{dropped}");
    // What was not dropped is all there.
    let kept = usize::try_from(flood - dropped).unwrap();
    assert_eq!(read(&mut stream, kept), vec![b'.'; kept]);
    bench.writer.write_all(b"end").unwrap();
    assert_eq!(read(&mut stream, 3), b"end");
    assert_eq!(handle.dropped_bytes(), dropped);
}

#[test]
fn input_waits_for_the_device() {
    let bench = socket();
    bench.device.make_room(3);
    let mut stream = client(&bench);
    stream.write_all(b"abcdefgh").unwrap();
    bench.device.wait_for(b"abc");
    bench.device.make_room(4);
    bench.console.handle().input_ready();
    bench.device.wait_for(b"abcdefg");
    bench.device.make_room(4);
    bench.console.handle().input_ready();
    bench.device.wait_for(b"abcdefgh");
}

#[test]
fn input_of_a_client_that_is_gone_still_arrives() {
    let bench = socket();
    bench.device.make_room(1);
    let mut stream = client(&bench);
    let typed = vec![b'k'; 20_000];
    stream.write_all(&typed).unwrap();
    drop(stream);
    bench.device.wait_for(b"k");
    bench.device.make_room(usize::MAX);
    bench.console.handle().input_ready();
    bench.device.wait_for(&typed);
}

#[test]
fn a_file_is_emptied_then_gets_all_output() {
    let mut path = PathBuf::new();
    let mut bench = open(|dir| {
        fs::write(dir.as_path().join("log"), "old, and longer than the new").unwrap();
        ConsoleConfig::File(dir.as_path().join("log"))
    });
    path.push(bench.dir.as_path().join("log"));
    assert_eq!(bench.console.path(), None);
    for i in 0..1000 {
        writeln!(bench.writer, "line {i}").unwrap();
    }
    bench.console.close(PATIENCE);
    let expected: String = (0..1000).map(|i| format!("line {i}\n")).collect();
    assert_eq!(fs::read_to_string(path).unwrap(), expected);
}

#[test]
fn a_full_disk_drops_output_and_counts_it() {
    let mut bench = open(|_| ConsoleConfig::File("/dev/full".into()));
    bench.writer.write_all(b"lost").unwrap();
    let handle = bench.console.handle();
    until(|| handle.dropped_bytes() == 4);
    bench.console.close(PATIENCE);
}

#[test]
fn a_file_that_cannot_be_opened_is_named() {
    let dir = TempDir::new().unwrap();
    let paths = ConsolePaths { socket: PathBuf::new(), pty_link: PathBuf::new() };
    let config = ConsoleConfig::File(dir.as_path().join("no/such/dir"));
    let error = Console::open(&config, &paths).err().unwrap().to_string();
    assert!(error.contains("no/such/dir"), "{error}");
}

#[test]
fn a_pty_carries_both_directions_untouched() {
    let mut bench = open(|_| ConsoleConfig::Pty);
    let path = bench.console.path().unwrap().to_owned();
    let link = bench.dir.as_path().join("vm.pty");
    assert_eq!(fs::read_link(&link).unwrap(), path);
    let mut terminal = File::options().read(true).write(true).open(&path).unwrap();
    // Bytes that a terminal in line mode would act on or change.
    bench.writer.write_all(b"a\nb\r\x03").unwrap();
    assert_eq!(read(&mut terminal, 5), b"a\nb\r\x03");
    terminal.write_all(b"x\x03\x04\r").unwrap();
    bench.device.wait_for(b"x\x03\x04\r");
    bench.console.close(PATIENCE);
    assert!(fs::symlink_metadata(&link).is_err());
}

#[test]
fn a_pty_without_a_reader_blocks_nobody_and_keeps_the_oldest() {
    let mut bench = open(|_| ConsoleConfig::Pty);
    let data: Vec<u8> = (0..4 * OUTPUT_BUFFER).map(|i| (i % 251) as u8).collect();
    for chunk in data.chunks(1000) {
        bench.writer.write_all(chunk).unwrap();
    }
    assert!(bench.console.handle().dropped_bytes() > 0);
    let mut terminal = File::open(bench.console.path().unwrap()).unwrap();
    assert_eq!(read(&mut terminal, OUTPUT_BUFFER), data[..OUTPUT_BUFFER]);
    drop(bench.console);
}

#[test]
fn attaching_moves_bytes_until_the_user_leaves() {
    let mut bench = socket();
    let stream = client(&bench);
    stream.set_nonblocking(true).unwrap();
    let (mut keyboard, keys) = UnixStream::pair().unwrap();
    let (mut screen, mut output) = UnixStream::pair().unwrap();
    let user = std::thread::spawn(move || {
        let end = attach(stream.as_fd(), keys.as_fd(), &mut output, true).unwrap();
        drop(output);
        end
    });
    bench.writer.write_all(b"login: ").unwrap();
    assert_eq!(read(&mut screen, 7), b"login: ");
    keyboard.write_all(b"root\r\x01\x01").unwrap();
    bench.device.wait_for(b"root\r\x01");
    keyboard.write_all(b"\x01x").unwrap();
    assert_eq!(user.join().unwrap(), AttachEnd::Left);
}

#[test]
fn one_can_leave_while_the_guest_takes_no_input() {
    let bench = socket();
    bench.device.make_room(0);
    let stream = client(&bench);
    stream.set_nonblocking(true).unwrap();
    let (mut keyboard, keys) = UnixStream::pair().unwrap();
    keyboard.set_write_timeout(Some(PATIENCE)).unwrap();
    let user = std::thread::spawn(move || {
        attach(stream.as_fd(), keys.as_fd(), &mut std::io::sink(), true).unwrap()
    });
    keyboard.write_all(&vec![b'k'; 4 << 20]).unwrap();
    keyboard.write_all(b"\x01x").unwrap();
    assert_eq!(user.join().unwrap(), AttachEnd::Left);
}

#[test]
fn the_end_of_the_input_is_not_the_end() {
    let mut bench = socket();
    let stream = client(&bench);
    stream.set_nonblocking(true).unwrap();
    let (mut keyboard, keys) = UnixStream::pair().unwrap();
    let (mut screen, mut output) = UnixStream::pair().unwrap();
    let user = std::thread::spawn(move || {
        attach(stream.as_fd(), keys.as_fd(), &mut output, false).unwrap()
    });
    keyboard.write_all(b"\x01x").unwrap();
    drop(keyboard);
    bench.device.wait_for(b"\x01x");
    bench.writer.write_all(b"answer").unwrap();
    assert_eq!(read(&mut screen, 6), b"answer");
    bench.console.close(PATIENCE);
    assert_eq!(user.join().unwrap(), AttachEnd::Closed);
}
