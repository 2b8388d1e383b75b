//! Tests of files made from chosen tensors.

use std::io::{Read, Seek};

use safetensors::SafeTensors;

use super::*;
use crate::{Hash, header::Format as Header, testing::Random};

fn file_of(path: &str, size: u64, tensors: Vec<Tensor>) -> manifest::File {
    manifest::File {
        path: path.to_owned(),
        size,
        blake3: Hash::of(b""),
        sha256: [0; 32],
        tensors,
    }
}

/// Returns a safetensors file with this JSON and data, and its manifest entry.
fn indexed(json: &str, data: &[u8]) -> (Vec<u8>, manifest::File) {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.extend_from_slice(data);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    let found = Header::Safetensors
        .read(&file, bytes.len() as u64)
        .unwrap()
        .into_iter()
        .map(|info| {
            let hash = Hash::of(&bytes[info.start as usize..info.end as usize]);
            Tensor::new(info, hash)
        })
        .collect();
    let entry = file_of("a/model.safetensors", bytes.len() as u64, found);
    (bytes, entry)
}

fn written(plan: &Plan, source: &[u8]) -> Vec<u8> {
    let mut destination = tempfile::tempfile().unwrap();
    destination.write_all_at(&[0xee; 5000], 0).unwrap();
    plan.write(
        |buffer, at| {
            assert!(buffer.len() as u64 <= PIECE);
            buffer.copy_from_slice(&source[at as usize..][..buffer.len()]);
            Ok(())
        },
        &destination,
    )
    .unwrap();
    destination.rewind().unwrap();
    let mut bytes = Vec::new();
    destination.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, plan.size());
    bytes
}

fn head<'a>(bytes: &'a [u8], file: &manifest::File) -> &'a [u8] {
    &bytes[..header_range(file).end as usize]
}

const JSON: &str = concat!(
    r#"{"__metadata__":{"format":"pt","a":"é\n"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[4,12]},"#,
    "\n        ",
    r#""a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"c\u0001":{"dtype":"U8","shape":[3],"#,
    r#""data_offsets":[12,15]}}   "#
);

#[test]
fn a_result_has_the_chosen_tensors_packed_in_order_with_the_metadata() {
    let data: Vec<u8> = (0..15).collect();
    let (bytes, file) = indexed(JSON, &data);
    let plan = plan(&file, &[2, 0], head(&bytes, &file)).unwrap();
    assert_eq!(plan.header().len() % 8, 0);
    let json = std::str::from_utf8(&plan.header()[8..]).unwrap();
    assert_eq!(
        json.trim_end(),
        concat!(
            r#"{"__metadata__":{"a":"é\n","format":"pt"},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"#,
            r#""c\u0001":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}"#
        )
    );
    let start = header_range(&file).end;
    assert_eq!(
        plan.copies(),
        [
            Copy {
                source: start..start + 4,
                to: plan.header().len() as u64
            },
            Copy {
                source: start + 12..start + 15,
                to: plan.header().len() as u64 + 4
            }
        ]
    );
    let result = written(&plan, &bytes);
    let read = SafeTensors::deserialize(&result).unwrap();
    assert_eq!(read.len(), 2);
    assert_eq!(read.tensor("a").unwrap().data(), &data[..4]);
    assert_eq!(read.tensor("c\u{1}").unwrap().data(), &data[12..]);
    let (_, metadata) = SafeTensors::read_metadata(&result).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["a"], "é\n");
}

#[test]
fn a_tensor_of_an_unknown_type_is_copied_unchanged() {
    let json = concat!(
        r#"{"a":{"dtype":"F4_E3M0","shape":[16],"data_offsets":[0,8]},"#,
        r#""b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}"#
    );
    let (bytes, file) = indexed(json, &[7; 9]);
    let planned = plan(&file, &[0], head(&bytes, &file)).unwrap();
    let header = std::str::from_utf8(&planned.header()[8..]).unwrap();
    assert_eq!(
        header.trim_end(),
        r#"{"a":{"dtype":"F4_E3M0","shape":[16],"data_offsets":[0,8]}}"#
    );
    // The manifest must give the same type as the file.
    let mut other = file.clone();
    other.tensors[0].dtype = "F4_E3M1".to_owned();
    assert!(matches!(
        plan(&other, &[0], head(&bytes, &other)),
        Err(ExtractError::Differs { what: "type", .. })
    ));
}

