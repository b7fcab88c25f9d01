//! A virtual machine monitor for Linux/KVM built around live migration.

pub mod acpi;
pub mod api;
pub mod boot;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod cpu;
pub mod events;
pub mod gate;
pub mod identity;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod process;
pub mod run;
pub mod runtime_dir;
pub mod sandbox;
pub mod snapshot;
pub mod state_dir;
pub mod throttle;
pub mod vcpu;
pub mod virtio;
pub mod vm_handle;
