//! Reports of migrations that are over, one file each in the state directory, so that they outlive
//! the process at either end.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::SystemTime;

use serde_json::Value;

use super::LogbookError;
use crate::state_dir;

/// Reports that are kept; older ones are removed.
const KEPT: usize = 200;
/// Longest report that is read, bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The reports of this host.
#[derive(Debug, Clone)]
pub struct Records {
    directory: PathBuf,
}

impl Records {
    /// Those of this user.
    ///
    /// # Errors
    /// There is no state directory.
    pub fn open() -> Result<Self, LogbookError> {
        Ok(Self { directory: state_dir::open()?.join("migrations") })
    }

    /// Keeps a report, as well as can be: the migration is over in any case.
    pub fn keep(&self, side: &str, report: &Value) {
        if let Err(error) = self.try_keep(side, report) {
            tracing::warn!(%error, "the report of the migration is not kept");
        }
    }

    fn try_keep(&self, side: &str, report: &Value) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let id = report["id"].as_str().unwrap_or("none");
        let name = format!("{:016}-{side}-{id}.json", now.as_millis());
        let mut report = report.clone();
        if let Value::Object(fields) = &mut report {
            fields.insert("direction".to_owned(), side.into());
            fields.insert("ended_unix_ms".to_owned(), (now.as_millis() as u64).into());
        }
        let partial = self.directory.join(format!(".{name}.{}", std::process::id()));
        fs::write(&partial, serde_json::to_vec_pretty(&report)?)?;
        fs::rename(&partial, self.directory.join(name))?;
        let names = self.names()?;
        for old in names.iter().take(names.len().saturating_sub(KEPT)) {
            fs::remove_file(self.directory.join(old))?;
        }
        Ok(())
    }

    /// Reports of the VM `name`, oldest first. What is damaged is left out.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn of(&self, name: &str) -> io::Result<Vec<Value>> {
        let mut found = Vec::new();
        for file in self.names()? {
            let path = self.directory.join(file);
            if fs::metadata(&path).is_ok_and(|metadata| metadata.len() <= MAX_BYTES) {
                let report = fs::read(&path).ok().and_then(|b| serde_json::from_slice(&b).ok());
                found.extend(report.filter(|report: &Value| report["vm"] == name));
            }
        }
        Ok(found)
    }

    /// Names begin with the time, so that their order is that of the reports.
    fn names(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".json") && !name.starts_with('.') {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn reports_are_kept_in_order_and_not_for_ever() {
        let temp = TempDir::new().unwrap();
        let records = Records { directory: temp.as_path().join("migrations") };
        assert!(records.of("a").unwrap().is_empty());
        for number in 0..KEPT + 3 {
            let vm = if number % 2 == 0 { "a" } else { "b" };
            // Names must differ although a millisecond may have several.
            records.keep("outgoing", &json!({ "id": format!("{number:04}"), "vm": vm }));
        }
        let ids = |vm| -> Vec<u64> {
            let reports = records.of(vm).unwrap();
            reports.iter().map(|r| r["id"].as_str().unwrap().parse().unwrap()).collect()
        };
        let (a, b) = (ids("a"), ids("b"));
        assert_eq!(a.len() + b.len(), KEPT);
        assert!(a.is_sorted() && b.is_sorted());
        assert_eq!(a.last(), Some(&(KEPT as u64 + 2)));
        assert_eq!(records.of("a").unwrap()[0]["direction"], "outgoing");
        fs::write(records.directory.join("9-damaged.json"), "{").unwrap();
        assert_eq!(ids("a"), a);
    }
}
