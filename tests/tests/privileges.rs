//! What a VM's process may do: its threads' system calls, its user, and what it tells of secrets.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{chown, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use serde_json::Value;
use tests::network::in_private_network;
use tests::{
    add, binary, kvm, namespaces, network_namespaces, root, Host, Migrating, Suite, Vm, PATIENCE,
};

const GUEST: &str = "ws=8 dirty=1000 pattern=random report=250 pace=0";
/// A user and groups that nobody else has.
const USER: u32 = 61_234;
const GROUP: u32 = 61_235;
const KVM_GROUP: u32 = 61_236;

fn main() -> ExitCode {
    let mut suite = Suite::default();
    add!(suite, &[&kvm()];
        every_thread_is_restricted,
        every_thread_of_a_migration_is_restricted,
        filters_can_be_left_out,
        no_log_and_no_answer_tells_the_token,
    );
    add!(suite, &[&kvm(), &root(), &namespaces()];
        an_ordinary_user_of_group_kvm_moves_a_vm,
    );
    add!(suite, &[&kvm(), &root()];
        a_receiver_gives_roots_powers_up,
        a_receiver_that_cannot_become_the_user_says_why,
    );
    add!(suite, &[&kvm(), &root(), &network_namespaces()];
        a_receiver_without_roots_powers_says_what_its_network_needs,
    );
    suite.run()
}

/// A field of /proc/PID/status, or of a thread's.
fn field(status: &Path, name: &str) -> Option<String> {
    field_of(&fs::read_to_string(status).ok()?, name)
}

fn field_of(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Name, mode and number of filters of each thread of a process.
fn threads(pid: u32) -> Vec<(String, u32, u32)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let look = |path: PathBuf| -> Option<(String, u32, u32)> {
        let name = fs::read_to_string(path.join("comm")).ok()?.trim().to_owned();
        let number = |name| field(&path.join("status"), name)?.parse().ok();
        Some((name, number("Seccomp")?, number("Seccomp_filters")?))
    };
    tasks.filter_map(|task| look(task.unwrap().path())).collect()
}

/// All threads have filters; those whose names begin with one of `narrow`, which are all there or soon will be,
/// have more than the main thread.
#[track_caller]
fn restricted(pid: u32, narrow: &[&str]) {
    let deadline = Instant::now() + PATIENCE;
    let (threads, main) = loop {
        let threads = threads(pid);
        let main = threads.iter().find(|(name, ..)| name == "minivmm").unwrap().2;
        // A process says that it is ready before it has all its threads, and a thread begins without its name.
        let narrowed = |wanted: &&&str| {
            let mut named =
                threads.iter().filter(|(name, ..)| name.starts_with(**wanted)).peekable();
            named.peek().is_some() && named.all(|(.., filters)| *filters > main)
        };
        match narrow.iter().find(|wanted| !narrowed(wanted)) {
            Some(wanted) => assert!(
                Instant::now() < deadline,
                "no {wanted}, or it may do what the process may: {threads:?}"
            ),
            None => break (threads, main),
        }
        std::thread::yield_now();
    };
    assert!(main > 0, "{threads:?}");
    for (name, mode, filters) in &threads {
        assert_eq!(*mode, 2, "{name} has no filter: {threads:?}");
        assert!(*filters >= main, "{name} has {filters} filters: {threads:?}");
    }
}

fn every_thread_is_restricted() {
    let host = Host::new();
    let disk = host.path("disk");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let disk = format!("id=d,path={}", disk.display());
    let args =
        ["--cpus", "2", "--disk", &disk, "--rng", "--balloon", "--virtio-console", "--pidfile"];
    let pidfile = host.file("pid");
    let vm = host.run(GUEST, &[&args[..], &[&pidfile]].concat()).ready();
    host.ok(&["info", "vm"]);
    let narrow =
        ["vcpu0", "vcpu1", "block-d", "rng-", "balloon-", "console", "console-console", "signals"];
    restricted(vm.pid(), &narrow);
}

