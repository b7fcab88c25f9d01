//! Putting a machine together.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use devices::bus::{BusRange, SharedDevice};
use devices::{AcpiPm, Bus, Serial, I8042};
use kvm_bindings::CpuId;

use super::lines::{IrqLine, PowerSink};
use super::{BootMedia, DeviceSet, Machine, MachineError};
use crate::acpi::{self, AcpiConfig};
use crate::config::VmConfig;
use crate::console::ConsoleWriter;
use crate::cpu::CpuSpec;
use crate::events::EventLog;
use crate::gate::{Gate, Target};
use crate::identity::IdentityV1;
use crate::kvm::{msrs_to_save, HostKvm, VcpuKvm, VmKvm};
use crate::layout::{self, irq, port};
use crate::memory::GuestRam;
use crate::throttle::Throttle;
use crate::vcpu::{install_kick_handler, GuestRequest, RequestSink, Unmapped, Vcpu, VcpuContext};
use crate::virtio::{DiskOwnership, VirtioParts, VirtioSet};

/// Where requests of the guest and of the API reach the thread that owns the machine.
pub type RequestSender = mpsc::Sender<GuestRequest>;

/// What a machine is made of.
pub struct MachineBuilder<'a> {
    /// The host.
    pub host: &'a HostKvm,
    /// Configuration.
    pub config: VmConfig,
    /// Kernel and initrd.
    pub media: BootMedia,
    /// Where the serial port's output goes.
    pub console: ConsoleWriter,
    /// Where events go.
    pub events: EventLog,
    /// Whether disks may be used at once.
    pub disks: DiskOwnership,
    /// CPUID of each vCPU as it was saved; made from the configuration when absent.
    pub cpuid: Option<Vec<CpuId>>,
}

impl MachineBuilder<'_> {
    /// Makes the machine, its vCPU threads parked, and the receiver of the guest's requests.
    pub fn build(self) -> Result<(Arc<Machine>, Receiver<GuestRequest>), MachineError> {
        install_kick_handler().map_err(|e| MachineError::Thread {
            name: "vcpu",
            error: std::io::Error::from_raw_os_error(e.errno()),
        })?;
        let ram = GuestRam::new(self.config.memory.size, self.config.memory.hugepages)?;
        let vm = Arc::new(self.host.create_vm(&ram)?);
        let msrs = msrs_to_save(&self.host.msr_index_list()?);
        let cpuids = self.cpuids()?;
        let mut vcpus = Vec::new();
        let mut tsc_khz = 0;
        for (id, cpuid) in (0_u8..).zip(&cpuids) {
            let vcpu = VcpuKvm::new(&vm, id, cpuid, Arc::clone(&msrs))?;
            tsc_khz = vcpu.fd.get_tsc_khz().unwrap_or(0);
            vcpus.push(Arc::new(Vcpu::new(vcpu)));
        }
        let cpuid = cpuids.iter().map(|c| c.as_slice().to_vec()).collect();

        let (sender, receiver) = mpsc::channel();
        let (requests, context_cell) = request_sink(sender);
        let line = |gsi| Arc::new(IrqLine { vm: Arc::clone(&vm), gsi });
        let power_sink = Arc::new(PowerSink(Arc::clone(&requests)));
        let devices = DeviceSet {
            serial: Arc::new(Mutex::new(Serial::new(line(irq::COM1), self.console.clone()))),
            i8042: Arc::new(Mutex::new(I8042::new(Arc::clone(&power_sink) as _))),
            power: Arc::new(Mutex::new(AcpiPm::new(line(irq::SCI), power_sink))),
        };
        let virtio = VirtioSet::new(VirtioParts {
            config: &self.config,
            vm: &vm,
            ram: &ram,
            line: &|gsi| line(gsi) as _,
            console: self.console,
            disks: self.disks,
        })?;
        let mut mmio = Bus::new();
        virtio.attach(&mut mmio)?;
        let context = Arc::new(VcpuContext {
            gate: Gate::new(vcpus.len()),
            pio: port_bus(&devices)?,
            mmio,
            unmapped: Unmapped::default(),
            requested: AtomicBool::new(false),
            ends: AtomicBool::new(false),
            requests,
        });
        let _ = context_cell.set(Arc::downgrade(&context));
        // KVM's own routing puts the PIT, GSI 0, on pin 0 of the IOAPIC.
        let acpi_config = AcpiConfig {
            vcpus: self.config.cpus,
            timer_gsi: 0,
            virtio: VirtioSet::acpi(virtio.len()),
        };
        let acpi = acpi::build(&acpi_config, layout::ACPI_TABLES)?;

        let memory_layout = super::memory::layout_of(&ram);
        let mut machine = Machine {
            config: self.config,
            throttle: Throttle::default(),
            identity: IdentityV1 { cpuid, tsc_khz },
            media: self.media,
            acpi,
            layout: memory_layout,
            ram,
            vm: VmKvm { fd: vm },
            vcpus,
            context,
            devices,
            virtio,
            pristine: Vec::new(),
            life: Mutex::new(()),
            takes_input: Mutex::new(false),
            input_wanted: OnceLock::new(),
            status: AtomicU8::new(0),
            ending: AtomicBool::new(false),
            tsc_khz: AtomicU32::new(tsc_khz),
            held: AtomicBool::new(false),
            operator_paused: AtomicBool::new(false),
            arrives_paused: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            events: self.events,
            pauses: AtomicU64::new(0),
            reboots: AtomicU64::new(0),
            started: Instant::now(),
        };
        machine.pristine = machine.take_sections()?;
        let machine = Arc::new(machine);
        for vcpu in &machine.vcpus {
            vcpu.start(Arc::clone(&machine.context))
                .map_err(|error| MachineError::Thread { name: "vcpu", error })?;
        }
        Ok((machine, receiver))
    }

    fn cpuids(&self) -> Result<Vec<CpuId>, MachineError> {
        if let Some(saved) = &self.cpuid {
            return Ok(saved.clone());
        }
        let host = self.host.cpuid()?;
        let spec = CpuSpec::parse(&self.config.cpu)?;
        let build = |vcpu| spec.build(&host, vcpu, self.config.cpus);
        Ok((0..self.config.cpus).map(build).collect::<Result<_, _>>()?)
    }
}

