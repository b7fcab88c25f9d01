//! The register check: a pause that falls into it must bring back every register as it was.
//!
//! Source of the XSAVE components: Intel SDM volume 1, chapter 13.
#![allow(unsafe_code)]

use core::arch::global_asm;
use core::mem::offset_of;

use beacon_core::config::Registers;
use beacon_core::mix;

use crate::cpu::cpuid;
use crate::ring0;

global_asm!(include_str!("fpu.s"));

extern "C" {
    fn hold_sse(hold: *mut Hold, deadline: u64);
    fn hold_avx(hold: *mut Hold, deadline: u64);
    fn hold_avx512(hold: *mut Hold, deadline: u64);
}

const X87_SSE: u64 = 0b11;
const AVX: u64 = 1 << 2;
const AVX512: u64 = 0b111 << 5;

/// MXCSR: all exceptions masked, rounding towards zero; not the default, so that a reset shows.
const MXCSR: u32 = 0x7F80;
/// x87 control word: all exceptions masked, 53 bits, rounding towards zero.
const CONTROL: u16 = 0x0E7F;

/// What the registers should hold and what they held; the layout is known to `fpu.s`.
#[repr(C, align(64))]
struct Hold {
    vectors: [[u64; 8]; 32],
    vectors_out: [[u64; 8]; 32],
    masks: [u64; 8],
    masks_out: [u64; 8],
    x87: [[u64; 2]; 8],
    x87_out: [[u64; 2]; 8],
    mxcsr: u32,
    mxcsr_out: u32,
    control: u16,
    control_out: u16,
}

/// The register check of one vCPU.
pub struct Check {
    hold: Hold,
    registers: Registers,
    round: u64,
    damage: bool,
}

const _: () = assert!(offset_of!(Hold, masks) == 4096);
const _: () = assert!(offset_of!(Hold, x87) == 4224);
const _: () = assert!(offset_of!(Hold, mxcsr) == 4480);
const _: () = assert!(offset_of!(Hold, control_out) == 4490);

/// A register that did not come back as it was.
pub struct Mismatch {
    /// `vector`, `mask`, `x87`, `mxcsr` or `control`, by index into [`NAMES`].
    pub class: u64,
    /// Its number.
    pub register: u64,
    /// The 64-bit word within it.
    pub word: u64,
    /// What it should hold.
    pub expected: u64,
    /// What it held.
    pub found: u64,
}

/// Names of [`Mismatch::class`].
pub const NAMES: [&str; 5] = ["vector", "mask", "x87", "mxcsr", "control"];

/// The widest registers of this vCPU, up to `limit`.
pub fn available(limit: Registers) -> Registers {
    let features = cpuid(1, 0).ecx;
    let (xsave, avx) = (features & 1 << 26 != 0, features & 1 << 28 != 0);
    let supported = if xsave { u64::from(cpuid(0xD, 0).eax) } else { 0 };
    let leaf7 = if cpuid(0, 0).eax >= 7 { cpuid(7, 0).ebx } else { 0 };
    // F for the registers, BW for 64-bit masks.
    let avx512 = leaf7 & 1 << 16 != 0 && leaf7 & 1 << 30 != 0;
    let found = match supported {
        _ if avx && avx512 && supported & (AVX | AVX512) == AVX | AVX512 => Registers::Avx512,
        _ if avx && supported & AVX != 0 => Registers::Avx,
        _ => Registers::Sse,
    };
    found.min(limit)
}

impl Check {
    /// Enables `registers` on this vCPU and gives each its own value.
    pub fn new(registers: Registers, cpu: u64) -> Self {
        match registers {
            Registers::Sse => (),
            Registers::Avx => ring0::set_xcr0(X87_SSE | AVX),
            Registers::Avx512 => ring0::set_xcr0(X87_SSE | AVX | AVX512),
        }
        let value = |register: usize, word: usize| mix(cpu << 32 | (register * 8 + word) as u64);
        let hold = Hold {
            vectors: core::array::from_fn(|r| core::array::from_fn(|w| value(r, w))),
            vectors_out: [[0; 8]; 32],
            masks: core::array::from_fn(|r| value(32, r)),
            masks_out: [0; 8],
            // 80-bit numbers in normal form: the integer bit set, an exponent around 0.
            x87: core::array::from_fn(|r| [value(33, r) | 1 << 63, 0x3FFF + r as u64]),
            x87_out: [[0; 2]; 8],
            mxcsr: MXCSR,
            mxcsr_out: 0,
            control: CONTROL,
            control_out: 0,
        };
        Self { hold, registers, round: 0, damage: false }
    }

    /// Has the next check find a register damaged, for tests of what comes of it.
    pub fn damage(&mut self) {
        self.damage = true;
    }

    /// Holds the values until the TSC reaches `deadline`, then compares.
    ///
    /// # Errors
    /// The first register that differs.
    pub fn until(&mut self, deadline: u64) -> Result<(), Mismatch> {
        let (count, words) = match self.registers {
            Registers::Sse => (16, 2),
            Registers::Avx => (16, 4),
            Registers::Avx512 => (32, 8),
        };
        // Other values each time, so that registers of an earlier moment are seen too.
        self.round += 1;
        for vector in &mut self.hold.vectors[..count] {
            vector[0] = vector[0].wrapping_add(self.round);
            vector[words - 1] ^= self.round;
        }
        // SAFETY: the three functions write into `hold` only, keep what the ABI says a call keeps,
        // and are called with the registers that `new` enabled.
        unsafe {
            match self.registers {
                Registers::Sse => hold_sse(&mut self.hold, deadline),
                Registers::Avx => hold_avx(&mut self.hold, deadline),
                Registers::Avx512 => hold_avx512(&mut self.hold, deadline),
            }
        }
        if core::mem::take(&mut self.damage) {
            self.hold.vectors_out[count - 1][words - 1] ^= 1;
        }
        self.compare(count, words)
    }

    fn compare(&self, count: usize, words: usize) -> Result<(), Mismatch> {
        let hold = &self.hold;
        let differ = |class, register: usize, word: usize, expected, found| {
            if expected == found {
                Ok(())
            } else {
                let (register, word) = (register as u64, word as u64);
                Err(Mismatch { class, register, word, expected, found })
            }
        };
        for (r, (expected, found)) in
            hold.vectors[..count].iter().zip(&hold.vectors_out).enumerate()
        {
            for w in 0..words {
                differ(0, r, w, expected[w], found[w])?;
            }
        }
        for r in 0..8 {
            if self.registers == Registers::Avx512 {
                differ(1, r, 0, hold.masks[r], hold.masks_out[r])?;
            }
            differ(2, r, 0, hold.x87[r][0], hold.x87_out[r][0])?;
            differ(2, r, 1, hold.x87[r][1], hold.x87_out[r][1] & 0xFFFF)?;
        }
        differ(3, 0, 0, u64::from(hold.mxcsr), u64::from(hold.mxcsr_out))?;
        differ(4, 0, 0, u64::from(hold.control), u64::from(hold.control_out))
    }
}
