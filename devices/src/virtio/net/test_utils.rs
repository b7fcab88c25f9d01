//! A wire that keeps frames in memory.

use std::collections::VecDeque;
use std::io;

use vm_memory::bitmap::BitmapSlice;

use super::{MacAddress, Net, NetBackend, NetConfig, Offloads, HEADER};
use crate::virtio::test_utils::Driver;
use crate::virtio::Buffers;

pub(super) const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

#[derive(Default)]
pub(super) struct Wire {
    /// Frames for the guest, with their headers.
    pub(super) arriving: VecDeque<Vec<u8>>,
    /// Frames of the guest, with their headers.
    pub(super) sent: Vec<Vec<u8>>,
    pub(super) offloads: Option<Offloads>,
    pub(super) plain: bool,
    pub(super) broken: bool,
}

impl NetBackend for Wire {
    fn has_offloads(&self) -> bool {
        !self.plain
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.offloads = Some(offloads);
        Ok(())
    }

    fn read_frame<B: BitmapSlice>(
        &mut self,
        to: &Buffers<'_, B>,
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        if self.broken {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let frame = self.arriving.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let direct = to.copy_from(0, &frame);
        overflow[..frame.len() - direct].copy_from_slice(&frame[direct..]);
        Ok(frame.len())
    }

    fn write_frame<B: BitmapSlice>(&mut self, from: &Buffers<'_, B>) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let mut frame = vec![0; from.len()];
        assert_eq!(from.copy_to(0, &mut frame), frame.len());
        self.sent.push(frame);
        Ok(())
    }
}

pub(super) fn net(wire: Wire) -> Net<Wire> {
    Net::new(wire, NetConfig { mac: MacAddress(MAC), mtu: Some(1500) })
}

impl Driver<Net<Wire>> {
    /// A frame arrives from outside, and the worker sees it.
    pub(super) fn arrives(&self, frame: &[u8]) {
        self.handle.with_device(|net| {
            net.backend_mut().arriving.push_back([&[0; HEADER], frame].concat());
        });
        self.look();
    }

    /// The worker looks for frames.
    pub(super) fn look(&self) {
        let _ = self.handle.with_queues(|net, context| net.receive(context));
    }

    pub(super) fn waiting(&self) -> usize {
        self.handle.with_device(|net| net.backend_mut().arriving.len())
    }
}
