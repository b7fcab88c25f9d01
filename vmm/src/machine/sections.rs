//! The machine's state as sections: taken, loaded, compared.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use devices::{Payload, Persist};
use migration::{Section, VmError, VmState};

use super::{lock, Machine, MachineError};
use crate::kvm::{host_tsc, VcpuKvm, VcpuStateV1, VmClock, VmKvm};
use crate::virtio::VirtioSet;

/// Why state could not be taken or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A part that this machine does not have.
    #[error("saved state has a section {kind} {instance} (version {version}) that this machine does not know: use the minivmm that wrote it, or a newer one")]
    Unknown {
        /// Kind of the part.
        kind: String,
        /// Which one.
        instance: u32,
        /// Version of its state.
        version: u16,
    },
    /// A part is there more than once.
    #[error("saved state has section {kind} {instance} twice")]
    Twice {
        /// Kind of the part.
        kind: String,
        /// Which one.
        instance: u32,
    },
    /// A part is missing.
    #[error("saved state has no section {kind} {instance}")]
    Missing {
        /// Kind of the part.
        kind: &'static str,
        /// Which one.
        instance: u32,
    },
    /// The part refused.
    #[error("section {kind} {instance}: {error}")]
    Part {
        /// Kind of the part.
        kind: &'static str,
        /// Which one.
        instance: u32,
        /// What it said.
        error: String,
    },
}

fn section(payload: Payload) -> Section {
    let Payload { kind, instance, version, data } = payload;
    Section { kind, instance, version, data }
}

pub(super) fn payload(section: &Section) -> Payload {
    let Section { kind, instance, version, data } = section.clone();
    Payload { kind, instance, version, data }
}

fn part<P: Persist>(instance: u32) -> impl Fn(P::Error) -> StateError
where
    P::Error: ToString,
{
    move |e| StateError::Part { kind: P::KIND, instance, error: e.to_string() }
}

fn virtio_part(kind: &'static str, instance: u32, error: devices::PersistError) -> StateError {
    StateError::Part { kind, instance, error: error.to_string() }
}

fn save<P: Persist>(part_of: &P, instance: u32) -> Result<Section, StateError>
where
    P::Error: ToString,
{
    part_of.save_payload(instance).map(section).map_err(part::<P>(instance))
}

/// Sections by kind and number, each taken once.
struct Loader<'a> {
    sections: &'a [Section],
}

impl<'a> Loader<'a> {
    /// Checks that `sections` are those of a machine with `vcpus` vCPUs and these virtio devices:
    /// each once, none else.
    fn new(sections: &'a [Section], vcpus: usize, virtio: &VirtioSet) -> Result<Self, StateError> {
        let mut seen = HashSet::new();
        for s in sections {
            let known = match s.kind.as_str() {
                VcpuKvm::KIND => (s.instance as usize) < vcpus,
                VmKvm::KIND | VmClock::KIND | "serial" | "i8042" | "acpi-pm" => s.instance == 0,
                kind => virtio.has_section(kind, s.instance),
            };
            let (kind, instance, version) = (s.kind.clone(), s.instance, s.version);
            if !known {
                return Err(StateError::Unknown { kind, instance, version });
            }
            if !seen.insert((s.kind.as_str(), s.instance)) {
                return Err(StateError::Twice { kind, instance });
            }
        }
        Ok(Self { sections })
    }

