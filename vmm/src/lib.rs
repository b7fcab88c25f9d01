//! A virtual machine monitor for Linux/KVM built around live migration.

pub mod boot;
pub mod config;
pub mod control;
pub mod events;
pub mod gate;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod process;
pub mod runtime_dir;
pub mod vcpu;
