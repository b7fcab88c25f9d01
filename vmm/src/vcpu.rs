//! A vCPU and its thread.
//!
//! The thread holds the vCPU's lock while it runs guest code and gives it up when it parks:
//! whoever has parked all threads may lock each vCPU and read or write its state.
#![allow(unsafe_code)] // the kvm_run page, seen from a signal handler

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::bus::Bus;
use kvm_bindings::{kvm_run, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

use crate::control::{UnmappedStats, VcpuStats};
use crate::gate::Gate;
use crate::kvm::{VcpuCounter, VcpuKvm};
use crate::layout;
use crate::sandbox::{self, ThreadKind};

/// Something that a vCPU thread tells the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestRequest {
    /// The guest wants the machine reset.
    Reset,
    /// The guest switched the machine off.
    PowerOff,
    /// An operator ends the VM.
    Kill,
    /// The VM was migrated: what is here is no VM any more.
    HandedOver,
    /// The guest cannot go on.
    Crash {
        /// Which vCPU.
        vcpu: u8,
        /// What happened.
        reason: String,
        /// Registers, for the person who looks for the cause.
        registers: String,
    },
}

/// Who takes requests: called on a vCPU thread, must not block, and closes the gate.
pub type RequestSink = Arc<dyn Fn(GuestRequest) + Send + Sync>;

/// Counters of accesses to nowhere, shared by all vCPUs.
#[derive(Debug, Default)]
pub struct Unmapped {
    pio_reads: AtomicU64,
    pio_writes: AtomicU64,
    mmio_reads: AtomicU64,
    mmio_writes: AtomicU64,
}

impl Unmapped {
    /// The counters now.
    #[must_use]
    pub fn stats(&self) -> UnmappedStats {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        UnmappedStats {
            pio_reads: get(&self.pio_reads),
            pio_writes: get(&self.pio_writes),
            mmio_reads: get(&self.mmio_reads),
            mmio_writes: get(&self.mmio_writes),
        }
    }
}

/// What all vCPUs of a VM share.
pub struct VcpuContext {
    /// When to run.
    pub gate: Gate,
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
    /// Accesses to nowhere.
    pub unmapped: Unmapped,
    /// A request of the guest is on its way: no guest code runs behind it.
    pub requested: AtomicBool,
    /// Something was asked that ends the VM.
    pub ends: AtomicBool,
    /// Where requests of the guest go.
    pub requests: RequestSink,
}

/// One vCPU.
#[derive(Debug)]
pub struct Vcpu {
    kvm: Mutex<VcpuKvm>,
    thread: Mutex<Option<JoinHandle<()>>>,
    tid: AtomicU32,
    exits: AtomicU64,
    pio: AtomicU64,
    mmio: AtomicU64,
    /// How long to rest before guest code runs again, ns.
    rest: AtomicU64,
    /// Writes that the dirty log noticed, where KVM counts them.
    write_faults: Option<VcpuCounter>,
}

/// Page faults that KVM resolved: while writes are tracked, nearly all are first writes to a page.
const WRITE_FAULTS: [&str; 2] = ["pf_fixed", "pf_fast"];

thread_local! {
    /// The `kvm_run` page of the vCPU that this thread runs, for the signal handler.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn kick_handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    RUN_PAGE.with(|page| {
        let page = page.get();
        if !page.is_null() {
            // SAFETY: set by this very thread, which keeps the vCPU and with it the mapping
            // alive until it has set the cell back to null. One byte, written volatile, read by
            // the kernel on the next entry.
            unsafe { ptr::addr_of_mut!((*page).immediate_exit).write_volatile(1) };
        }
    });
}

/// Installs the handler of the signal that kicks vCPUs. Once per process.
pub fn install_kick_handler() -> Result<(), vmm_sys_util::errno::Error> {
    register_signal_handler(SIGRTMIN(), kick_handler)
}

impl Vcpu {
    /// A vCPU without a thread yet.
    #[must_use]
    pub fn new(kvm: VcpuKvm) -> Self {
        let write_faults = VcpuCounter::open(&kvm.fd, &WRITE_FAULTS)
            .inspect_err(|error| tracing::debug!(%error, "writes are not counted by vCPU"))
            .ok();
        Self {
            write_faults,
            rest: AtomicU64::new(0),
            kvm: Mutex::new(kvm),
            thread: Mutex::default(),
            tid: AtomicU32::new(0),
            exits: AtomicU64::new(0),
            pio: AtomicU64::new(0),
            mmio: AtomicU64::new(0),
        }
    }

