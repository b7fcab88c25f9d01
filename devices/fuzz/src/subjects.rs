//! The devices, on backends that cost nothing, and what happens to them from outside.

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use devices::virtio::balloon::{Balloon, Discard};
use devices::virtio::block::{Block, BlockBackend, Cache};
use devices::virtio::console::Console;
use devices::virtio::net::{FdBackend, MacAddress, Net, NetConfig, Offloads};
use devices::virtio::rng::{EntropySource, Rng};
use devices::virtio::{volatile_io, Buffers, Context, DeviceError, Handle, Progress, VirtioDevice};
use devices::{Persist, PersistError};
use rustix::fs::{memfd_create, MemfdFlags};
use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

pub type Memory = GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// A device under attack.
pub trait Subject: Sized {
    type Device: VirtioDevice + Persist<Error = PersistError>;

    /// A device as the machine makes it, and the other end of its backend.
    fn make(memory: &Memory) -> (Self::Device, Self);

    /// Something happens on the host's side.
    fn event(
        &mut self,
        handle: &Handle<Self::Device, Memory>,
        input: &mut Unstructured<'_>,
    ) -> Result<()>;
}

const DISK: u64 = 32 << 10;

/// A file as a disk, through the same calls as the real one, without its lock.
pub struct FileDisk {
    file: Arc<File>,
    broken: bool,
}

thread_local! {
    /// Its contents go from one run to the next; nothing depends on them.
    static FILE: OnceCell<Arc<File>> = const { OnceCell::new() };
}

impl FileDisk {
    fn new() -> Self {
        let make = || {
            let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
            file.set_len(DISK).unwrap();
            Arc::new(file)
        };
        let file = FILE.with(|file| Arc::clone(file.get_or_init(make)));
        // No sector like another, so that what is read shows in memory.
        let bytes: Vec<u8> = (0..DISK).map(|at| (at / 512) as u8 + 1).collect();
        file.write_all_at(&bytes, 0).unwrap();
        Self { file, broken: false }
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(offset % 512 == 0 && len % 512 == 0, "{offset} {len}");
        assert!(offset.checked_add(len).is_some_and(|end| end <= DISK), "{offset} {len}");
        if self.broken {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

impl BlockBackend for FileDisk {
    fn size(&self) -> u64 {
        DISK
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read<B: BitmapSlice>(&mut self, offset: u64, to: &Buffers<'_, B>) -> io::Result<()> {
        self.check(offset, to.len() as u64)?;
        volatile_io::read_exact_at(self.file.as_fd(), offset, to.slices())
    }
    fn write<B: BitmapSlice>(&mut self, offset: u64, from: &Buffers<'_, B>) -> io::Result<()> {
        self.check(offset, from.len() as u64)?;
        volatile_io::write_all_at(self.file.as_fd(), offset, from.slices())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.check(0, 0)
    }
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)
    }
    fn write_zeroes(&mut self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.check(offset, len)?;
        self.file.write_all_at(&vec![0; len as usize], offset)
    }
}

pub struct Disk;

impl Subject for Disk {
    type Device = Block<FileDisk>;

    fn make(_: &Memory) -> (Self::Device, Self) {
        (Block::new(FileDisk::new(), "fuzz", Cache::Writeback), Self)
    }

    fn event(
        &mut self,
        handle: &Handle<Self::Device, Memory>,
        input: &mut Unstructured<'_>,
    ) -> Result<()> {
        let broken = input.ratio(1, 4)?;
        handle.with_device(|block| block.backend_mut().broken = broken);
        Ok(())
    }
}

type SetOffloads = fn(&OwnedFd, Offloads) -> io::Result<()>;

pub struct Card {
    far: UnixDatagram,
}

impl Subject for Card {
    type Device = Net<FdBackend<SetOffloads>>;

    fn make(_: &Memory) -> (Self::Device, Self) {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        let backend = FdBackend::new(near.into(), Some((|_, _| Ok(())) as SetOffloads));
        let mac = MacAddress([0x52, 0x54, 0, 0, 0, 1]);
        (Net::new(backend, NetConfig { mac, mtu: Some(1500) }), Self { far })
    }

    fn event(
        &mut self,
        handle: &Handle<Self::Device, Memory>,
        input: &mut Unstructured<'_>,
    ) -> Result<()> {
        match input.int_in_range(0..=7)? {
            0 => {
                let up = input.arbitrary()?;
                handle.change_config(|card| card.set_link(up));
            }
            1 => handle.change_config(|card| card.announce()),
            2 => {
                // What the guest sent.
                let mut frame = [0; 70_000];
                while self.far.recv(&mut frame).is_ok() {}
            }
            _ => {
                for _ in 0..input.int_in_range(1..=3)? {
                    let len = match input.int_in_range(0..=3)? {
                        0 => input.int_in_range(0..=16)?,
                        1 => input.int_in_range(0..=65_562)?,
                        _ => input.int_in_range(12..=1600)?,
                    };
                    let _ = self.far.send(&vec![input.arbitrary()?; len]);
                }
                let _ = handle.with_queues(|card, context| card.receive(context));
            }
        }
        Ok(())
    }
}

/// Numbers, now and then none.
pub struct Source(u8);

impl EntropySource for Source {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.0 = self.0.wrapping_add(1);
        if self.0 % 32 == 0 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        bytes.fill(self.0);
        Ok(())
    }
}

pub struct Entropy;

impl Subject for Entropy {
    type Device = Rng<Source>;