fn every_thread_of_a_migration_is_restricted() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(GUEST, &[]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    let slow = Migrating::slowly(&a, &to, &["--connections", "2"]);
    let both = ["vcpu0", "console", "signals", "mig-alive"];
    restricted(source.pid(), &[&both[..], &["mig-main-in", "mig-send-0", "mig-send-1"]].concat());
    let theirs = ["mig-door", "mig-stranger", "mig-recv-0", "mig-recv-1"];
    restricted(destination.pid(), &[&both[..], &theirs].concat());
    a.ok(&["migrate-set", "vm", "--bandwidth", "0"]);
    assert_eq!(slow.end().code, Some(0));
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
}

fn filters_can_be_left_out() {
    let host = Host::new();
    let off = host.run(GUEST, &["--name", "off", "--sandbox", "off"]).ready();
    assert!(threads(off.pid()).iter().all(|(_, mode, filters)| (*mode, *filters) == (0, 0)));
    let log = host.run(GUEST, &["--name", "log", "--sandbox", "log"]).ready();
    restricted(log.pid(), &["vcpu0"]);
    host.cli(&["run", "--sandbox", "maybe"]).refused(2, &["maybe", "on, log or off"]);
}

/// A directory with all of `host` that user `user` owns, and the program, which that user may run.
fn give_to_user(host: &Host, user: u32) -> PathBuf {
    let program = host.path("minivmm");
    fs::copy(binary(), &program).unwrap();
    fs::create_dir_all(host.root().join("state")).unwrap();
    for path in [host.root(), &host.runtime_dir(), &host.path(""), &host.root().join("state")] {
        chown(path, Some(user), Some(user)).unwrap();
    }
    fs::set_permissions(host.root(), Permissions::from_mode(0o755)).unwrap();
    program
}

/// `program args` as an ordinary user who may open /dev/kvm because of a group: in a mount namespace,
/// since the machine's own device is left as it is.
fn as_user(host: &Host, program: &Path, args: &[&str]) -> Command {
    let device = host.path("kvm");
    if !device.exists() {
        let [major, minor] = {
            let number = fs::metadata("/dev/kvm").unwrap().rdev();
            [rustix::fs::major(number), rustix::fs::minor(number)].map(|n| n.to_string())
        };
        let made = Command::new("mknod").arg(&device).args(["c", &major, &minor]).status().unwrap();
        assert!(made.success());
        chown(&device, Some(0), Some(KVM_GROUP)).unwrap();
        fs::set_permissions(&device, Permissions::from_mode(0o660)).unwrap();
    }
    let mut command = Command::new("unshare");
    let script = "mount --bind \"$1\" /dev/kvm && shift && exec setpriv \"$@\"";
    command.args(["-m", "--", "sh", "-c", script, "sh"]).arg(device);
    command.args(["--reuid", &USER.to_string(), "--regid", &GROUP.to_string()]);
    command.args(["--groups", &KVM_GROUP.to_string(), "--inh-caps=-all", "--"]);
    command.arg(program).args(args);
    host.environment(&mut command);
    command
}

/// `program args` as an ordinary user.
fn set_user(host: &Host, program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &USER.to_string(), "--regid", &GROUP.to_string()]);
    command.args(["--clear-groups", "--"]).arg(program).args(args);
    host.environment(&mut command);
    command
}

