//! Writes `beacon.elf` and `qemu-bios.bin` into a folder, for starting beacon by hand:
//! `cargo run -p guest-images --example write-images -- FOLDER`.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: write-images FOLDER");
        return ExitCode::from(2);
    };
    for (name, bytes) in [
        ("beacon.elf", guest_images::BEACON.to_vec()),
        ("qemu-bios.bin", guest_images::qemu_bios()),
    ] {
        let path = folder.join(name);
        if let Err(error) = std::fs::write(&path, bytes) {
            eprintln!("write-images: {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        println!("{}", path.display());
    }
    ExitCode::SUCCESS
}
