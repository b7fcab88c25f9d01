//! Sizes as people write them.

use super::ConfigError;

/// Reads a size in bytes: a whole number, optionally followed by `K`, `M`, `G` or `T` (powers of
/// 1024, in either case), which `B` or `iB` may follow: `512M`, `1G`, `1GiB`, `64MiB`, `4096`.
///
/// # Errors
/// Anything else, and sizes of 2^64 bytes and more.
pub fn parse_size(text: &str) -> Result<u64, ConfigError> {
    let syntax = || ConfigError::SizeSyntax(text.to_owned());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(syntax());
    }
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(syntax()),
    };
    // All digits: the only way to fail is overflow.
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| ConfigError::SizeOverflow(text.to_owned()))
}

/// Writes a size exactly when a unit divides it, else in bytes: `512 MiB`, `1 GiB`, `4097 bytes`.
/// Sizes above 1 GiB that only small units divide are rounded down to a tenth of a GiB.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in UNITS {
        let one = 1u64 << shift;
        if bytes >= one && bytes % one == 0 {
            return format!("{} {unit}", bytes >> shift);
        }
        if shift == 30 && bytes >= one && bytes % (1 << 20) != 0 {
            let tenths = u128::from(bytes) * 10 / u128::from(one);
            return format!("{}.{} GiB", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64k", 64 << 10),
            ("512M", 512 << 20),
            ("512mb", 512 << 20),
            ("64MiB", 64 << 20),
            ("1G", 1 << 30),
            ("1GiB", 1 << 30),
            ("2T", 2 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "G", "1.5G", "-1", "1 G", "1X", "1GiBi", "0x10", "1G ", "١"] {
            assert_eq!(parse_size(text), Err(ConfigError::SizeSyntax(text.into())), "{text}");
        }
        for text in ["18446744073709551616", "16777216T", "99999999999999999999999999G"] {
            assert_eq!(parse_size(text), Err(ConfigError::SizeOverflow(text.into())), "{text}");
        }
    }

    #[test]
    fn sizes_are_written() {
        assert_eq!(format_size(0), "0 bytes");
        assert_eq!(format_size(4097), "4097 bytes");
        assert_eq!(format_size(64 << 10), "64 KiB");
        assert_eq!(format_size(1536 << 20), "1536 MiB");
        assert_eq!(format_size(1 << 30), "1 GiB");
        assert_eq!(format_size((1 << 30) * 39 / 10), "3.8 GiB");
        assert_eq!(format_size(3 << 40), "3 TiB");
    }
}