type ContextCell = Arc<OnceLock<std::sync::Weak<VcpuContext>>>;

/// A sink that closes the gate, so that no guest code runs behind the request, and passes the
/// request on. The cell is filled when the context that holds the gate exists.
fn request_sink(sender: RequestSender) -> (RequestSink, ContextCell) {
    let cell: ContextCell = Arc::default();
    let gate = Arc::clone(&cell);
    let sender = Mutex::new(sender);
    let sink = move |request| {
        if let Some(context) = gate.get().and_then(std::sync::Weak::upgrade) {
            context.gate.set(Target::Park);
            // Of several vCPUs that ask at once the first is heard; an operator always is.
            let second = context.requested.swap(true, Ordering::SeqCst);
            let of_guest = !matches!(request, GuestRequest::Kill | GuestRequest::HandedOver);
            if second && of_guest {
                return;
            }
            if !matches!(request, GuestRequest::Reset) {
                context.ends.store(true, Ordering::SeqCst);
            }
        }
        // The receiver lives as long as the process has a machine.
        let _ = super::lock(&sender).send(request);
    };
    (Arc::new(sink), cell)
}

fn port_bus(devices: &DeviceSet) -> Result<Bus, MachineError> {
    let mut bus = Bus::new();
    let all: [(&'static str, u64, u64, SharedDevice); 3] = [
        ("COM1", port::COM1, devices::serial::SIZE, Arc::clone(&devices.serial) as _),
        ("i8042", port::I8042, devices::i8042::SIZE, Arc::clone(&devices.i8042) as _),
        ("ACPI PM1a", port::ACPI_PM1A, devices::acpi_pm::SIZE, Arc::clone(&devices.power) as _),
    ];
    for (name, base, size, device) in all {
        bus.insert(BusRange { name, base, size }, device)?;
    }
    Ok(bus)
}
