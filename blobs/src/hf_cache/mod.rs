//! Reads and writes the cache that huggingface_hub keeps on disk: uses models that it has, and adds models that other
//! programs then find.
//!
//! ```text
//! <cache>/models--<org>--<name>/blobs/<etag>                    content
//!                               snapshots/<commit>/<path>       a link, ../../blobs/<etag>
//!                               refs/<revision>                 40 hex digits: the commit
//! <cache>/blobs/<xx>/<hash>                                     content shared by blobs of several repositories (2.x)
//! ```
//!
//! - [`repos`] and [`find`] read the cache: its models, their revisions, and damaged files. [`Snapshot::index`] makes a
//!   manifest.
//! - [`Export`] writes a model: blobs, then links, then the ref, so that huggingface_hub can read the cache after a
//!   crash.
//! - [`Destination`] fetches a model into the cache: missing content is fetched beside the blobs, and then moved.
//! - [`Layout`] gives the paths of an export, for callers that write into `blobs` themselves.
//!
//! Guarantees: no file from outside the repository and the shared blobs is indexed, wherever the links of a cache lead.
//! An export writes only into the repository's folder and its lock, and overwrites no content except a ref.
//!
//! Source: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>, and huggingface_hub 0.25 to 2.4.

mod arrival;
mod etag;
mod export;
mod import;
mod layout;
mod name;
mod plan;

use std::{
    env,
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

pub use self::{
    arrival::{Arrival, Destination},
    etag::{Etag, LFS_SIZE, is_lfs},
    export::{Export, ExportError, Exported, ExportedFile, How},
    import::{
        FindError, Flaw, Found, ImportError, Problem, Ref, Repo, Snapshot, find, repos, unnamed,
    },
    layout::{Layout, Place},
    name::{Commit, NameError, RepoId, Revision},
};

/// Returns the cache of this user, by the rules of huggingface_hub: `$HF_HUB_CACHE`, `$HUGGINGFACE_HUB_CACHE`,
/// `$HF_HOME/hub`, `$XDG_CACHE_HOME/huggingface/hub`, `~/.cache/huggingface/hub`. It need not exist.
///
/// An empty variable counts as unset. `None` if only the last rule is left and there is no home directory.
pub fn default_cache() -> Option<PathBuf> {
    cache_from(|name| env::var_os(name), env::home_dir())
}

fn cache_from(
    variable: impl Fn(&str) -> Option<OsString>,
    home: Option<PathBuf>,
) -> Option<PathBuf> {
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let set = |name: &str| Some(expand(&variable(name)?, variable, home.as_ref()));
    set("HF_HUB_CACHE")
        .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(set("HF_HOME")?.join("hub")))
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface/hub")))
        .or_else(|| Some(home.as_ref()?.join(".cache/huggingface/hub")))
}

/// Expands `~` and `~/` at the start, and `$name` and `${name}` anywhere, like Python's `expanduser` and `expandvars`.
/// Unknown variables are left as they are.
fn expand(
    text: &OsStr,
    variable: impl Fn(&str) -> Option<OsString>,
    home: Option<&PathBuf>,
) -> PathBuf {
    let mut rest = text.as_bytes();
    let mut out = Vec::new();
    if let (Some(after), Some(home)) = (rest.strip_prefix(b"~"), home)
        && (after.is_empty() || after.starts_with(b"/"))
    {
        out.extend(home.as_os_str().as_bytes());
        rest = after;
    }
    while let Some((&byte, after)) = rest.split_first() {
        let reference = (byte == b'$').then(|| reference(after)).flatten();
        match reference.and_then(|(name, after)| Some((variable(name)?, after))) {
            Some((value, after)) => {
                out.extend(value.as_bytes());
                rest = after;
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(out).into()
}

/// Splits the text after a `$` into the name of the variable and the rest.
fn reference(text: &[u8]) -> Option<(&str, &[u8])> {
    let (name, after) = match text.strip_prefix(b"{") {
        Some(braced) => {
            let end = braced.iter().position(|&byte| byte == b'}')?;
            (&braced[..end], &braced[end + 1..])
        }
        None => {
            let in_name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
            text.split_at(text.iter().take_while(|byte| in_name(byte)).count())
        }
    };
    let name = str::from_utf8(name).ok().filter(|name| !name.is_empty())?;
    Some((name, after))
}

/// Formats a path for a message: line breaks and terminal control codes in it are escaped.
fn on_one_line(path: &Path) -> String {
    let mut text = String::new();
    for char in path.to_string_lossy().chars() {
        match char.is_control() || matches!(char, '\u{2028}' | '\u{2029}') {
            true => text.extend(char.escape_default()),
            false => text.push(char),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(variables: &[(&str, &str)], home: Option<&str>) -> Option<String> {
        let variable = |name: &str| {
            let (_, value) = variables.iter().find(|(known, _)| *known == name)?;
            Some(OsString::from(value))
        };
        let cache = cache_from(variable, home.map(PathBuf::from))?;
        Some(cache.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_message_about_a_path_is_one_line_whatever_the_path() {
        let path = PathBuf::from("/cache/a\nb\r\u{1b}[2J\u{2028}\u{e9}");
        let flaw = Flaw::Dangling;
        let shown = Problem { path, flaw }.to_string();
        assert!(!shown.contains(char::is_control), "{shown:?}");
        assert!(
            shown.starts_with(
                r"/cache/a\nb\r\u{1b}[2J\u{2028}\u{e9}: "
                    .replace(r"\u{e9}", "\u{e9}")
                    .as_str()
            ),
            "{shown}"
        );
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_looks() {
        let all = [
            ("HF_HUB_CACHE", "/a"),
            ("HUGGINGFACE_HUB_CACHE", "/b"),
            ("HF_HOME", "/c"),
            ("XDG_CACHE_HOME", "/d"),
        ];
        let home = Some("/home/u");
        for (from, expected) in [
            (0, "/a"),
            (1, "/b"),
            (2, "/c/hub"),
            (3, "/d/huggingface/hub"),
            (4, "/home/u/.cache/huggingface/hub"),
        ] {
            assert_eq!(cache(&all[from..], home).as_deref(), Some(expected));
        }
        assert_eq!(cache(&[], None), None);
        assert_eq!(
            cache(&[("HF_HUB_CACHE", ""), ("HF_HOME", "/c")], home).as_deref(),
            Some("/c/hub")
        );
    }

    #[test]
    fn home_and_variables_are_expanded() {
        let home = Some("/home/u");
        for (value, expected) in [
            ("~", "/home/u"),
            ("~/x", "/home/u/x"),
            ("~other/x", "~other/x"),
            ("/m/$USER_1/${USER_1}x", "/m/me/mex"),
            ("/m/$NONE/${NONE}/$/${", "/m/$NONE/${NONE}/$/${"),
        ] {
            let variables = [("HF_HUB_CACHE", value), ("USER_1", "me")];
            assert_eq!(cache(&variables, home).as_deref(), Some(expected));
        }
    }
}
