//! The escape key of an interactive console: Ctrl-A.

/// Ctrl-A, which terminals send as this byte.
const CTRL_A: u8 = 0x01;

/// Finds the escapes in what is typed: `Ctrl-A x` leaves, `Ctrl-A Ctrl-A` types one Ctrl-A, and
/// any other key after a Ctrl-A is swallowed with it, as in QEMU.
#[derive(Debug, Default)]
pub struct Escape {
    after_ctrl_a: bool,
}

impl Escape {
    /// Appends what is meant for the guest to `guest`; true once the user wants to leave (what
    /// was typed after that is dropped).
    pub fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> bool {
        for &byte in typed {
            match (std::mem::take(&mut self.after_ctrl_a), byte) {
                (true, b'x' | b'X') => return true,
                (true, CTRL_A) => guest.push(CTRL_A),
                (true, _) => {}
                (false, CTRL_A) => self.after_ctrl_a = true,
                (false, _) => guest.push(byte),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut escape, mut guest) = (Escape::default(), Vec::new());
        let left = pieces.iter().any(|typed| escape.filter(typed, &mut guest));
        (guest, left)
    }

    #[test]
    fn ctrl_a_x_leaves_even_across_reads() {
        assert_eq!(run(&[b"ab\x01xcd"]), (b"ab".to_vec(), true));
        assert_eq!(run(&[b"ab\x01", b"x"]), (b"ab".to_vec(), true));
        assert_eq!(run(&[b"x"]), (b"x".to_vec(), false));
    }

    #[test]
    fn ctrl_a_twice_types_one() {
        assert_eq!(run(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(run(&[b"\x01", b"\x01", b"\x01x"]), (b"\x01".to_vec(), true));
    }

    #[test]
    fn other_keys_are_swallowed() {
        assert_eq!(run(&[b"a\x01bc"]), (b"ac".to_vec(), false));
    }
}