    /// The vCPU itself; waits until its thread is parked.
    pub fn kvm(&self) -> MutexGuard<'_, VcpuKvm> {
        self.kvm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread; it parks at once if the gate is closed.
    pub fn start(self: &Arc<Self>, context: Arc<VcpuContext>) -> std::io::Result<()> {
        let vcpu = Arc::clone(self);
        let name = format!("vcpu{}", self.kvm().id());
        let handle = std::thread::Builder::new().name(name).spawn(move || {
            sandbox::enter(ThreadKind::Vcpu);
            vcpu.run(&context);
        })?;
        *self.thread() = Some(handle);
        Ok(())
    }

    /// Makes the thread leave KVM_RUN, or not enter it, and look at the gate.
    pub fn kick(&self) {
        if let Some(thread) = self.thread().as_ref() {
            // A thread that has ended is past kicking.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Has the thread rest for so long before it runs guest code again. Who sets it kicks the thread.
    pub fn rest(&self, rest: Duration) {
        let ns = u64::try_from(rest.as_nanos()).unwrap_or(u64::MAX);
        self.rest.store(ns, Ordering::Relaxed);
    }

    /// How many first writes to pages KVM has seen; `None` where it does not count them.
    pub fn write_faults(&self) -> Option<u64> {
        self.write_faults.as_ref()?.read().ok()
    }

    /// Waits for the thread to end.
    pub fn join(&self) {
        let handle = self.thread().take();
        if let Some(handle) = handle {
            if handle.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }

    /// The counters now.
    pub fn stats(&self) -> VcpuStats {
        let tid = self.tid.load(Ordering::Relaxed);
        VcpuStats {
            exits: self.exits.load(Ordering::Relaxed),
            pio: self.pio.load(Ordering::Relaxed),
            mmio: self.mmio.load(Ordering::Relaxed),
            cpu_ms: crate::process::thread_cpu_ms(tid),
        }
    }

    fn run(&self, context: &VcpuContext) {
        self.tid.store(crate::process::current_tid(), Ordering::Relaxed);
        let mut kvm = self.kvm();
        let page = ptr::from_mut(kvm.fd.get_kvm_run());
        RUN_PAGE.with(|cell| cell.set(page));
        loop {
            // First clear, then look: a kick in between is seen by one or the other.
            kvm.fd.set_kvm_immediate_exit(0);
            if !context.gate.may_run() {
                self.complete_access(&mut kvm, context);
                drop(kvm);
                if !context.gate.park() {
                    break;
                }
                kvm = self.kvm();
                continue;
            }
            let rest = self.rest.swap(0, Ordering::Relaxed);
            if rest > 0 {
                context.gate.rest(Duration::from_nanos(rest));
                continue;
            }
            self.enter(&mut kvm, page, context);
        }
        RUN_PAGE.with(|cell| cell.set(ptr::null_mut()));
    }

    /// Enters the guest once more with `immediate_exit`, so that a port or memory access that was
    /// answered is taken into the registers before anybody reads them (api.rst, 5. The kvm_run
    /// structure: "the kernel side will first finish incomplete operations").
    fn complete_access(&self, kvm: &mut VcpuKvm, context: &VcpuContext) {
        /// KVM goes back to the guest every 1024 iterations of a repeated instruction; each has a
        /// read and a write of up to two pieces.
        const PIECES_MAX: usize = 4 * 1024;
        let page = ptr::from_mut(kvm.fd.get_kvm_run());
        for _ in 0..PIECES_MAX {
            kvm.fd.set_kvm_immediate_exit(1);
            if self.enter(kvm, page, context) == Entered::Interrupted {
                kvm.fd.set_kvm_immediate_exit(0);
                return;
            }
        }
        tracing::warn!(vcpu = kvm.id(), "stopped in the middle of a repeated access");
        kvm.fd.set_kvm_immediate_exit(0);
    }

    fn enter(&self, kvm: &mut VcpuKvm, page: *mut kvm_run, context: &VcpuContext) -> Entered {
        let id = kvm.id();
        let crash = match kvm.fd.run() {
            Ok(exit) => {
                self.exits.fetch_add(1, Ordering::Relaxed);
                match self.handle(exit, page, context) {
                    None => return Entered::Exited,
                    Some(crash) => crash,
                }
            }
            Err(e) => match e.errno() {
                libc::EINTR => return Entered::Interrupted,
                // A vCPU that waits for SIPI says so now and then.
                libc::EAGAIN => return Entered::Exited,
                errno => {
                    format!("KVM_RUN failed: {}", std::io::Error::from_raw_os_error(errno))
                }
            },
        };
        let registers = describe_registers(&kvm.fd);
        (context.requests)(GuestRequest::Crash { vcpu: id, reason: crash, registers });
        // The sink has closed the gate: this thread parks next.
        Entered::Interrupted
    }

    /// Handles an exit; a text when the guest cannot go on.
    fn handle(
        &self,
        exit: VcpuExit<'_>,
        page: *mut kvm_run,
        context: &VcpuContext,
    ) -> Option<String> {
        match exit {
            VcpuExit::IoOut(port, data) => {
                self.pio.fetch_add(1, Ordering::Relaxed);
                for unit in data.chunks(pio_unit(page)) {
                    if !context.pio.write(u64::from(port), unit) && port != layout::port::POST {
                        context.unmapped.pio_writes.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            VcpuExit::IoIn(port, data) => {
                self.pio.fetch_add(1, Ordering::Relaxed);
                for unit in data.chunks_mut(pio_unit(page)) {
                    if !context.pio.read(u64::from(port), unit) {
                        unit.fill(0xff);
                        context.unmapped.pio_reads.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            VcpuExit::MmioRead(addr, data) => {
                self.mmio.fetch_add(1, Ordering::Relaxed);
                if !context.mmio.read(addr, data) {
                    data.fill(0xff);
                    context.unmapped.mmio_reads.fetch_add(1, Ordering::Relaxed);
                }
            }
            VcpuExit::MmioWrite(addr, data) => {
                self.mmio.fetch_add(1, Ordering::Relaxed);
                if !context.mmio.write(addr, data) {
                    context.unmapped.mmio_writes.fetch_add(1, Ordering::Relaxed);
                }
            }
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => {
                (context.requests)(GuestRequest::Reset)
            }
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
                (context.requests)(GuestRequest::PowerOff);
            }
            VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen => {}
            VcpuExit::Shutdown => return Some("triple fault".to_owned()),
            VcpuExit::InternalError => {
                // SAFETY: KVM filled this member of the union for this exit reason; the page is
                // mapped for as long as the vCPU's lock is held.
                let suberror = unsafe { (*page).__bindgen_anon_1.internal.suberror };
                return Some(format!(
                    "KVM could not emulate an instruction (internal error, suberror {suberror})"
                ));
            }
            VcpuExit::FailEntry(reason, cpu) => {
                return Some(format!(
                    "hardware refused to enter the guest (reason {reason:#x}, CPU {cpu})"
                ));
            }
            other => return Some(format!("unexpected exit from KVM: {other:?}")),
        }
        None
    }
}

/// How an entry into the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entered {
    /// With an exit that was handled.
    Exited,
    /// By a signal, `immediate_exit` or a crash.
    Interrupted,
}

/// Size of one unit of a port access: string instructions give several at once.
fn pio_unit(page: *mut kvm_run) -> usize {
    // SAFETY: called while handling a port exit, for which KVM filled this member of the union;
    // the page is mapped for as long as the vCPU's lock is held.
    let size = unsafe { (*page).__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

/// General and control registers as text, four to a line.
fn describe_registers(fd: &VcpuFd) -> String {
    let (Ok(r), Ok(s)) = (fd.get_regs(), fd.get_sregs()) else {
        return "registers cannot be read".to_owned();
    };
    let all: [(&str, u64); 28] = [
        ("rip", r.rip),
        ("rflags", r.rflags),
        ("rsp", r.rsp),
        ("rbp", r.rbp),
        ("rax", r.rax),
        ("rbx", r.rbx),
        ("rcx", r.rcx),
        ("rdx", r.rdx),
        ("rsi", r.rsi),
        ("rdi", r.rdi),
        ("r8", r.r8),
        ("r9", r.r9),
        ("r10", r.r10),
        ("r11", r.r11),
        ("r12", r.r12),
        ("r13", r.r13),
        ("r14", r.r14),
        ("r15", r.r15),
        ("cr0", s.cr0),
        ("cr2", s.cr2),
        ("cr3", s.cr3),
        ("cr4", s.cr4),
        ("efer", s.efer),
        ("cs", s.cs.selector.into()),
        ("ss", s.ss.selector.into()),
        ("gdt", s.gdt.base),
        ("idt", s.idt.base),
        ("tr", s.tr.selector.into()),
    ];
    let line = |regs: &[(&str, u64)]| {
        regs.iter().map(|(n, v)| format!("{n}={v:#018x}")).collect::<Vec<_>>().join(" ")
    };
    all.chunks(4).map(line).collect::<Vec<_>>().join("\n")
}
