//! Small files of the home with one item on each line, which are replaced as a whole.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

/// Returns the lines that are not empty, trimmed. Returns none if there is no file. Blocks.
pub(crate) fn read(path: &Path) -> io::Result<Vec<String>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.map(str::to_owned).collect())
}

/// Replaces the file. After a crash, it has either its old or its new content. Blocks.
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
