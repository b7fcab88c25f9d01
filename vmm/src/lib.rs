//! A virtual machine monitor for Linux/KVM built around live migration.

pub mod api;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod events;
pub mod runtime_dir;