    fn make(_: &Memory) -> (Self::Device, Self) {
        (Rng::new(Source(0)), Self)
    }

    fn event(&mut self, _: &Handle<Self::Device, Memory>, _: &mut Unstructured<'_>) -> Result<()> {
        Ok(())
    }
}

/// Zeros pages, as the host does.
pub struct Zero(Memory);

impl Discard for Zero {
    fn discard(&mut self, gpa: u64, len: u64) -> io::Result<()> {
        assert!(gpa % 4096 == 0 && len % 4096 == 0 && len > 0, "{gpa:#x} {len:#x}");
        self.0.write_slice(&vec![0; len as usize], GuestAddress(gpa)).map_err(io::Error::other)?;
        for page in (gpa..gpa + len).step_by(4096) {
            let region = self.0.find_region(GuestAddress(page)).unwrap();
            region.bitmap().mark_dirty((page - region.start_addr().0) as usize, 4096);
        }
        Ok(())
    }
}

pub struct Ballast;

impl Subject for Ballast {
    type Device = Balloon<Zero>;

    fn make(memory: &Memory) -> (Self::Device, Self) {
        (Balloon::new(Zero(memory.clone()), true), Self)
    }

    fn event(
        &mut self,
        handle: &Handle<Self::Device, Memory>,
        input: &mut Unstructured<'_>,
    ) -> Result<()> {
        if input.arbitrary()? {
            let held = input.arbitrary()?;
            handle.with_device(|balloon| balloon.hold(held));
        } else {
            let pages = input.arbitrary()?;
            handle.change_config(|balloon| balloon.set_target(pages));
        }
        Ok(())
    }
}

pub struct Screen;

impl Subject for Screen {
    type Device = Console<io::Sink>;

    fn make(_: &Memory) -> (Self::Device, Self) {
        (Console::new(io::sink()), Self)
    }

    fn event(
        &mut self,
        handle: &Handle<Self::Device, Memory>,
        input: &mut Unstructured<'_>,
    ) -> Result<()> {
        if input.ratio(1, 4)? {
            let (columns, rows) = input.arbitrary()?;
            handle.change_config(|console| console.resize(columns, rows));
        } else {
            let typed = vec![b'x'; input.int_in_range(0..=5000)?];
            let taken = handle.with_queues(|console, context| console.receive(context, &typed));
            assert!(taken.is_none_or(|taken| taken <= typed.len()));
        }
        Ok(())
    }
}

/// Copies what it reads to where it writes.
pub struct Echoing {
    config: [u8; 8],
}

impl VirtioDevice for Echoing {
    const DEVICE_ID: u32 = 42;
    const NAME: &'static str = "echo";

    fn queue_sizes(&self) -> &[u16] {
        &[64, 16]
    }
    fn features(&self) -> u64 {
        0xFF
    }
    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) -> bool {
        let place = offset.checked_add(data.len()).and_then(|end| self.config.get_mut(offset..end));
        place.map(|place| place.copy_from_slice(data)).is_some()
    }
    fn process_queue<M: GuestMemory>(
        &mut self,
        index: usize,
        context: &mut Context<'_, M>,
    ) -> std::result::Result<Progress, DeviceError> {
        context.serve(index, |chain| {
            let mut bytes = vec![0; chain.readable.len().min(0x8000)];
            let read = chain.readable.copy_to(0, &mut bytes);
            Ok(chain.writable.copy_from(0, &bytes[..read]) as u32)
        })
    }
}

impl Persist for Echoing {
    const KIND: &'static str = "echo";
    const VERSION: u16 = 1;
    type State = ();
    type Error = PersistError;

    fn save(&self) -> std::result::Result<(), PersistError> {
        Ok(())
    }
    fn restore(&mut self, (): &()) -> std::result::Result<(), PersistError> {
        Ok(())
    }
}

pub struct Echo;

impl Subject for Echo {
    type Device = Echoing;

    fn make(_: &Memory) -> (Self::Device, Self) {
        (Echoing { config: [7; 8] }, Self)
    }

    fn event(
        &mut self,
        handle: &Handle<Self::Device, Memory>,
        input: &mut Unstructured<'_>,
    ) -> Result<()> {
        let byte = input.arbitrary()?;
        handle.change_config(|echo| std::mem::replace(&mut echo.config[0], byte) != byte);
        Ok(())
    }
}
