//! docs/openapi.yaml says what the server does: the same routes, the same fields.

#![allow(clippy::unwrap_used)]

use migration::destination::Draining;
use serde::Serialize;
use serde_json::{json, Value};
use vmm::api::{
    BalloonRequest, ConsoleSizeRequest, ErrorReply, LinkRequest, SaveRequest, StatusReply,
    MAX_BODY, ROUTES,
};
use vmm::config::{
    BalloonConfig, HostLimits, RunOptions, VmConfig, MAX_CMDLINE, MAX_CPUS, MIN_MEMORY,
};
use vmm::control::{
    DeviceStats, MigrateRequest, MigrationInfo, SaveReport, UnmappedStats, VcpuStats, VmInfo,
    VmStats, VmStatus,
};
use vmm::events::{Event, EVENTS_KEPT};

const YAML: &str = include_str!("../../docs/openapi.yaml");

/// Keys right below `path`, in a document that is indented by two spaces and written in block
/// style down to the keys asked for.
fn keys(path: &[&str]) -> Vec<&'static str> {
    let mut lines = YAML.lines();
    for (depth, key) in path.iter().enumerate() {
        let wanted = format!("{}{key}:", " ".repeat(2 * depth));
        lines.find(|line| *line == wanted).unwrap_or_else(|| panic!("no {path:?}"));
    }
    let depth = 2 * path.len();
    lines
        .filter(|line| !line.trim().is_empty())
        .map(|line| (line.len() - line.trim_start().len(), line))
        .take_while(|(indent, _)| *indent >= depth)
        .filter(|(indent, line)| *indent == depth && !line.trim().starts_with("- "))
        .map(|(_, line)| line.trim().split_once(':').unwrap().0)
        .collect()
}

/// The rest of the one line of a schema that begins with `key:`.
fn line_of(schema: &str, key: &str) -> &'static str {
    let start = format!("\n    {schema}:\n");
    let rest = &YAML[YAML.find(&start).unwrap() + start.len()..];
    let prefix = format!("{key}: ");
    rest.lines().find_map(|line| line.trim().strip_prefix(&prefix)).unwrap()
}

fn list(text: &str) -> Vec<&str> {
    text.trim_matches(['[', ']']).split(", ").collect()
}

#[test]
fn the_routes_are_the_same() {
    let mut documented = Vec::new();
    for path in keys(&["paths"]) {
        for method in keys(&["paths", path]) {
            documented.push((method.to_uppercase(), path));
        }
    }
    let served: Vec<_> = ROUTES.iter().map(|(m, p)| ((*m).to_owned(), *p)).collect();
    assert_eq!(documented, served);
}

/// The schema has the fields of the value, and requires all but `optional`.
fn same_fields(schema: &str, value: impl Serialize, optional: &[&str]) {
    let Value::Object(value) = serde_json::to_value(value).unwrap() else {
        panic!("{schema} is no object")
    };
    let mut fields: Vec<&str> = value.keys().map(String::as_str).collect();
    let mut documented = keys(&["components", "schemas", schema, "properties"]);
    let mut required = list(line_of(schema, "required"));
    required.extend(optional);
    for names in [&mut fields, &mut documented, &mut required] {
        names.sort_unstable();
    }
    assert_eq!(documented, fields, "{schema}");
    assert_eq!(required, fields, "{schema}");
}

fn config() -> VmConfig {
    let options = RunOptions {
        disks: vec!["id=d,path=/d".parse().unwrap()],
        nets: vec!["id=n,tap=t".parse().unwrap()],
        balloon: Some(BalloonConfig::default()),
        ..RunOptions::default()
    };
    options.finish(HostLimits { memory: u64::MAX }, "x").unwrap().vm
}

#[test]
fn the_fields_are_the_same() {
    let status = VmStatus::Running;
    let info = VmInfo {
        name: String::new(),
        pid: 1,
        version: String::new(),
        status,
        uptime_ms: 0,
        config: config(),
        console_path: None,
        draining: None,
    };
    same_fields("VmInfo", info, &[]);
    let draining =
        Draining { connected: true, missing_pages: 0, missing: None, frozen: false, note: None };
    same_fields("Draining", draining, &[]);
    same_fields("VmConfig", config(), &[]);
    same_fields("DiskConfig", config().disks[0].clone(), &[]);
    same_fields("NetConfig", config().nets[0].clone(), &[]);
    same_fields("BalloonConfig", config().balloon, &[]);
    same_fields("MemoryConfig", config().memory, &[]);
    same_fields("MigrationConfig", config().migration, &[]);
    same_fields("VmStats", VmStats::default(), &[]);
    same_fields("VcpuStats", VcpuStats::default(), &[]);
    same_fields("DeviceStats", DeviceStats::default(), &[]);
    same_fields("UnmappedStats", UnmappedStats::default(), &[]);
    let event = Event { seq: 1, unix_ms: 0, kind: String::new(), detail: json!({}) };
    same_fields("Event", event, &["detail"]);
    same_fields("StatusReply", StatusReply { status }, &[]);
    let request = SaveRequest { path: "/".into(), then_stop: false, incomplete: false };
    same_fields("SaveRequest", request, &["then_stop", "incomplete"]);
    let optional = [
        "mode",
        "downtime_us",
        "timeout_ms",
        "dead_after_ms",
        "on_stall",
        "connections",
        "bandwidth",
        "verify",
        "rounds",
        "switch_after_ms",
        "push",
        "prepaging",
        "forward_packets",
        "max_rounds",
        "max_bytes_factor",
        "dirty_pages",
        "detach",
    ];
    same_fields("MigrateRequest", MigrateRequest::default(), &optional);
    same_fields("MigrationInfo", MigrationInfo::default(), &[]);
    same_fields("BalloonRequest", BalloonRequest { target_bytes: 0 }, &[]);
    same_fields("LinkRequest", LinkRequest { card: String::new(), up: true }, &[]);
    same_fields("ConsoleSizeRequest", ConsoleSizeRequest { columns: 1, rows: 1 }, &[]);
    same_fields("SaveReport", SaveReport::default(), &[]);
    same_fields("ErrorReply", ErrorReply { error: String::new() }, &[]);
}

#[test]
fn the_numbers_and_words_are_the_same() {
    use VmStatus::{Crashed, Creating, Incoming, Paused, Running, Stopped, Unresolved};
    let statuses = [Creating, Running, Paused, Incoming, Unresolved, Stopped, Crashed];
    assert_eq!(json!(list(line_of("VmStatus", "enum"))), json!(statuses));
    let limits = vmm::api::Limits::default();
    let text = YAML.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        format!("{} connections", limits.connections),
        format!("{} followers", limits.followers),
        format!("{} commands at once", limits.commands),
        format!("request bodies of {} KiB", MAX_BODY >> 10),
        format!("{} s for a request header or body", limits.header_timeout.as_secs()),
        format!("keeps the last {EVENTS_KEPT}"),
        format!("maxLength: {MAX_CMDLINE}}}"),
        format!("maximum: {MAX_CPUS}}}"),
        format!("minimum: {MIN_MEMORY},"),
    ] {
        assert!(text.contains(&part), "{part}");
    }
    assert_eq!(limits.header_timeout, limits.body_timeout);
}

#[test]
fn every_reference_leads_somewhere() {
    for part in YAML.split("#/components/").skip(1) {
        let (kind, name) = part.split_once('"').unwrap().0.split_once('/').unwrap();
        assert!(keys(&["components", kind]).contains(&name), "{kind}/{name}");
    }
}