fn an_ordinary_user_of_group_kvm_moves_a_vm() {
    let (a, b) = (Host::new(), Host::new());
    let (program_a, program_b) = (give_to_user(&a, USER), give_to_user(&b, USER));
    let run = ["run", "--name", "vm", "--memory", "64M", "--console", "stdio", "--cmdline", GUEST];
    let mut source = Vm::start(as_user(&a, &program_a, &run)).ready();
    let before = source.report();
    let receive = ["receive", "--listen", "127.0.0.1:0", "--once", "--console", "stdio"];
    let mut destination = Vm::start(as_user(&b, &program_b, &receive));
    destination.console.may_begin_within_a_line();
    let to = destination.listens_at();
    for (vm, narrow) in [(&source, "vcpu0"), (&destination, "mig-door")] {
        let status = PathBuf::from(format!("/proc/{}/status", vm.pid()));
        assert_eq!(field(&status, "Uid").unwrap(), [USER.to_string().as_str(); 4].join(" "));
        restricted(vm.pid(), &[narrow]);
    }
    let finished =
        tests::finish(as_user(&a, &program_a, &["migrate", "vm", "--to", &to, "--verify"]), b"");
    finished.ok();
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
}

fn a_receiver_gives_roots_powers_up() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(GUEST, &[]).ready();
    let before = source.report();
    let program = give_to_user(&b, USER);
    let user = format!("{USER}:{GROUP}");
    let (mut destination, to) = b.receive(&["--user", &user]);
    // With post-copy, for which it has to be allowed most.
    let report = a.json(&["migrate", "vm", "--to", &to, "--mode", "postcopy"]);
    assert_eq!(report["verdict"], "handed-over", "{report}");
    assert!(report["postcopy"]["incomplete"].is_null(), "{report}");
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    // In every thread, and nothing to get it back with.
    for task in fs::read_dir(format!("/proc/{}/task", destination.pid())).unwrap() {
        // Threads of the migration may be about to end.
        let status = fs::read_to_string(task.unwrap().path().join("status"));
        let Ok(status) = status else { continue };
        let is = |name: &str| field_of(&status, name).unwrap();
        assert_eq!(is("Uid"), [USER.to_string().as_str(); 4].join(" "));
        assert_eq!(is("Gid"), [GROUP.to_string().as_str(); 4].join(" "));
        assert_eq!(is("Groups"), GROUP.to_string());
        for set in ["CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(u64::from_str_radix(&is(set), 16).unwrap(), 0, "{set}");
        }
        assert_eq!(is("NoNewPrivs"), "1");
    }
    // What it made is that user's, and it can do a source's work: the page tables are read.
    assert_eq!(fs::metadata(b.root().join("state/journal")).unwrap().uid(), USER);
    let saved = b.file("saved");
    tests::finish(set_user(&b, &program, &["save", "vm", &saved]), b"").ok();
    assert_eq!(fs::metadata(&saved).unwrap().uid(), USER);
    destination.verify();
}

fn a_receiver_without_roots_powers_says_what_its_network_needs() {
    let test = || {
        let (a, b) = (Host::new(), Host::new());
        for (host, name) in [(&a, "here"), (&b, "there")] {
            host.ok(&["network", "create", name, "--type", "bridge"]);
        }
        let mut source = a.run(GUEST, &["--net", "id=net,network=here"]).ready();
        give_to_user(&b, USER);
        let user = format!("{USER}:{GROUP}");
        let (mut destination, to) = b.receive(&["--user", &user, "--net", "net=network=there"]);
        let refused = a.cli(&["migrate", "vm", "--to", &to]);
        assert_eq!(refused.code, Some(1), "{refused:#?}");
        let finished = destination.end();
        for text in [&refused.stdout, &finished.stderr] {
            for word in
                ["network card net", "network=there", "CAP_NET_ADMIN", "--user", "--net CARD=NAME"]
            {
                assert!(text.contains(word), "nothing about {word}: {text}");
            }
        }
        source.verify();
    };
    in_private_network(test).unwrap();
}