    fn find(&self, kind: &'static str, instance: u32) -> Result<&'a Section, StateError> {
        self.sections
            .iter()
            .find(|s| s.kind == kind && s.instance == instance)
            .ok_or(StateError::Missing { kind, instance })
    }

    fn state<P: Persist>(&self, instance: u32) -> Result<P::State, StateError>
    where
        P::Error: ToString,
    {
        let found = self.find(P::KIND, instance)?;
        P::decode_payload(&payload(found)).map_err(|e| part::<P>(instance)(e.into()))
    }

    fn load<P: Persist>(&self, into: &mut P, instance: u32) -> Result<(), StateError>
    where
        P::Error: ToString,
    {
        let found = self.find(P::KIND, instance)?;
        into.restore_payload(&payload(found)).map_err(part::<P>(instance))
    }
}

impl Machine {
    /// State of all parts. The machine stands.
    pub fn take_sections(&self) -> Result<Vec<Section>, StateError> {
        let mut all = Vec::with_capacity(self.vcpus.len() + 5 + 2 * self.virtio.len());
        for (instance, vcpu) in (0..).zip(&self.vcpus) {
            all.push(save(&*vcpu.kvm(), instance)?);
        }
        all.push(save(&self.vm, 0)?);
        all.push(save(&*lock(&self.devices.serial), 0)?);
        all.push(save(&*lock(&self.devices.i8042), 0)?);
        all.push(save(&*lock(&self.devices.power), 0)?);
        let virtio = self.virtio.save();
        let failed = |e: devices::PersistError| virtio_part("virtio", 0, e);
        all.extend(virtio.map_err(failed)?.into_iter().map(section));
        all.push(save(&self.clock(), 0)?);
        Ok(all)
    }

    /// Puts state into a machine that has not run: vCPUs, then the interrupt controllers (which
    /// deliver to them), then devices (virtio devices last), then time. Time goes on from where it
    /// stood or, if the guest is `standing` and the world went on, includes the time away.
    pub fn load_sections(
        &self,
        sections: &[Section],
        standing: Option<Duration>,
    ) -> Result<(), StateError> {
        let loader = Loader::new(sections, self.vcpus.len(), &self.virtio)?;
        self.load_all_but_time(&loader)?;
        let find = |kind, instance| loader.find(kind, instance).map(payload);
        self.virtio.load(find, virtio_part)?;
        self.load_time(&loader, standing)
    }

    /// The state of power-on, but time goes on.
    pub(super) fn load_power_on_state(&self) -> Result<(), MachineError> {
        let loader = Loader::new(&self.pristine, self.vcpus.len(), &self.virtio)?;
        self.load_all_but_time(&loader)?;
        let find = |kind, instance| loader.find(kind, instance).map(payload);
        Ok(self.virtio.load_registers(find, virtio_part)?)
    }

    fn load_all_but_time(&self, loader: &Loader<'_>) -> Result<(), StateError> {
        for (instance, vcpu) in (0..).zip(&self.vcpus) {
            loader.load(&mut *vcpu.kvm(), instance)?;
        }
        loader.load(&mut self.vm.clone(), 0)?;
        loader.load(&mut *lock(&self.devices.serial), 0)?;
        loader.load(&mut *lock(&self.devices.i8042), 0)?;
        loader.load(&mut *lock(&self.devices.power), 0)
    }

