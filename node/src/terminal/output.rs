//! Prints text, numbers, tables and progress.

use std::{
    fmt,
    io::{self, IsTerminal},
    sync::OnceLock,
    time::{Duration, Instant},
};

/// Prints a line like `println!`, with two differences. A closed pipe, as after `head`, is not an error. Characters
/// that control the terminal are escaped, because peers choose some of the printed text: see [`escaped`].
macro_rules! out {
    () => {{
        use std::io::Write;
        $crate::terminal::output::wrote(writeln!(std::io::stdout()));
    }};
    ($($argument:tt)*) => {{
        use std::io::Write;
        $crate::terminal::output::wrote(writeln!(
            std::io::stdout(),
            "{}",
            $crate::terminal::output::escaped(format_args!($($argument)*))
        ));
    }};
}

/// Prints like `print!`, escaped as in `out!`.
macro_rules! out_raw {
    ($($argument:tt)*) => {{
        use std::io::Write;
        $crate::terminal::output::wrote(write!(
            std::io::stdout(),
            "{}",
            $crate::terminal::output::escaped(format_args!($($argument)*))
        ));
    }};
}

/// Prints a line like `eprintln!`, escaped as in `out!`. Ignores write errors.
macro_rules! err {
    ($($argument:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(
            std::io::stderr(),
            "{}",
            $crate::terminal::output::escaped(format_args!($($argument)*))
        );
    }};
}

pub(crate) use {err, out, out_raw};

/// The first error on standard output, such as a full disk. A closed pipe is not an error.
static LOST: OnceLock<String> = OnceLock::new();

/// Records the result of a write to standard output.
pub(crate) fn wrote(result: io::Result<()>) {
    if let Err(error) = result
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        // Only the first matters.
        let _ = LOST.set(error.to_string());
    }
}

/// Returns the first error on standard output, if there was one.
pub(crate) fn lost() -> Option<&'static str> {
    use std::io::Write;
    wrote(io::stdout().flush());
    LOST.get().map(String::as_str)
}

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Returns true for a character that is invisible or changes how other characters are shown: control characters, and
/// Unicode's format characters that change the direction of text or have no width. Characters that join emoji and
/// letters are not escaped.
fn is_escaped(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Returns the text with characters that control the terminal or hide text written as `\uXXXX`. Escaped JSON has the
/// same meaning as before. Line breaks and tabs are kept.
pub(crate) fn escaped(text: impl fmt::Display) -> impl fmt::Display {
    Escaped(text, |c| matches!(c, '\n' | '\t'))
}

/// Returns the text as [`escaped`] does, with line breaks and tabs escaped too.
pub(crate) fn printable(text: &str) -> String {
    Escaped(text, |_| false).to_string()
}

struct Escaped<T>(T, fn(char) -> bool);

impl<T: fmt::Display> fmt::Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;

        struct Filter<'a, 'b>(&'a mut fmt::Formatter<'b>, fn(char) -> bool);

        impl Write for Filter<'_, '_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                let mut rest = text;
                while let Some(at) = rest.find(|c| is_escaped(c) && !self.1(c)) {
                    self.0.write_str(&rest[..at])?;
                    let mut chars = rest[at..].chars();
                    let c = chars.next().unwrap_or_default();
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.0, "\\u{unit:04x}")?;
                    }
                    rest = chars.as_str();
                }
                self.0.write_str(rest)
            }
        }

        write!(Filter(f, self.1), "{}", self.0)
    }
}

/// A warning that the disk of the home is full, and what to do.
pub(crate) const FULL_DISK: &str = "full: stored content is served, but little or nothing can be stored; \
    `weft storage` shows disk usage, `weft gc` and `weft rm` free space";

/// Time between two lines of progress if standard error is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// Smoothing of the rate in a line of progress: the weight of the old value.
const RATE_DECAY: f64 = 0.6;

/// Formats a size, as in `1.5 GB`. Units are powers of 1,000, as for rates, disks and the Hugging Face hub.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    // A value that would be rounded to 1000.0 is shown as 1.0 of the next unit.
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Formats a duration, as in `2 h 5 min`, `3 min 20 s`, `1.5 s` or `12 ms`.
pub(crate) fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        3600.. => format!("{} h {} min", s / 3600, s % 3600 / 60),
        60.. => format!("{} min {} s", s / 60, s % 60),
        10.. => format!("{s} s"),
        1.. => format!("{:.1} s", d.as_secs_f64()),
        0 => format!("{} ms", d.as_millis()),
    }
}

