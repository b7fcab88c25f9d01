//! A virtual machine monitor for Linux/KVM built around live migration.

pub mod acpi;
pub mod config;
pub mod control;
pub mod cpu;
pub mod events;
