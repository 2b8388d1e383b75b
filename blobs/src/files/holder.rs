//! The process that holds a lock, as it signs the lock file.
//!
//! A process is known by its number and by when it began, within one start of one machine and one container: only there
//! can be told whether it still runs.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
};

/// Most of a lock file that is read, in bytes: several times what a process writes there.
const MAX_SIGNATURE: u64 = 1024;

/// A process that signed a lock file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Process id; zero if the file does not say.
    pub(crate) pid: u32,
    host: String,
    /// When it began, in the system's own count.
    since: String,
    /// The start of the machine, and the space of process numbers in it.
    space: String,
}

impl Holder {
    /// This process.
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

    /// The signature in a lock file; `None` in one that nobody has signed, or whose holder gave it back.
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

    /// Signs a lock file that is empty.
    pub(crate) fn write(&self, mut file: impl Write) -> io::Result<()> {
        let Self {
            pid,
            host,
            since,
            space,
        } = self;
        // One write: nobody reads a half of it.
        let text = format!("{pid}\nhost {host}\nsince {since}\nspace {space}\n");
        file.write_all(text.as_bytes())
    }

    /// Signs a lock file as this process. Writes over the signature of an earlier holder, which stays on a full disk:
    /// so it can still be told that it was killed.
    pub(crate) fn sign(mut file: &File) -> io::Result<()> {
        let mut text = Vec::new();
        Self::this().write(&mut text)?;
        file.rewind()?;
        file.write_all(&text)?;
        file.set_len(text.len() as u64)
    }

    /// Returns whether the process runs now; `None` if that cannot be told from here: the process is on another machine
    /// or in another container, or signed before the machine was restarted.
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

/// Returns the time at which a process began: field 22 of its `stat`, in clock ticks since the machine started
/// (proc(5)); `None` if the process does not run, or there is no /proc.
fn began(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in brackets, which may hold anything.
    let after = &stat[stat.rfind(')')? + 1..];
    // A process that has ended and that nobody has waited for holds nothing.
    let mut fields = after.split_whitespace();
    if fields.next() == Some("Z") {
        return None;
    }
    fields.nth(18).map(str::to_owned)
}
