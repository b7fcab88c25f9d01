//! Open vSwitch of one network namespace, with daemons of the test's own.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal};

use crate::network::said;
use crate::{tied, Host, Need};

/// What its database is made from.
pub const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

/// Its programs.
pub const PROGRAMS: [&str; 5] =
    ["ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl", "ovs-appctl"];

/// Its daemons, which end with it, and with the thread that started it.
pub struct OpenVswitch {
    directory: PathBuf,
    daemons: Vec<Child>,
}

impl OpenVswitch {
    /// Whether its programs are here.
    pub fn need() -> Need {
        PROGRAMS.iter().try_for_each(|name| crate::network::program(name, "openvswitch-switch"))
    }

    /// Starts it, with its files at `host`. Its datapath is in user space; it can be in the kernel too, where that has
    /// one (`system`).
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn start(host: &Host, system: bool) -> Self {
        let directory = host.switch_directory();
        std::fs::create_dir(&directory).unwrap();
        let mut switch = Self { directory, daemons: Vec::new() };
        let (database, socket) = (switch.path("conf.db"), switch.path("db.sock"));
        said(switch.command("ovsdb-tool").args(["create", &database, SCHEMA]));
        let remote = format!("--remote=punix:{socket}");
        switch.daemon("ovsdb-server", &[&database, &remote]);
        // Waits for it.
        switch.vsctl(&["--retry", "--no-wait", "init"]);
        let database = format!("unix:{socket}");
        let no_system: &[&str] = if system { &[] } else { &["--disable-system"] };
        switch.daemon("ovs-vswitchd", &[&[&*database], no_system].concat());
        switch
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).into_os_string().into_string().unwrap()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for variable in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
            command.env(variable, &self.directory);
        }
        command
    }

    fn daemon(&mut self, program: &str, args: &[&str]) {
        let mut command = self.command(program);
        command.args(args).arg("--pidfile");
        let mut command = tied(&command);
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.daemons.push(child.unwrap());
    }

    /// Ends the switch itself, and starts it again: what it was told by OpenFlow is gone, and so are those connections.
    ///
    /// # Panics
    /// It does not start.
    pub fn restart(&mut self) {
        let mut old = self.daemons.pop().unwrap();
        old.kill().unwrap();
        old.wait().unwrap();
        let database = format!("unix:{}", self.path("db.sock"));
        self.daemon("ovs-vswitchd", &[&database, "--disable-system"]);
        // Waits until it has its bridges again.
        self.vsctl(&["set", "open_vswitch", ".", "external-ids:restarted=yes"]);
    }

    /// Stops its daemons, for good: they answer nothing any more.
    ///
    /// # Panics
    /// They are not there.
    pub fn hang(&self) {
        for daemon in &self.daemons {
            rustix::process::kill_process(Pid::from_child(daemon), Signal::STOP).unwrap();
        }
    }

    /// What `ovs-vsctl` says.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn vsctl(&self, args: &[&str]) -> String {
        said(self.command("ovs-vsctl").arg("--timeout=30").args(args))
    }

    /// What `ovs-vswitchd` answers.
    ///
    /// # Panics
    /// It refuses.
    #[track_caller]
    pub fn appctl(&self, args: &[&str]) -> String {
        said(self.command("ovs-appctl").args(["--timeout=30", "--target=ovs-vswitchd"]).args(args))
    }
}

impl Drop for OpenVswitch {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}
