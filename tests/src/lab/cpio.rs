//! Archives for an initial RAM file system: the "newc" format of Linux
//! Documentation/driver-api/early-userspace/buffer-format.rst.
//!
//! ```text
//!   entry:  "070701" | 13 fields of 8 hex digits | name, NUL | pad to 4 | data | pad to 4
//!   ...
//!   entry with the name TRAILER!!!
//! ```
//!
//! Archives can be put one behind the other: the kernel unpacks them all.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";
const ALIGNMENT: u64 = 4;
const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;

/// Writes an archive whose files are all executable and root's.
#[derive(Debug)]
pub struct Archive<W> {
    to: W,
    written: u64,
    entries: u32,
    directories: HashSet<String>,
}

impl<W: Write> Archive<W> {
    /// An empty archive that is written to `to`.
    pub fn new(to: W) -> Self {
        Self { to, written: 0, entries: 0, directories: HashSet::new() }
    }

    /// Adds `contents` as the file `path`, relative to the root, with the directories above it.
    ///
    /// # Errors
    /// Writing failed.
    pub fn add(&mut self, path: &str, contents: &[u8]) -> io::Result<()> {
        self.add_directories(path)?;
        let size = u32::try_from(contents.len()).map_err(io::Error::other)?;
        self.header(path, EXECUTABLE, size)?;
        self.write(contents)?;
        self.pad()
    }

    /// Adds the file `from` as `path`.
    ///
    /// # Errors
    /// Reading or writing failed, or the file has 4 GiB or more.
    pub fn add_file(&mut self, path: &str, from: &Path) -> io::Result<()> {
        self.add_directories(path)?;
        let mut file = File::open(from)?;
        let size = u32::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        self.header(path, EXECUTABLE, size)?;
        let copied = io::copy(&mut file, &mut self.to)?;
        if copied != u64::from(size) {
            return Err(io::Error::other(format!("{} changed its size", from.display())));
        }
        self.written += copied;
        self.pad()
    }

    /// Ends the archive and gives back what it was written to.
    ///
    /// # Errors
    /// Writing failed.
    pub fn finish(mut self) -> io::Result<W> {
        self.header(TRAILER, 0, 0)?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn add_directories(&mut self, path: &str) -> io::Result<()> {
        for (end, _) in path.match_indices('/') {
            let directory = &path[..end];
            if self.directories.insert(directory.to_owned()) {
                self.header(directory, DIRECTORY, 0)?;
            }
        }
        Ok(())
    }

    fn header(&mut self, name: &str, mode: u32, size: u32) -> io::Result<()> {
        self.entries += 1;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        // ino, mode, uid, gid, nlink, mtime, filesize, device and rdevice (major, minor each),
        // namesize, check (unused in this format).
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut text = MAGIC.to_owned();
        for field in fields {
            text += &format!("{field:08X}");
        }
        self.write(text.as_bytes())?;
        self.write(name.as_bytes())?;
        self.write(&[0])?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.to.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        while self.written % ALIGNMENT != 0 {
            self.write(&[0])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names and contents, read by the format's description.
    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let data = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), data);
                return found;
            }
            let contents = bytes[data..data + size].to_vec();
            found.push((name, u32::try_from(mode).unwrap(), contents));
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn an_archive_has_files_and_the_directories_above_them_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"from a file").unwrap();
        let mut archive = Archive::new(Vec::new());
        archive.add("a/b/one", b"1").unwrap();
        archive.add_file("a/two", &file).unwrap();
        archive.add("three", b"").unwrap();
        let found = entries(&archive.finish().unwrap());
        let expected: [(&str, u32, &[u8]); 5] = [
            ("a", DIRECTORY, b""),
            ("a/b", DIRECTORY, b""),
            ("a/b/one", EXECUTABLE, b"1"),
            ("a/two", EXECUTABLE, b"from a file"),
            ("three", EXECUTABLE, b""),
        ];
        let expected = expected.map(|(name, mode, data)| (name.to_owned(), mode, data.to_vec()));
        assert_eq!(found, expected);
    }
}