    fn load_time(&self, loader: &Loader<'_>, standing: Option<Duration>) -> Result<(), StateError> {
        let mut clock = loader.state::<VmClock>(0)?;
        let away = standing.map_or(Duration::ZERO, |standing| clock.time_away(standing));
        // Times of centuries are no overflow.
        clock.clock_ns = clock.clock_ns.wrapping_add(away.as_nanos() as u64);
        self.clock().restore(&clock).map_err(part::<VmClock>(0))?;
        let now = host_tsc();
        for (instance, vcpu) in (0..).zip(&self.vcpus) {
            let tsc = loader.state::<VcpuKvm>(instance)?.tsc;
            // kHz times nanoseconds are millionths of ticks.
            let ticks = (u128::from(tsc.khz) * away.as_nanos() / 1_000_000) as u64;
            let stood_at = clock.host_tsc.wrapping_add(ticks);
            vcpu.kvm().restore_tsc(&tsc, stood_at, now).map_err(part::<VcpuKvm>(instance))?;
            if tsc.khz != 0 {
                self.tsc_khz.store(tsc.khz, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn clock(&self) -> VmClock {
        VmClock { fd: std::sync::Arc::clone(&self.vm.fd) }
    }
}

impl VmState for Machine {
    fn save_sections(&self) -> Result<Vec<Section>, VmError> {
        self.take_sections().map_err(|e| VmError::Other(e.to_string()))
    }

    fn load_sections(&self, sections: &[Section]) -> Result<(), VmError> {
        Machine::load_sections(self, sections, None).map_err(|e| VmError::Other(e.to_string()))
    }
}

/// LAPIC register "current count" (Intel SDM vol. 3, table 11-1): it counts while time goes on.
const LAPIC_CURRENT_COUNT: usize = 0x390;

/// What differs between two takings of the state of one machine, apart from what time changes by
/// itself: kvmclock, TSC, the LAPIC timer's current count, the moment the PIT was loaded.
/// Empty when nothing does.
pub fn differences(a: &[Section], b: &[Section]) -> Result<Vec<String>, StateError> {
    let mut found = Vec::new();
    let key = |s: &Section| (s.kind.clone(), s.instance, s.version);
    if a.iter().map(key).collect::<HashSet<_>>() != b.iter().map(key).collect::<HashSet<_>>() {
        found.push("the sections themselves".to_owned());
        return Ok(found);
    }
    for one in a {
        let Some(two) = b.iter().find(|s| key(s) == key(one)) else { continue };
        if one.data == two.data {
            continue;
        }
        let name = format!("{} {}", one.kind, one.instance);
        let (one, two) = ([one.clone()], [two.clone()]);
        let (one, two) = (Loader { sections: &one }, Loader { sections: &two });
        match one.sections[0].kind.as_str() {
            VmClock::KIND => {}
            VcpuKvm::KIND => {
                let instance = one.sections[0].instance;
                let (a, b) = (one.state::<VcpuKvm>(instance)?, two.state::<VcpuKvm>(instance)?);
                found.extend(vcpu_differences(&a, &b).map(|f| format!("{name}: {f}")));
            }
            VmKvm::KIND => {
                let masked = |loader: &Loader<'_>| {
                    let mut state = loader.state::<VmKvm>(0)?;
                    state.pit.channels.iter_mut().for_each(|c| c.count_load_time = 0);
                    Ok::<_, StateError>(serde_json::to_value(&state).ok())
                };
                if masked(&one)? != masked(&two)? {
                    found.push(name);
                }
            }
            _ => found.push(name),
        }
    }
    Ok(found)
}

fn vcpu_differences(a: &VcpuStateV1, b: &VcpuStateV1) -> impl Iterator<Item = String> {
    let mut lapics = (a.lapic.regs, b.lapic.regs);
    for regs in [&mut lapics.0, &mut lapics.1] {
        regs[LAPIC_CURRENT_COUNT..LAPIC_CURRENT_COUNT + 4].fill(0);
    }
    let fields = [
        ("MP_STATE", a.mp_state == b.mp_state),
        ("CPUID", a.cpuid == b.cpuid),
        ("registers", a.regs == b.regs),
        ("special registers", a.sregs == b.sregs),
        ("XSAVE", a.xsave == b.xsave),
        ("XCRs", a.xcrs == b.xcrs),
        ("debug registers", a.debug_regs == b.debug_regs),
        ("LAPIC", lapics.0 == lapics.1),
        ("events", a.events == b.events),
        ("TSC frequency", a.tsc.khz == b.tsc.khz),
        ("TSC deadline", a.tsc.deadline == b.tsc.deadline),
    ];
    let msrs: Vec<String> = a
        .msrs
        .iter()
        .zip(&b.msrs)
        .filter(|(x, y)| x != y)
        .map(|(x, y)| format!("MSR {:#x} ({:#x}, then {:#x} = {:#x})", x.0, x.1, y.0, y.1))
        .collect();
    let lengths = (a.msrs.len() != b.msrs.len()).then(|| "number of MSRs".to_owned());
    fields
        .into_iter()
        .filter(|(_, same)| !same)
        .map(|(name, _)| name.to_owned())
        .chain(msrs)
        .chain(lengths)
}