fn a_receiver_that_cannot_become_the_user_says_why() {
    let host = Host::new();
    let listen = ["receive", "--listen", "127.0.0.1:0", "--user"];
    let refused = |user: &str, code, words: &[&str]| {
        host.cli(&[&listen[..], &[user]].concat()).refused(code, words);
    };
    refused("no-such-user", 2, &["no user no-such-user"]);
    refused("61234", 2, &["group", "61234:GID"]);
    refused("root", 2, &["root", "ordinary user"]);
    // The directories of this host are root's.
    let user = format!("{USER}:{GROUP}");
    fs::set_permissions(host.root(), Permissions::from_mode(0o755)).unwrap();
    refused(&user, 1, &["belongs to user 0", "61234", "MINIVMM_RUNTIME_DIR"]);
    chown(host.runtime_dir(), Some(USER), None).unwrap();
    refused(&user, 1, &["state directory"]);
    fs::create_dir_all(host.root().join("state")).unwrap();
    refused(&user, 1, &["61234", "cannot write", "state", "MINIVMM_STATE_DIR"]);

    let program = give_to_user(&host, USER);
    let args = [&listen[..], &["nobody"]].concat();
    let finished = tests::finish(set_user(&host, &program, &args), b"");
    // Where that user has no /dev/kvm, this is said first.
    if !finished.stderr.contains("/dev/kvm") {
        finished.refused(2, &["only root", "user 61234"]);
    }
}

/// The tokens in a host's journal; its files are for their owner only.
fn tokens(host: &Host) -> Vec<String> {
    let journal = host.root().join("state/journal");
    assert_eq!(fs::metadata(&journal).unwrap().mode() & 0o777, 0o700);
    let mut tokens = Vec::new();
    for entry in fs::read_dir(&journal).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600, "{path:?}");
        let entry: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        tokens.extend(entry["token"].as_str().filter(|t| !t.is_empty()).map(str::to_owned));
    }
    tokens
}

fn no_log_and_no_answer_tells_the_token() {
    let (a, b) = (Host::new(), Host::new());
    let logs = [a.file("log"), b.file("log")];
    let log = |file: &str| format!("trace:{file}");
    let mut source = a.run(GUEST, &["--log", &log(&logs[0])]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&["--log", &log(&logs[1])]);
    let slow = Migrating::slowly(&a, &to, &["--connections", "2"]);
    let mut told = Vec::new();
    for (host, name) in [(&a, "vm"), (&b, "vm@incoming")] {
        for command in ["info", "stats", "events", "migration"] {
            told.push(host.ok(&[command, name, "--json"]));
        }
    }
    a.ok(&["migrate-set", "vm", "--bandwidth", "0"]);
    let finished = slow.end();
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    told.extend([finished.stdout, finished.stderr]);
    let ended = source.ends_well();
    told.push(ended.stderr);
    destination.goes_on_after_pauses(1, &before);
    for host in [&a, &b] {
        told.extend([host.ok(&["migration", "--json"]), host.ok(&["migration"])]);
    }
    told.extend([b.ok(&["events", "vm", "--json"]), b.ok(&["migration", "vm", "--json"])]);
    told.push(destination.log());
    for log in &logs {
        let text = fs::read_to_string(log).unwrap();
        assert!(text.contains("TRACE") || text.contains("DEBUG"), "{log} says too little: {text}");
        told.push(text);
    }
    for host in [&a, &b] {
        let reports = fs::read_dir(host.root().join("state/migrations")).unwrap();
        told.extend(reports.map(|report| fs::read_to_string(report.unwrap().path()).unwrap()));
    }
    let tokens: Vec<String> = [tokens(&a), tokens(&b)].concat();
    assert!(tokens.len() >= 2, "both ends keep it: {tokens:?}");
    for token in &tokens {
        let bytes: Vec<u8> = (0..token.len() / 2)
            .map(|at| u8::from_str_radix(&token[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        assert_eq!(bytes.len(), 16, "{token}");
        let listed = format!("{bytes:?}");
        let forms =
            [token.clone(), token.to_uppercase(), listed.trim_matches(['[', ']']).to_owned()];
        for text in &told {
            for form in &forms {
                assert!(!text.contains(form.as_str()), "the token is told: {text}");
            }
        }
    }
}