/// Formats the mean rate of `n` bytes over a time span.
pub(crate) fn rate(n: u64, span: Duration) -> String {
    let seconds = span.as_secs_f64().max(1e-6);
    per_second((n as f64 / seconds) as u64)
}

/// Formats a rate in bytes per second.
pub(crate) fn per_second(rate: u64) -> String {
    match rate {
        0..1_000 => format!("{rate} B/s"),
        1_000..1_000_000 => format!("{:.1} kB/s", rate as f64 / 1e3),
        1_000_000..10_000_000 => format!("{:.1} MB/s", rate as f64 / 1e6),
        _ => format!("{:.0} MB/s", rate as f64 / 1e6),
    }
}

/// Formats a number of things, as in `1 file` or `2 files`.
pub(crate) fn count(n: u64, what: &str) -> String {
    if n == 1 {
        format!("1 {what}")
    } else {
        format!("{n} {what}s")
    }
}

/// Formats a table with left-aligned columns. The first row is the heading. Line breaks in cells are escaped.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| printable(cell)).collect())
        .collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|i| {
            rows.iter()
                .filter_map(|row| row.get(i))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in &rows {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Progress in bytes on standard error: a bar on a terminal, otherwise a line every [`LINE_EVERY`].
#[derive(Debug)]
pub(crate) struct Meter {
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Instant,
    last_bytes: u64,
    /// Smoothed rate, in bytes per second; zero until measured.
    rate: f64,
    last_text: String,
}

impl Meter {
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            bar.set_style(spinner());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self {
            bar,
            started: Instant::now(),
            last_line: Instant::now(),
            last_bytes: 0,
            rate: 0.0,
            last_text: String::new(),
        }
    }

    /// Creates a meter for work that a printed line has already announced, so that `text` alone causes no other line.
    pub(crate) fn begun(text: &str) -> Self {
        let meter = Self {
            last_text: text.to_owned(),
            ..Self::new()
        };
        if let Some(bar) = &meter.bar {
            bar.set_message(escaped(text).to_string());
        }
        meter
    }

    /// Shows `text`, and the bytes done of `total` if the total is not zero.
    pub(crate) fn update(&mut self, text: &str, done: u64, total: u64) {
        self.show(text, (done, total), false);
    }

    /// Shows progress as [`update`](Self::update) does, without a rate and a time left while the work `waits`.
    pub(crate) fn show(&mut self, text: &str, (done, total): (u64, u64), waits: bool) {
        if let Some(bar) = &self.bar {
            if total > 0 && bar.length() != Some(total) {
                bar.set_style(style());
                bar.set_length(total);
                // Bytes of an earlier run must not count for this run's rate.
                bar.set_position(done);
                bar.reset_eta();
            }
            bar.set_message(escaped(text).to_string());
            bar.set_position(done);
            return;
        }
        let elapsed = self.last_line.elapsed();
        if text == self.last_text && elapsed < LINE_EVERY {
            return;
        }
        let now = done.saturating_sub(self.last_bytes) as f64 / elapsed.as_secs_f64().max(1e-3);
        self.rate = match self.last_bytes {
            0 => 0.0,
            _ if self.rate == 0.0 => now,
            _ => RATE_DECAY * self.rate + (1.0 - RATE_DECAY) * now,
        };
        self.last_line = Instant::now();
        self.last_bytes = done;
        self.last_text = text.to_owned();
        if total == 0 {
            err!("{text}");
            return;
        }
        let percent = done as f64 * 100.0 / total as f64;
        let speed = if self.rate > 0.0 && !waits {
            let left = total.saturating_sub(done) as f64 / self.rate;
            format!(
                ", {}, {} left",
                per_second(self.rate as u64),
                duration(Duration::from_secs_f64(left.min(1e7)))
            )
        } else {
            String::new()
        };
        err!(
            "{text}: {} of {} ({percent:.0} %){speed}",
            bytes(done),
            bytes(total)
        );
    }

    /// Prints lines above the bar.
    pub(crate) fn lines(&self, lines: &[String]) {
        for line in lines {
            match &self.bar {
                Some(bar) => bar.println(escaped(line).to_string()),
                None => err!("{line}"),
            }
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

fn spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg}").expect("the template is well-formed")
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{spinner} {msg} [{bar:30}] {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left",
    )
    .expect("the template is well-formed")
    .progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_formatted_with_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1500), "1.5 kB");
        assert_eq!(bytes(50_000_000), "50.0 MB");
        assert_eq!(bytes(999_999), "1.0 MB");
        assert_eq!(bytes(u64::MAX), "18446744.1 TB");
        assert_eq!(duration(Duration::from_millis(12)), "12 ms");
        assert_eq!(duration(Duration::from_millis(1500)), "1.5 s");
        assert_eq!(duration(Duration::from_secs(200)), "3 min 20 s");
        assert_eq!(duration(Duration::from_secs(7500)), "2 h 5 min");
        assert_eq!(count(1, "file"), "1 file");
        assert_eq!(count(0, "file"), "0 files");
    }

    #[test]
    fn text_from_peers_cannot_control_the_terminal() {
        for (text, shown) in [
            (
                "plain, caf\u{e9} cafe\u{301} \u{6a21}",
                "plain, caf\u{e9} cafe\u{301} \u{6a21}",
            ),
            ("\u{202e}gpj.exe", "\\u202egpj.exe"),
            ("a\u{1b}[31mred", "a\\u001b[31mred"),
            ("a\u{200b}b\u{9b}", "a\\u200bb\\u009b"),
            ("\u{e0041}", "\\udb40\\udc41"),
            ("\u{1f9d1}\u{200d}\u{1f4bb}", "\u{1f9d1}\u{200d}\u{1f4bb}"),
            ("two\nlines\tand a tab\r", "two\nlines\tand a tab\\u000d"),
        ] {
            assert_eq!(escaped(text).to_string(), shown);
        }
        // JSON means the same before and after.
        let value = serde_json::json!({ "name": "\u{202e}a\u{e0041}\u{7f}\n" });
        let text = escaped(&value).to_string();
        assert!(!text.contains('\u{202e}'), "{text}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&text).unwrap(),
            value
        );
        // A line break does not split a cell.
        let cell = |text: &str| vec![text.to_owned()];
        assert_eq!(table(&[cell("a\nb"), cell("c")]), "a\\u000ab\nc\n");
    }

    /// Returns the keys of JSON objects in a source file: names in quotation marks before a colon.
    fn keys(source: &str) -> impl Iterator<Item = &str> {
        let code = source.split("#[cfg(test)]").next().unwrap_or_default();
        code.match_indices("\":").filter_map(move |(end, _)| {
            let key = &code[code[..end].rfind('"')? + 1..end];
            let is_key = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
            (!key.is_empty() && key.bytes().all(is_key)).then_some(key)
        })
    }

    #[test]
    fn each_json_key_is_documented_and_consistently_named() {
        let operations = include_str!("../../../docs/operations.md");
        let section = operations.split("\n## JSON\n").nth(1).unwrap();
        let section = section.split("\n## ").next().unwrap();
        let mut sources = vec![
            include_str!("../daemon/mod.rs").to_owned(),
            include_str!("../exit.rs").to_owned(),
        ];
        let mut folders = vec![concat!(env!("CARGO_MANIFEST_DIR"), "/src/commands").into()];
        while let Some(folder) = folders.pop() {
            let folder: std::path::PathBuf = folder;
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => sources.push(std::fs::read_to_string(path).unwrap()),
                }
            }
        }
        let mut count = 0;
        for key in sources.iter().flat_map(|source| keys(source)) {
            assert!(
                section.contains(&format!("`{key}`")),
                "{key} is not documented"
            );
            // Another name is used for each of these.
            let others = ["peer", "directory", "seconds", "time", "token", "added_at"];
            assert!(!others.contains(&key), "{key}");
            count += 1;
        }
        assert!(count > 200, "{count}");
    }

    #[test]
    fn tables_align() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        assert_eq!(table(&[row("a", "b"), row("ccc", "d")]), "a    b\nccc  d\n");
    }
}
