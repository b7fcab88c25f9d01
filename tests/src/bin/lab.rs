//! `make lab`: the outer machine of the lab, for a person.

use std::process::ExitCode;

use tests::lab::{available, lab_dir, linux_image, Lab};

const USAGE: &str = "\
Usage: lab [COMMAND]

Boots an emulated machine with hardware virtualization, minivmm and the Linux image: a shell in it,
whose `exit` switches it off, or COMMAND with its output and exit status. Ctrl-A x ends it at once.

In there: minivmm, ip, mkfs.ext4, e2fsck; $IMAGE is the folder of vmlinux, vmlinuz and initramfs.cpio:

  minivmm run --kernel $IMAGE/vmlinux --initrd $IMAGE/initramfs.cpio --cmdline 'console=ttyS0'";

/// A shell with a terminal to control: Ctrl-C works.
const SHELL: &str = "cd /root; setsid -c sh -l </dev/ttyS0 >/dev/ttyS0 2>&1";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if matches!(arguments.first().map(String::as_str), Some("--help" | "-h")) {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match lab(&arguments.join(" ")) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("lab: {why}");
            ExitCode::FAILURE
        }
    }
}

fn lab(command: &str) -> Result<ExitCode, String> {
    linux_image().and_then(|()| available())?;
    let work = if command.is_empty() {
        eprintln!("lab: a shell comes in some seconds; `exit` or Ctrl-A x ends the machine");
        SHELL.to_owned()
    } else {
        // Output with plain newlines; what the command does to the shell is its own affair.
        format!("stty -onlcr\n(\n{command}\n)\necho \"{{\\\"status\\\":$?}}\" >/dev/ttyS1")
    };
    let script = format!("mkdir -p /root\nexport IMAGE=$MINIVMM_LINUX_IMAGE\n{work}");
    let lab = ["ip", "mkfs.ext4", "e2fsck"]
        .iter()
        .try_fold(Lab::with_minivmm(&script).map_err(text)?, |lab, name| lab.program(name))
        .map_err(text)?;
    let results = lab.run_on_terminal(&lab_dir("shell")).map_err(text)?;
    if command.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let status = results.iter().find_map(|line| line["status"].as_u64());
    let status = status.ok_or("the machine ended before the command did")?;
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}
