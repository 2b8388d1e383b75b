//! Tests that one odd file does not prevent a folder from being published. Each case has occurred in practice, and is
//! in a folder with a good file beside it.

use std::{
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
    path::Path,
    sync::atomic::Ordering,
    thread,
};

use weft_blobs::{
    Manifest,
    index::{IndexError, Indexed, Progress, Rules, index, index_with_rules},
};

/// Returns a safetensors file with the given header and `data` bytes of tensors.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

/// Returns a safetensors file with one tensor.
fn one(dtype: &str, shape: &str, data: usize) -> Vec<u8> {
    let header =
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{data}]}}}}"#);
    safetensors(&header, data)
}

/// A GGUF file under construction: encoded metadata pairs and tensor entries.
#[derive(Default)]
struct Gguf {
    pairs: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
}

fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

impl Gguf {
    fn pair(mut self, key: impl AsRef<[u8]>, kind: u32, value: &[u8]) -> Self {
        self.pairs
            .push([&text(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    fn tensor(mut self, name: impl AsRef<[u8]>, shape: &[u64], kind: u32, offset: u64) -> Self {
        let mut entry = text(name);
        entry.extend((shape.len() as u32).to_le_bytes());
        entry.extend(shape.iter().flat_map(|n| n.to_le_bytes()));
        entry.extend(kind.to_le_bytes());
        entry.extend(offset.to_le_bytes());
        self.tensors.push(entry);
        self
    }

    fn bytes(self, data: usize) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.pairs.len() as u64).to_le_bytes());
        bytes.extend(self.pairs.concat());
        bytes.extend(self.tensors.concat());
        bytes.resize(bytes.len().next_multiple_of(32) + data, 7);
        bytes
    }
}

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
    oid sha256:abababababababababababababababababababababababababababababababab\nsize 4998571440\n";

fn with_invalid_utf8(name: &str) -> Vec<u8> {
    let bytes = Gguf::default().tensor(name, &[4], 0, 0).bytes(16);
    let mut bytes = bytes;
    let at = bytes
        .windows(name.len())
        .position(|part| part == name.as_bytes());
    bytes[at.unwrap()] = 0xff;
    bytes
}

fn by(change: impl FnOnce(&mut Rules)) -> Rules {
    let mut rules = Rules::default();
    change(&mut rules);
    rules
}

fn names(indexed: &Indexed) -> Vec<&str> {
    let files = indexed.manifest.files().iter();
    files.map(|file| &*file.path).collect()
}

/// Publishes `name` with `content` beside a good file. Returns the number of its tensors, or the reason why it has
/// none.
fn published(name: &str, content: &[u8]) -> Result<usize, String> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(
        folder.path().join("good.safetensors"),
        one("F32", "[4]", 16),
    )
    .unwrap();
    fs::write(folder.path().join(name), content).unwrap();
    let indexed = index(folder.path(), &Progress::default()).unwrap();
    let files = indexed.manifest.files();
    let file = |name: &str| files.iter().find(|file| file.path == name).unwrap();
    assert_eq!(file("good.safetensors").tensors.len(), 1);
    let odd = file(name);
    assert_eq!(
        odd.size,
        content.len() as u64,
        "{name} is published as it is"
    );
    assert_eq!(odd.blake3, weft_blobs::Hash::of(content));
    // A receiver of the manifest accepts it.
    let received = Manifest::decode(&indexed.manifest.encode()).unwrap();
    assert_eq!(received, indexed.manifest);
    let strict = index_with_rules(
        folder.path(),
        &by(|rules| rules.strict = true),
        &Progress::default(),
    );
    match &indexed.opaque[..] {
        [] => {
            strict.unwrap();
            Ok(odd.tensors.len())
        }
        [opaque] => {
            assert_eq!(opaque.path, name);
            assert!(odd.tensors.is_empty());
            let error = strict.unwrap_err();
            assert!(matches!(&error, IndexError::Strict(_)), "{error}");
            assert!(error.to_string().contains(&opaque.reason), "{error}");
            Err(opaque.reason.clone())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_safetensors_file_whose_header_cannot_be_read_is_published_as_bytes() {
    let f32 = r#""w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}"#;
    let of = |header: String, data| safetensors(&header, data);
    let long = "n".repeat(2000);
    let many = "1,".repeat(39);
    for (case, content, says) in [
        (
            "metadata of numbers",
            of(format!(r#"{{"__metadata__":{{"step":100}},{f32}}}"#), 16),
            "expected a string",
        ),
        (
            "metadata in metadata",
            of(format!(r#"{{"__metadata__":{{"a":{{"b":1}}}},{f32}}}"#), 16),
            "expected a string",
        ),
        (
            "metadata as a list",
            of(format!(r#"{{"__metadata__":["pt"],{f32}}}"#), 16),
            "malformed",
        ),
        (
            "as 0.4.3 wrote it",
            of(r#"{},"__metadata__":{"key":"value"}}      "#.to_owned(), 0),
            "trailing characters",
        ),
        (
            "one element in no bytes",
            one("F32", "[1]", 0),
            "does not match its shape",
        ),
        (
            "an odd number of halves",
            one("F4", "[15]", 8),
            "does not match its shape",
        ),
        (
            "a page of a web server",
            b"<!DOCTYPE html><html>Rate limited</html>".repeat(4),
            "header claims",
        ),
        ("nothing", Vec::new(), "truncated"),
        (
            "truncated",
            one("F32", "[1024]", 4096)[..3000].to_vec(),
            "holds",
        ),
        (
            "bytes after the end",
            [one("F32", "[4]", 16), vec![0; 512]].concat(),
            "holds",
        ),
        (
            "zeros as padding",
            of(format!("{{{f32}}}\0\0\0\0"), 16),
            "trailing characters",
        ),
        (
            "a tensor called __metadata__",
            of(
                r#"{"__metadata__":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}"#.to_owned(),
                8,
            ),
            "malformed",
        ),
        (
            "a name of 2,000 bytes",
            of(
                format!(r#"{{"{long}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#),
                1,
            ),
            "1024 bytes",
        ),
        (
            "a name twice",
            of(
                concat!(
                    r#"{"w":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"#,
                    r#""w":{"dtype":"I8","shape":[4],"data_offsets":[4,8]}}"#
                )
                .to_owned(),
                8,
            ),
            "same name",
        ),
        (
            "a gap",
            of(
                r#"{"w":{"dtype":"I8","shape":[4],"data_offsets":[4,8]}}"#.to_owned(),
                8,
            ),
            "does not begin",
        ),
        (
            "an overlap",
            of(
                concat!(
                    r#"{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"#,
                    r#""b":{"dtype":"I8","shape":[4],"data_offsets":[2,6]}}"#
                )
                .to_owned(),
                6,
            ),
            "does not begin",
        ),
        (
            "forty dimensions",
            of(
                format!(r#"{{"w":{{"dtype":"U8","shape":[{many}1],"data_offsets":[0,1]}}}}"#),
                1,
            ),
            "32 dimensions",
        ),
        (
            "a Git LFS pointer",
            POINTER.as_bytes().to_vec(),
            "git lfs pull",
        ),
    ] {
        let reason = published("model.safetensors", &content).unwrap_err();
        assert!(reason.contains(says), "{case}: {reason}");
    }
}

#[test]
fn a_safetensors_file_that_a_newer_program_wrote_keeps_its_tensors() {
    let f32 = r#""w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}"#;
    for (case, content, tensors) in [
        (
            "metadata is null",
            safetensors(&format!(r#"{{"__metadata__":null,{f32}}}"#), 16),
            1,
        ),
        (
            "metadata alone",
            safetensors(r#"{"__metadata__":{"key":"value"}}"#, 0),
            0,
        ),
        ("no tensors", safetensors("{}", 0), 0),
        ("a scalar", one("F32", "[]", 4), 1),
        ("halves of a byte", one("F4", "[2,8]", 8), 1),
        ("scales", one("F8_E8M0", "[3]", 3), 1),
        ("a type of tomorrow", one("F4_E3M0", "[16]", 8), 1),
        ("U4", one("U4", "[15]", 8), 1),
        ("I4", one("I4", "[16]", 8), 1),
        ("two in one", one("F4_E2M1_X2", "[8]", 8), 1),
        ("complex of doubles", one("C128", "[1]", 16), 1),
        ("a spelling of its own", one("float32", "[2]", 8), 1),
        (
            "a padded header",
            safetensors(&format!("{{{f32}}}{}", " ".repeat(4096)), 16),
            1,
        ),
    ] {
        assert_eq!(
            published("model.safetensors", &content),
            Ok(tensors),
            "{case}"
        );
    }
    // A name in capitals indicates no format; the file is published all the same.
    assert_eq!(
        published("MODEL.SAFETENSORS", &one("F32", "[4]", 16)),
        Ok(0)
    );
}

#[test]
fn a_gguf_file_whose_header_cannot_be_read_is_published_as_bytes() {
    let plain = || Gguf::default().tensor("w", &[8, 4], 0, 0);
    let alignment = |kind, value: &[u8]| plain().pair("general.alignment", kind, value);
    let version = |bytes: [u8; 4]| {
        let mut file = plain().bytes(128);
        file[4..8].copy_from_slice(&bytes);
        file
    };
    let array =
        |kind: u32, inner: &[u8]| [&kind.to_le_bytes()[..], &1_u64.to_le_bytes(), inner].concat();
    let nested = (0..6).fold(array(0, &[7]), |inner, _| array(9, &inner));
    let counts_lie = [
        &b"GGUF\x03\0\0\0"[..],
        &(1_u64 << 40).to_le_bytes(),
        &[0; 72],
    ]
    .concat();
    for (case, content, says) in [
        ("version 1", version([1, 0, 0, 0]), "version 1"),
        ("the other byte order", version([0, 0, 0, 3]), "big-endian"),
        (
            "an older format",
            [&b"tjgg\x03\0\0\0"[..], &[0; 64]].concat(),
            "letters GGUF",
        ),
        (
            "the oldest format",
            [&b"lmgg"[..], &[0; 64]].concat(),
            "letters GGUF",
        ),
        (
            "truncated in the header",
            plain().bytes(128)[..50].to_vec(),
            "truncated",
        ),
        (
            "truncated in the data",
            plain().bytes(128)[..150].to_vec(),
            "outside the file",
        ),
        ("wrong counts", counts_lie, "limit"),
        (
            "alignment of zero",
            alignment(4, &0_u32.to_le_bytes()).bytes(128),
            "power of two",
        ),
        (
            "alignment of 48",
            alignment(4, &48_u32.to_le_bytes()).bytes(128),
            "power of two",
        ),
        (
            "alignment of eight bytes",
            alignment(10, &64_u64.to_le_bytes()).bytes(128),
            "not a uint32",
        ),
        (
            "alignment twice",
            alignment(4, &32_u32.to_le_bytes())
                .pair("general.alignment", 4, &[32, 0, 0, 0])
                .bytes(128),
            "twice",
        ),
        (
            "a name twice",
            plain().tensor("w", &[4], 0, 128).bytes(144),
            "same name",
        ),
        (
            "nine dimensions",
            Gguf::default().tensor("w", &[1; 9], 24, 0).bytes(32),
            "8 dimensions",
        ),
        (
            "a name that is not UTF-8",
            with_invalid_utf8("token"),
            "UTF-8",
        ),
        (
            "arrays in arrays",
            plain().pair("x", 9, &nested).bytes(128),
            "nested",
        ),
        (
            "metadata of an unknown type",
            plain().pair("x", 99, &[0; 8]).bytes(128),
            "unknown type",
        ),
        (
            "a Git LFS pointer",
            POINTER.as_bytes().to_vec(),
            "git lfs pull",
        ),
        ("text", b"I am no model".repeat(9), "letters GGUF"),
    ] {
        let reason = published("model-Q4_K_M.gguf", &content).unwrap_err();
        assert!(reason.contains(says), "{case}: {reason}");
    }
}

#[test]
fn a_gguf_file_of_a_fork_or_a_newer_program_keeps_its_tensors() {
    for (case, content, tensors) in [
        (
            "an unknown type",
            Gguf::default().tensor("w", &[16], 77, 0).bytes(64),
            1,
        ),
        (
            "bitnet.cpp",
            Gguf::default().tensor("w", &[6912, 2], 36, 0).bytes(3456),
            1,
        ),
        // BitNet's TL2 has the number of MXFP4, and its IFAIRY that of NVFP4.
        (
            "a number with another meaning",
            Gguf::default()
                .tensor("a", &[256], 39, 0)
                .tensor("b", &[8], 0, 64)
                .bytes(96),
            2,
        ),
        (
            "another number with another meaning",
            Gguf::default()
                .tensor("a", &[256], 40, 0)
                .tensor("b", &[8], 0, 96)
                .bytes(128),
            2,
        ),
        (
            "rows that are not whole blocks",
            Gguf::default().tensor("a", &[33, 2], 2, 0).bytes(64),
            1,
        ),
        (
            "a dimension of zero",
            Gguf::default()
                .tensor("a", &[4, 0], 0, 0)
                .tensor("b", &[8], 0, 0)
                .bytes(32),
            2,
        ),
        (
            "bytes after the end",
            Gguf::default().tensor("a", &[8], 0, 0).bytes(1032),
            1,
        ),
        (
            "text that is not UTF-8",
            Gguf::default()
                .pair(b"general.na\xffme", 8, &text(b"\xff"))
                .tensor("a", &[8], 0, 0)
                .bytes(32),
            1,
        ),
        (
            "metadata alone",
            Gguf::default().pair("a", 4, &[0; 4]).bytes(0),
            0,
        ),
    ] {
        assert_eq!(published("m.gguf", &content), Ok(tensors), "{case}");
    }
}

#[test]
fn a_git_lfs_pointer_is_reported_whatever_its_extension() {
    for name in ["pytorch_model.bin", "tokenizer.json", "model.onnx"] {
        let reason = published(name, POINTER.as_bytes()).unwrap_err();
        assert!(reason.contains("git lfs pull"), "{reason}");
    }
    assert_eq!(
        published("about.md", b"version https://git-lfs is a line of it"),
        Ok(0)
    );
}

#[test]
fn files_of_operating_systems_are_left_out_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let write = |path: &str| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, [0, 5, 22, 7, 0, 2]).unwrap();
    };
    fs::write(
        folder.path().join("model.safetensors"),
        one("F32", "[4]", 16),
    )
    .unwrap();
    for system_file_reason in [
        "._model.safetensors",
        "._config.json",
        "._model-Q4_K_M.gguf",
        ".DS_Store",
        "Thumbs.db",
        "sub/desktop.ini",
        "__MACOSX/._model.bin",
        "__MACOSX/x",
    ] {
        write(system_file_reason);
    }
    for rules in [
        Rules::default(),
        by(|rules| rules.hidden = true),
        by(|rules| rules.strict = true),
    ] {
        let indexed = index_with_rules(folder.path(), &rules, &Progress::default()).unwrap();
        assert_eq!(names(&indexed), ["model.safetensors"]);
        assert_eq!(indexed.skipped.len(), 7, "{:?}", indexed.skipped);
        assert!(indexed.opaque.is_empty());
    }
}

#[test]
fn hidden_files_are_published_only_on_request() {
    let folder = tempfile::tempdir().unwrap();
    for path in [
        "config.json",
        ".gitattributes",
        ".gitignore",
        ".env",
        ".ssh/id_ed25519",
        "sub/.netrc",
        ".git/HEAD",
        ".cache/huggingface/x",
    ] {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "TOKEN=secret").unwrap();
    }
    // Links that would publish a hidden file under another name.
    symlink(".env", folder.path().join("readme.txt")).unwrap();
    symlink(".git/HEAD", folder.path().join("head.txt")).unwrap();
    let indexed = index(folder.path(), &Progress::default()).unwrap();
    assert_eq!(
        names(&indexed),
        [".gitattributes", ".gitignore", "config.json"]
    );
    assert_eq!(indexed.skipped.len(), 7, "{:?}", indexed.skipped);
    let env = indexed.skipped.iter().find(|note| note.starts_with(".env"));
    assert!(env.unwrap().contains("--hidden"), "{env:?}");
    let all = by(|rules| rules.hidden = true);
    let indexed = index_with_rules(folder.path(), &all, &Progress::default()).unwrap();
    assert!(names(&indexed).contains(&".ssh/id_ed25519"));
    assert!(names(&indexed).contains(&"readme.txt"));
    assert!(!names(&indexed).contains(&".git/HEAD"));
    assert!(!names(&indexed).contains(&"head.txt"));
    // A file that is named itself is always included.
    let env = index(&folder.path().join(".env"), &Progress::default()).unwrap();
    assert_eq!(names(&env), [".env"]);
}

#[test]
fn all_names_that_other_systems_do_not_support_are_reported_at_once_or_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let long = ["d"; 150].join("/") + "/x?.txt";
    let odd: [&[u8]; 18] = [
        long.as_bytes(),
        b"results_2023-08-31T17:55:40.json",
        b"model_epoch_100:v1/100.pth",
        b"What is Lazy Loading?.txt",
        b"a \"quoted\" | b*.txt",
        b"runs\\Jan01",
        b"README.",
        b"notes /x.txt",
        b"y.txt ",
        b"aux.py",
        b"con.json",
        b"nul",
        b"line\nbreak.txt",
        b"tab\there.txt",
        b"caf\xe9.txt",
        b"a\x1b[31mred/x.txt",
        "cafe\u{301}.txt".as_bytes(),
        b"readme.md",
    ];
    for name in odd {
        let path = folder.path().join(std::ffi::OsStr::from_bytes(name));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
    for name in [
        "config.json",
        "caf\u{e9}.txt",
        "README.md",
        "\u{202e}gpj.exe.txt",
    ] {
        fs::write(folder.path().join(name), name).unwrap();
    }
    let error = index(folder.path(), &Progress::default()).unwrap_err();
    let IndexError::Names(names_refused) = &error else {
        panic!("{error}");
    };
    assert_eq!(names_refused.len(), odd.len(), "{names_refused:#?}");
    let message = error.to_string();
    for says in [
        "18 names",
        "`:`",
        "`?`",
        "`\\`",
        "not UTF-8",
        "control",
        "device",
        "composed",
        "case",
    ] {
        assert!(message.contains(says), "{says}: {message}");
    }
    assert!(
        !message.contains('\u{1b}') && !message.contains('\n'),
        "{message:?}"
    );
    let skip = by(|rules| rules.skip_unportable = true);
    let indexed = index_with_rules(folder.path(), &skip, &Progress::default()).unwrap();
    assert_eq!(indexed.manifest.files().len(), 4, "{:?}", names(&indexed));
    assert_eq!(indexed.skipped.len(), odd.len());
}

#[test]
fn links_within_the_folder_are_followed_and_links_out_of_it_only_on_request() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("model");
    let aside = home.path().join("aside");
    for (path, content) in [
        (root.join("config.json"), "{}"),
        (root.join("real/unet.bin"), "weights"),
        (home.path().join("outside.bin"), "secret"),
        (aside.join("deep/a.bin"), "a"),
    ] {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    for (target, at) in [
        ("real", "folder"),
        ("real/unet.bin", "file.bin"),
        ("gone.bin", "dangling.bin"),
        ("loop", "loop"),
        ("..", "up"),
        ("../outside.bin", "outside.bin"),
        ("/dev/zero", "dev.bin"),
        ("../aside", "aside"),
        (".", "self"),
    ] {
        symlink(target, root.join(at)).unwrap();
    }
    // A link in a folder beside the model that leads back to the model.
    symlink("../../model", aside.join("deep/back")).unwrap();
    let indexed = index(&root, &Progress::default()).unwrap();
    assert_eq!(
        names(&indexed),
        ["config.json", "file.bin", "real/unet.bin"]
    );
    assert_eq!(indexed.skipped.len(), 8, "{:#?}", indexed.skipped);
    assert!(indexed.followed.is_empty());
    let note = |name: &str| {
        let mut notes = indexed.skipped.iter();
        notes.find(|note| note.starts_with(name)).unwrap().clone()
    };
    assert!(note("outside.bin: ").contains("--follow-links"));
    assert!(note("folder: ").contains("--follow-links"));
    assert!(note("dangling.bin: ").contains("gone.bin, which does not exist"));
    let follow = by(|rules| rules.follow_links = true);
    let indexed = index_with_rules(&root, &follow, &Progress::default()).unwrap();
    assert_eq!(
        names(&indexed),
        [
            "aside/deep/a.bin",
            "config.json",
            "file.bin",
            "folder/unet.bin",
            "outside.bin",
            "real/unet.bin"
        ]
    );
    assert_eq!(indexed.followed.len(), 2, "{:?}", indexed.followed);
    let strict = by(|rules| rules.strict = true);
    let error = index_with_rules(&root, &strict, &Progress::default()).unwrap_err();
    assert!(
        matches!(&error, IndexError::Strict(faults) if faults.len() == 2),
        "{error}"
    );
}

#[test]
fn a_snapshot_of_a_hugging_face_cache_is_added_by_its_folder() {
    let home = tempfile::tempdir().unwrap();
    let repo = home.path().join("hub/models--acme--m");
    let snapshot = repo.join("snapshots/0123456789abcdef0123456789abcdef01234567");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("blobs")).unwrap();
    fs::write(repo.join("blobs/aa"), "weights").unwrap();
    symlink("../../blobs/aa", snapshot.join("model.bin")).unwrap();
    let indexed = index(&snapshot, &Progress::default()).unwrap();
    assert_eq!(names(&indexed), ["model.bin"]);
    assert!(indexed.followed.is_empty());
}

#[test]
fn an_unreadable_file_is_left_out_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.bin"), "a").unwrap();
    let closed = folder.path().join("closed.bin");
    fs::write(&closed, "b").unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(&closed).is_ok() {
        // The superuser can read every file.
        return;
    }
    let indexed = index(folder.path(), &Progress::default()).unwrap();
    assert_eq!(names(&indexed), ["a.bin"]);
    assert!(indexed.skipped[0].starts_with("closed.bin: it cannot be read"));
}

#[test]
fn the_error_for_a_folder_with_nothing_to_publish_lists_what_was_left_out() {
    let folder = tempfile::tempdir().unwrap();
    symlink("gone", folder.path().join("weights.bin")).unwrap();
    fs::write(folder.path().join(".env"), "x").unwrap();
    let error = index(folder.path(), &Progress::default()).unwrap_err();
    assert!(matches!(error, IndexError::NothingLeft { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("weights.bin: a link to gone") && text.contains(".env: hidden"),
        "{text}"
    );
}

/// Waits until indexing has read something, calls `then`, and waits for the result.
fn while_reading(folder: &Path, then: impl FnOnce() + Send) -> Result<Indexed, IndexError> {
    let progress = Progress::default();
    thread::scope(|scope| {
        let index = scope.spawn(|| index(folder, &progress));
        while progress.bytes_done.load(Ordering::Relaxed) == 0 && !index.is_finished() {
            thread::yield_now();
        }
        then();
        index.join().unwrap()
    })
}

#[test]
fn a_file_that_is_deleted_while_the_folder_is_read_is_not_published() {
    let folder = tempfile::tempdir().unwrap();
    let large = folder.path().join("large.bin");
    fs::File::create(&large)
        .unwrap()
        .set_len(200 << 20)
        .unwrap();
    let result = while_reading(folder.path(), || fs::remove_file(&large).unwrap());
    assert!(
        matches!(&result, Err(IndexError::Changed(path)) if path.ends_with("large.bin")),
        "{result:?}"
    );
}

#[test]
fn incomplete_models_are_published_and_reported() {
    let shard = |name: &str| {
        let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        safetensors(&header, 1)
    };
    let index_of =
        |a: &str, b: &str| format!(r#"{{"weight_map":{{"a":"{a}","b":"{b}"}}}}"#).into_bytes();
    let (one, two) = (
        "m-00001-of-00002.safetensors",
        "m-00002-of-00002.safetensors",
    );
    let json = "m.safetensors.index.json";
    let part = Gguf::default().tensor("a", &[8], 0, 0).bytes(32);
    for (case, files, says) in [
        (
            "whole",
            vec![
                (one, shard("a")),
                (two, shard("b")),
                (json, index_of(one, two)),
            ],
            "",
        ),
        (
            "a shard is missing",
            vec![(one, shard("a")), (json, index_of(one, two))],
            "m-00002-of-00002",
        ),
        (
            "an outdated index file",
            vec![
                (one, shard("a")),
                (two, shard("b")),
                (json, index_of("m-00001-of-00005.safetensors", two)),
            ],
            "m-00001-of-00005",
        ),
        (
            "swapped files",
            vec![
                (one, shard("a")),
                (two, shard("b")),
                (json, index_of(two, one)),
            ],
            "2 tensors in files that do not have them",
        ),
        (
            "a truncated index file",
            vec![
                (one, shard("a")),
                (two, shard("b")),
                (json, b"{\"weight_map\": {".to_vec()),
            ],
            "malformed",
        ),
        (
            "numbered files",
            vec![("q-00002-of-00003.gguf", part.clone())],
            "1 of 3 files of q-*-of-00003.gguf",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in &files {
            fs::write(folder.path().join(name), content).unwrap();
        }
        let indexed = index(folder.path(), &Progress::default()).unwrap();
        assert_eq!(indexed.manifest.files().len(), files.len(), "{case}");
        match says {
            "" => assert_eq!(indexed.incomplete, [""; 0], "{case}"),
            says => assert!(
                indexed.incomplete[0].contains(says),
                "{case}: {:?}",
                indexed.incomplete
            ),
        }
    }
}
