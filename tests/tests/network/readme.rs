//! The commands of README.md, run as they are written there.

use tests::{binary, kvm, namespaces};

use super::*;

const README: &str = include_str!("../../../README.md");
/// Before them.
const HEADING: &str = "A move between two subnets, as root on one machine:";

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    let (kvm, namespaces) = (kvm(), namespaces());
    add!(suite, &[needs, &[&kvm, &namespaces]].concat(); the_move_between_two_subnets_is_as_it_is_written);
}

/// The indented lines after the paragraph that begins with `heading`.
fn commands(heading: &str) -> String {
    let from = README.find(heading).expect("README.md has that paragraph");
    let (_, rest) = README[from..].split_once("\n\n").unwrap();
    let indented = |line: &&str| line.is_empty() || line.starts_with("    ");
    rest.lines().take_while(indented).map(|line| format!("{}\n", line.trim_start())).collect()
}

fn the_move_between_two_subnets_is_as_it_is_written() {
    // Namespaces have names there, and the hosts their files: all gone with these two.
    let setup =
        "mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /tmp && ln -s \"$1\" /run/minivmm \
                 && PATH=/run:$PATH exec bash -e /dev/stdin";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--"]);
    command.args(["sh", "-c", setup, "sh"]).arg(binary());
    // A reader has a quick machine.
    let commands = commands(HEADING).replace("sleep 3", "sleep 9").replace("-w 10", "-w 25");
    let finished = finish(command, commands.as_bytes());
    let said = finished.ok();
    let (before, after) = said.split_once("web: handed over").expect("it was migrated");
    // What is sent before the guest is there may be lost; from then on it answers.
    for (when, text) in [("before", before), ("after", after)] {
        assert!(text.contains("bytes from 10.0.0.2"), "{when}: {finished:#?}");
    }
    let listed = after.lines().find(|line| line.starts_with("web ")).unwrap_or_default();
    assert!(listed.contains("running"), "{finished:#?}");
    assert_eq!(after.matches("removed: bridge mv-blue").count(), 2, "{finished:#?}");
}
