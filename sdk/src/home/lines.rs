//! Small files of the home with a thing a line, replaced whole.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

/// The lines that are not empty, without what surrounds them; none if there is no file. Blocks.
pub(crate) fn read(path: &Path) -> io::Result<Vec<String>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.map(str::to_owned).collect())
}

/// Replaces the file: after a crash it is as it was, or as it is to be. Blocks.
pub(crate) fn write(path: &Path, lines: impl IntoIterator<Item = String>) -> io::Result<()> {
    let text: String = lines.into_iter().map(|line| line + "\n").collect();
    let beside = path.with_extension("new");
    let mut file = fs::File::create(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    match path.parent() {
        Some(folder) => fs::File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}
