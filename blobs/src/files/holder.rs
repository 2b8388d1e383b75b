//! The process that holds a lock, as the lock file records it.
//!
//! A process is identified by its process id and its start time, within one boot of a machine and one PID namespace.
//! Only there can a reader tell whether the process still runs.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
};

/// Most bytes of a lock file that are read: several times what a process writes there.
const MAX_SIGNATURE: u64 = 1024;

/// The process that a lock file names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Holder {
    /// The process id; zero if the file does not give one.
    pub(crate) pid: u32,
    host: String,
    /// The start time, in clock ticks since the machine started.
    since: String,
    /// The boot id of the machine, and the PID namespace.
    space: String,
}

impl Holder {
    /// Returns this process as a holder.
    pub(crate) fn this() -> Self {
        let read = |path| {
            fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let space = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        Self {
            pid: std::process::id(),
            host: read("/proc/sys/kernel/hostname"),
            since: began(std::process::id()).unwrap_or_default(),
            space: format!(
                "{} {}",
                read("/proc/sys/kernel/random/boot_id"),
                space.display()
            ),
        }
    }

    /// Reads the holder from a lock file; `None` if the file is empty: no process has written to it, or the last holder
    /// released the lock.
    pub(crate) fn read(mut file: impl Read + Seek) -> io::Result<Option<Self>> {
        file.seek(SeekFrom::Start(0))?;
        let mut text = Vec::new();
        file.take(MAX_SIGNATURE).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        let mut lines = text.lines().map(str::trim);
        let pid = lines.next().unwrap_or_default();
        if pid.is_empty() {
            return Ok(None);
        }
        let mut holder = Self {
            pid: pid.parse().unwrap_or_default(),
            ..Self::default()
        };
        for line in lines {
            let (name, value) = line.split_once(' ').unwrap_or((line, ""));
            let value = value.to_owned();
            match name {
                "host" => holder.host = value,
                "since" => holder.since = value,
                "space" => holder.space = value,
                _ => {}
            }
        }
        Ok(Some(holder))
    }

    /// Writes the holder to a lock file that is empty.
    pub(crate) fn write(&self, mut file: impl Write) -> io::Result<()> {
        let Self {
            pid,
            host,
            since,
            space,
        } = self;
        // A single write, so that no reader sees half of the record.
        let text = format!("{pid}\nhost {host}\nsince {since}\nspace {space}\n");
        file.write_all(text.as_bytes())
    }

    /// Records this process in a lock file. It writes over the entry of an earlier holder without truncating first, so
    /// that the entry survives if the disk is full. The next holder then still learns that the earlier one was killed.
    pub(crate) fn sign(mut file: &File) -> io::Result<()> {
        let mut text = Vec::new();
        Self::this().write(&mut text)?;
        file.rewind()?;
        file.write_all(&text)?;
        file.set_len(text.len() as u64)
    }

    /// Returns whether the process runs now; `None` if this process cannot tell. That is so if the holder is on another
    /// machine or in another container, or if the machine was restarted since.
    pub(crate) fn runs(&self) -> Option<bool> {
        let this = Self::this();
        if self.space.trim().is_empty() || self.space != this.space || self.since.is_empty() {
            return None;
        }
        Some(began(self.pid).as_ref() == Some(&self.since))
    }

    /// Returns true if the holder is this process.
    pub(crate) fn is_this(&self) -> bool {
        *self == Self::this()
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, self.host.as_str()) {
            (0, _) => f.write_str("another process"),
            (pid, "") => write!(f, "process {pid}"),
            (pid, host) => write!(f, "process {pid} on {host}"),
        }
    }
}

/// Returns the time at which a process started: field 22 of its `stat`, in clock ticks since the machine started
/// (proc(5)). `None` if the process does not run, or there is no /proc.
fn began(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command name in brackets, and may contain any character.
    let after = &stat[stat.rfind(')')? + 1..];
    // A zombie process holds no locks.
    let mut fields = after.split_whitespace();
    if fields.next() == Some("Z") {
        return None;
    }
    fields.nth(18).map(str::to_owned)
}