#[test]
fn neighbours_in_the_source_are_one_copy_of_many_pieces() {
    let json = concat!(
        r#"{"a":{"dtype":"U8","shape":[2097153],"data_offsets":[0,2097153]},"#,
        r#""b":{"dtype":"U8","shape":[1048577],"data_offsets":[2097153,3145730]}}"#
    );
    let data: Vec<u8> = (0..3_145_730_u32).map(|i| (i * 31 / 7) as u8).collect();
    let (bytes, file) = indexed(json, &data);
    let plan = plan(&file, &[0, 1], head(&bytes, &file)).unwrap();
    assert_eq!(plan.copies().len(), 1);
    let result = written(&plan, &bytes);
    assert_eq!(&result[plan.header().len()..], data);
    SafeTensors::deserialize(&result).unwrap();
}

#[test]
fn random_selections_of_random_files_hold_the_same_tensors() {
    const DTYPES: [(&str, usize); 12] = [
        ("BOOL", 8),
        ("U8", 8),
        ("I16", 16),
        ("F16", 16),
        ("BF16", 16),
        ("F8_E4M3", 8),
        ("F32", 32),
        ("F64", 64),
        ("C64", 64),
        ("U64", 64),
        ("F4", 4),
        ("F6_E2M3", 6),
    ];
    let mut random = Random(1);
    for round in 0..200 {
        let mut entries = Vec::new();
        let mut offset = 0;
        for i in 0..random.below(12) {
            let (dtype, bits) = DTYPES[random.below(DTYPES.len())];
            let mut shape: Vec<usize> = (0..random.below(4)).map(|_| random.below(7)).collect();
            // Types of less than a byte fill whole bytes only in multiples.
            shape.push(4);
            let size = shape.iter().product::<usize>() * bits / 8;
            entries.push(format!(
                r#""t.{}.{i}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{offset},{}]}}"#,
                random.below(5),
                offset + size
            ));
            offset += size;
        }
        for i in (1..entries.len()).rev() {
            entries.swap(i, random.below(i + 1));
        }
        if round % 3 == 0 {
            entries.insert(0, r#""__metadata__":{"k":"v"}"#.to_owned());
        }
        let json = format!("{{{}}}{}", entries.join(", "), " ".repeat(random.below(9)));
        let data: Vec<u8> = (0..offset).map(|_| random.below(256) as u8).collect();
        let (bytes, file) = indexed(&json, &data);
        let chosen: Vec<usize> = (0..file.tensors.len())
            .filter(|_| random.below(2) == 0)
            .collect();
        let plan = plan(&file, &chosen, head(&bytes, &file)).unwrap();
        let result = written(&plan, &bytes);
        let (before, after) = (
            SafeTensors::deserialize(&bytes).unwrap(),
            SafeTensors::deserialize(&result).unwrap(),
        );
        assert_eq!(after.len(), chosen.len());
        for index in chosen {
            let name = &file.tensors[index].name;
            assert_eq!(before.tensor(name).unwrap(), after.tensor(name).unwrap());
        }
    }
}

fn tensor(name: &str, dtype: &str, shape: &[u64], range: Range<u64>) -> Tensor {
    Tensor {
        name: name.to_owned(),
        dtype: dtype.to_owned(),
        shape: shape.to_vec(),
        start: range.start,
        blake3: Hash::of(format!("{name} {range:?}").as_bytes()),
        end: range.end,
    }
}

#[test]
fn plain_gguf_types_are_kept_and_quantised_ones_become_bytes_with_their_type_in_the_metadata() {
    let source: Vec<u8> = (0..400_u32).map(|i| i as u8).collect();
    let file = file_of(
        "m.gguf",
        400,
        vec![
            tensor("norm", "F32", &[4], 32..48),
            tensor("blk.0.w", "Q4_K", &[1, 256], 64..208),
            tensor("scale", "BF16", &[2, 2], 224..232),
        ],
    );
    assert_eq!(header_range(&file), 0..0);
    let plan = plan(&file, &[0, 1, 2], &[]).unwrap();
    assert_eq!(plan.copies().len(), 3);
    let result = written(&plan, &source);
    let read = SafeTensors::deserialize(&result).unwrap();
    let norm = read.tensor("norm").unwrap();
    assert_eq!(
        (norm.dtype(), norm.shape(), norm.data()),
        (Dtype::F32, &[4][..], &source[32..48])
    );
    let scale = read.tensor("scale").unwrap();
    assert_eq!(
        (scale.dtype(), scale.shape(), scale.data()),
        (Dtype::BF16, &[2, 2][..], &source[224..232])
    );
    let quantised = read.tensor("blk.0.w").unwrap();
    assert_eq!(
        (quantised.dtype(), quantised.shape(), quantised.data()),
        (Dtype::U8, &[144][..], &source[64..208])
    );
    let (_, metadata) = SafeTensors::read_metadata(&result).unwrap();
    let metadata = metadata.metadata().as_ref().unwrap();
    assert_eq!(metadata.len(), 2);
    assert_eq!(metadata["gguf.dtype.blk.0.w"], "Q4_K");
    assert_eq!(metadata["gguf.shape.blk.0.w"], "[1,256]");
}

#[test]
fn results_are_named_after_their_source() {
    assert_eq!(result_path("a/x.safetensors"), "a/x.safetensors");
    assert_eq!(result_path("a/x.gguf"), "a/x.safetensors");
    assert_eq!(result_path("a/x.bin"), "a/x.bin.safetensors");
}

#[test]
fn a_header_and_a_manifest_that_disagree_are_refused() {
    use ExtractError as E;
    let (bytes, file) = indexed(JSON, &[0; 15]);
    let header = head(&bytes, &file);
    let changed = |change: fn(&mut Tensor)| {
        let mut file = file.clone();
        change(&mut file.tensors[1]);
        plan(&file, &[1], header)
    };
    assert!(changed(|_| {}).is_ok());
    for (change, expected) in [
        ((|t| t.dtype = "I32".to_owned()) as fn(&mut Tensor), "type"),
        (|t| t.shape = vec![1, 2], "shape"),
        (|t| t.start += 1, "offset"),
        (|t| t.end += 1, "offset"),
    ] {
        assert!(
            matches!(changed(change), Err(E::Differs { what, .. }) if what == expected),
            "{expected}"
        );
    }
    assert!(matches!(
        changed(|t| t.name = "x".to_owned()),
        Err(E::Missing(name)) if name == "x"
    ));
    assert!(matches!(
        changed(|t| t.name = METADATA.to_owned()),
        Err(E::Reserved)
    ));
    assert!(matches!(
        changed(|t| (t.start, t.end) = (t.end, t.start)),
        Err(E::Overlap(_))
    ));
    assert!(matches!(
        plan(&file, &[3], header),
        Err(E::NoTensor {
            index: 3,
            tensors: 3
        })
    ));
    assert!(matches!(
        plan(&file, &[1, 1], header),
        Err(E::Duplicate(name)) if name == "b"
    ));
    for given in [&[][..], &header[..5], &header[..header.len() - 1], &bytes] {
        assert!(matches!(
            plan(&file, &[1], given),
            Err(E::HeaderSize { .. })
        ));
    }
}

#[test]
fn tensors_that_share_bytes_are_refused() {
    let file = file_of(
        "m.gguf",
        100,
        vec![
            tensor("a", "Q8_0", &[100], 0..100),
            tensor("b", "Q8_0", &[100], 0..100),
            tensor("c", "F32", &[2], 8..12),
            tensor("d", "F32", &[1 << 63, 2], 8..12),
            tensor("e", "I8", &[0], 50..50),
            tensor("f", "I8", &[50], 50..100),
        ],
    );
    assert!(plan(&file, &[0], &[]).is_ok());
    assert!(plan(&file, &[5, 4], &[]).is_ok());
    assert!(matches!(
        plan(&file, &[0, 1], &[]),
        Err(ExtractError::Overlap(_))
    ));
    for wrong in [2, 3] {
        assert!(matches!(
            plan(&file, &[wrong], &[]),
            Err(ExtractError::Size { present: 4, .. })
        ));
    }
}

/// Plans with a header of this JSON, and a manifest that lists one tensor `a` of four bytes after the header.
fn hostile(json: &[u8]) -> Result<Plan, ExtractError> {
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(json);
    let start = header.len() as u64;
    let entry = tensor("a", "F32", &[1], start..start + 4);
    plan(
        &file_of("m.safetensors", start + 4, vec![entry]),
        &[0],
        &header,
    )
}

#[test]
fn malformed_headers_are_errors() {
    let good = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    assert!(hostile(good.as_bytes()).is_ok());
    let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let dimensions = vec!["1"; 33].join(",");
    let many = (0..=MAX_METADATA)
        .map(|i| format!(r#""{i}":"""#))
        .collect::<Vec<_>>()
        .join(",");
    for bad in [
        String::new(),
        "[]".to_owned(),
        "null".to_owned(),
        format!("{good} x"),
        format!(r#"{{"a":{entry},"a":{entry}}}"#),
        format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},"a":{entry}}}"#),
        format!(r#"{{"__metadata__":{{"x":1}},"a":{entry}}}"#),
        format!(r#"{{"__metadata__":[],"a":{entry}}}"#),
        format!(r#"{{"__metadata__":{{{many}}},"a":{entry}}}"#),
        format!(r#"{{"a":{{"dtype":"F32","shape":[{dimensions}],"data_offsets":[0,4]}}}}"#),
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#.to_owned(),
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#.to_owned(),
        r#"{"a":{"shape":[1],"data_offsets":[0,4]}}"#.to_owned(),
        "{\"x\":".to_owned() + &"[".repeat(100_000),
        "{\"a\":".to_owned() + &"[".repeat(100_000),
    ] {
        let result = hostile(bad.as_bytes());
        assert!(
            matches!(result, Err(ExtractError::Malformed(_))),
            "{bad:.100}: {result:?}"
        );
    }
    assert!(matches!(
        hostile(br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}"#),
        Err(ExtractError::Differs { what: "offset", .. })
    ));
    assert!(matches!(hostile(b"{}"), Err(ExtractError::Missing(_))));
    assert!(
        hostile(format!(r#"{{"__metadata__":null,"a":{entry}}}"#).as_bytes())
            .is_ok_and(|plan| !plan.header().windows(4).any(|w| w == b"meta"))
    );
}

#[test]
fn mutated_headers_never_make_planning_panic() {
    let mut random = Random(2);
    let data = [7; 15];
    let (bytes, file) = indexed(JSON, &data);
    let header = head(&bytes, &file);
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut header = header.to_vec();
        for _ in 0..=random.below(3) {
            let at = random.below(header.len());
            header[at] = random.below(256) as u8;
        }
        match plan(&file, &[0, 1, 2], &header) {
            Ok(plan) => {
                SafeTensors::deserialize(&written(&plan, &bytes)).unwrap();
            }
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 10_000);
}

#[test]
fn an_error_of_the_source_ends_the_writing() {
    let (bytes, file) = indexed(JSON, &[0; 15]);
    let plan = plan(&file, &[0], head(&bytes, &file)).unwrap();
    let result = plan.write(
        |_, _| Err(io::Error::other("gone")),
        &tempfile::tempfile().unwrap(),
    );
    assert_eq!(result.unwrap_err().to_string(), "gone");
}
