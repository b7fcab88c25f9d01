//! A writer of one JSON object per line into a fixed buffer.
//!
//! A line that does not fit is replaced as a whole by an `error` event, so that what
//! reaches the console is well-formed whatever the values are.

/// Longest line, newline included, in bytes.
pub const LINE_MAX: usize = 4096;

const TOO_LONG: &[u8] = b"{\"event\":\"error\",\"text\":\"line too long\"}\n";

/// One JSON object under construction: `{"event":"NAME",...}`.
pub struct Line {
    buffer: [u8; LINE_MAX],
    length: usize,
    overflow: bool,
    /// Whether the next value of the current container needs a comma before it.
    comma: bool,
}

impl Line {
    /// Starts an object whose first member is `"event": event`.
    #[must_use]
    pub fn event(event: &str) -> Self {
        let mut line = Self { buffer: [0; LINE_MAX], length: 0, overflow: false, comma: false };
        line.raw(b"{");
        line.text("event", event);
        line
    }

    /// Adds `"key": value`.
    pub fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        self.digits(value);
    }

    /// Adds `"key": value` or `"key": null`.
    pub fn optional(&mut self, key: &str, value: Option<u64>) {
        self.key(key);
        match value {
            Some(value) => self.digits(value),
            None => self.raw(b"null"),
        }
    }

    /// Adds a time given in nanoseconds as microseconds with three decimals.
    pub fn micros(&mut self, key: &str, nanoseconds: u64) {
        self.key(key);
        self.micros_value(nanoseconds);
    }

    /// Adds `"key": true` or `"key": false`.
    pub fn flag(&mut self, key: &str, value: bool) {
        self.key(key);
        self.raw(if value { b"true" } else { b"false" });
    }

    /// Adds `"key": "0x..."`; JSON numbers above 2^53 are not safe in every reader.
    pub fn hex(&mut self, key: &str, value: u64) {
        self.key(key);
        self.raw(b"\"0x");
        let digits = (64 - value.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            let nibble = usize::from((value >> (digit * 4)) as u8 & 0xF);
            self.raw(&b"0123456789abcdef"[nibble..=nibble]);
        }
        self.raw(b"\"");
    }

    /// Adds `"key": "value"`.
    pub fn text(&mut self, key: &str, value: &str) {
        self.bytes(key, value.as_bytes());
    }

    /// Adds bytes from outside as a string: what is not printable ASCII becomes `\u00XX`.
    pub fn bytes(&mut self, key: &str, value: &[u8]) {
        self.key(key);
        self.quoted(value);
    }

    /// Adds `"key": [...]` with what `fill` adds.
    pub fn array(&mut self, key: &str, fill: impl FnOnce(&mut Self)) {
        self.key(key);
        self.raw(b"[");
        self.comma = false;
        fill(self);
        self.raw(b"]");
        self.comma = true;
    }

    /// Adds a number to the current array.
    pub fn item(&mut self, value: u64) {
        self.separate();
        self.digits(value);
    }

    /// Adds an object to the current array with what `fill` adds.
    pub fn object(&mut self, fill: impl FnOnce(&mut Self)) {
        self.separate();
        self.raw(b"{");
        self.comma = false;
        fill(self);
        self.raw(b"}");
        self.comma = true;
    }

    /// Ends the object and gives the line, newline included.
    #[must_use]
    pub fn finish(&mut self) -> &[u8] {
        self.raw(b"}\n");
        if self.overflow {
            TOO_LONG
        } else {
            &self.buffer[..self.length]
        }
    }

    fn separate(&mut self) {
        if self.comma {
            self.raw(b",");
        }
        self.comma = true;
    }

    fn key(&mut self, key: &str) {
        self.separate();
        self.quoted(key.as_bytes());
        self.raw(b":");
    }

    fn quoted(&mut self, value: &[u8]) {
        self.raw(b"\"");
        for &byte in value {
            match byte {
                b'"' | b'\\' => self.raw(&[b'\\', byte]),
                b' '..=b'~' => self.raw(&[byte]),
                _ => {
                    const HEX: &[u8; 16] = b"0123456789abcdef";
                    self.raw(b"\\u00");
                    self.raw(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
                }
            }
        }
        self.raw(b"\"");
    }

    fn micros_value(&mut self, nanoseconds: u64) {
        self.digits(nanoseconds / 1000);
        let rest = nanoseconds % 1000;
        self.raw(b".");
        for digit in [rest / 100, rest / 10 % 10, rest % 10] {
            self.raw(&[b'0' + digit as u8]);
        }
    }

    fn digits(&mut self, mut value: u64) {
        let mut digits = [0_u8; 20];
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b'0' + (value % 10) as u8;
            value /= 10;
            if value == 0 {
                break;
            }
        }
        self.raw(&digits[first..]);
    }

    fn raw(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        if self.overflow || end > LINE_MAX {
            self.overflow = true;
            return;
        }
        self.buffer[self.length..end].copy_from_slice(bytes);
        self.length = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_every_kind_of_value() {
        let mut line = Line::event("test");
        line.number("zero", 0);
        line.number("max", u64::MAX);
        line.optional("none", None);
        line.optional("some", Some(7));
        line.micros("us", 1_234_005);
        line.flag("on", true);
        line.hex("hex", 0xABC0);
        line.hex("hex0", 0);
        line.array("list", |list| {
            list.item(1);
            list.item(20);
            list.object(|object| {
                object.number("a", 1);
                object.number("b", 2);
            });
        });
        line.array("empty", |_| ());
        line.number("last", 3);
        assert_eq!(
            core::str::from_utf8(line.finish()),
            Ok("{\"event\":\"test\",\"zero\":0,\"max\":18446744073709551615,\"none\":null,\"some\":7,\
                \"us\":1234.005,\"on\":true,\"hex\":\"0xabc0\",\"hex0\":\"0x0\",\
                \"list\":[1,20,{\"a\":1,\"b\":2}],\"empty\":[],\"last\":3}\n")
        );
    }

    #[test]
    fn escapes_what_a_console_may_send() {
        let mut line = Line::event("echo");
        line.bytes("text", b"a\"b\\c\x07\xFF");
        assert_eq!(
            core::str::from_utf8(line.finish()),
            Ok("{\"event\":\"echo\",\"text\":\"a\\\"b\\\\c\\u0007\\u00ff\"}\n")
        );
    }

    #[test]
    fn a_line_that_does_not_fit_is_replaced() {
        let mut line = Line::event("long");
        line.bytes("text", &[b'x'; LINE_MAX]);
        line.number("after", 1);
        assert_eq!(line.finish(), TOO_LONG);
    }
}
