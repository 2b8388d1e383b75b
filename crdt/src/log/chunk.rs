//! Limits a change before Automerge decodes it.
//!
//! Automerge's decoder trusts lengths: a few bytes of run-length encoding can stand for billions of operations, and a
//! compressed chunk inflates without a limit. This module walks the chunk (format:
//! <https://automerge.org/automerge-binary-format-spec/>) and computes its decoded size without decoding it.

use crate::{id::ChangeId, refusal::Refusal};

/// Largest change, in bytes.
pub const MAX_CHANGE: usize = 512 << 10;

/// Most operations in one change.
pub const MAX_OPS: u64 = 65_536;

/// Longest key of a map, in bytes.
pub const MAX_MAP_KEY: usize = 1024;

/// Longest message of a commit, in bytes.
pub const MAX_MESSAGE: usize = 1024;

/// Most bytes of keys after run lengths are expanded.
const MAX_EXPANDED: u64 = 8 * MAX_CHANGE as u64;

/// Most changes that one change builds on, and most sessions whose operations it mentions.
const MAX_DEPS: u64 = 4096;

/// Upper limit of columns. Automerge has eight groups of columns, which have fewer parts than this in all.
const MAX_COLUMNS: u64 = 32;

const MAGIC: [u8; 4] = [0x85, 0x6f, 0x4a, 0x83];

/// The only accepted kind of chunk: one change, not compressed.
const CHANGE: u8 = 1;

const ACTOR: usize = 16;

struct Reader<'a>(&'a [u8]);

const TRUNCATED: Refusal = Refusal::Malformed("a change ends early");
const TOO_MUCH: Refusal = Refusal::Malformed("a change expands to more than is allowed");

impl<'a> Reader<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], Refusal> {
        let count = usize::try_from(count).map_err(|_| TRUNCATED)?;
        let (taken, rest) = self.0.split_at_checked(count).ok_or(TRUNCATED)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Refusal> {
        Ok(self.take(1)?[0])
    }

    /// Reads the seven-bit groups of a LEB128 number. Returns the value, the number of bits, and whether the sign bit
    /// is set.
    fn groups(&mut self) -> Result<(u64, u32, bool), Refusal> {
        let (mut value, mut bits) = (0u64, 0);
        loop {
            let byte = self.byte()?;
            let group = u64::from(byte & 0x7f);
            // The tenth group has room for one bit, the 64th.
            if bits == 63 && group > 1 && group != 0x7f {
                return Err(Refusal::Malformed("a number has more than 64 bits"));
            }
            value |= group << bits;
            bits += 7;
            if byte & 0x80 == 0 {
                return Ok((value, bits, byte & 0x40 != 0));
            }
            if bits > 63 {
                return Err(Refusal::Malformed("a number has more than 64 bits"));
            }
        }
    }

    fn unsigned(&mut self) -> Result<u64, Refusal> {
        Ok(self.groups()?.0)
    }

    fn signed(&mut self) -> Result<i64, Refusal> {
        let (value, bits, negative) = self.groups()?;
        let extension = if negative && bits < 64 {
            u64::MAX << bits
        } else {
            0
        };
        Ok((value | extension) as i64)
    }

    fn limited(&mut self, limit: u64) -> Result<u64, Refusal> {
        match self.unsigned()? {
            value if value <= limit => Ok(value),
            _ => Err(TOO_MUCH),
        }
    }
}

/// The decoded size of a column.
#[derive(Default)]
struct Unfolded {
    rows: u64,
    /// Members, for the column of a group; bytes, for a column of values or strings.
    sum: u64,
}

impl Unfolded {
    fn add(&mut self, rows: u64, each: u64) -> Result<(), Refusal> {
        self.rows = self.rows.checked_add(rows).ok_or(TOO_MUCH)?;
        let sum = rows
            .checked_mul(each)
            .and_then(|sum| self.sum.checked_add(sum));
        self.sum = sum.ok_or(TOO_MUCH)?;
        if self.rows > MAX_OPS || self.sum > MAX_EXPANDED {
            return Err(TOO_MUCH);
        }
        Ok(())
    }
}

fn booleans(data: &[u8]) -> Result<Unfolded, Refusal> {
    let (mut reader, mut unfolded) = (Reader(data), Unfolded::default());
    while !reader.0.is_empty() {
        unfolded.add(reader.unsigned()?, 0)?;
    }
    Ok(unfolded)
}

/// Measures a run-length encoded column. `value` reads one value and returns its size.
fn runs(
    data: &[u8],
    value: impl Fn(&mut Reader<'_>) -> Result<u64, Refusal>,
) -> Result<Unfolded, Refusal> {
    let (mut reader, mut unfolded) = (Reader(data), Unfolded::default());
    while !reader.0.is_empty() {
        match reader.signed()? {
            0 => unfolded.add(reader.unsigned()?, 0)?,
            count if count > 0 => {
                let each = value(&mut reader)?;
                unfolded.add(count.unsigned_abs(), each)?;
            }
            // Each value takes at least one byte, so this loop ends.
            count => {
                for _ in 0..count.unsigned_abs() {
                    let each = value(&mut reader)?;
                    unfolded.add(1, each)?;
                }
            }
        }
    }
    Ok(unfolded)
}

/// Checks that `bytes` are one uncompressed change that stays within the limits when it is decoded.
pub(crate) fn check(bytes: &[u8]) -> Result<(), Refusal> {
    if bytes.len() > MAX_CHANGE {
        return Err(Refusal::Malformed("a change is longer than 512 KiB"));
    }
    let mut reader = Reader(bytes);
    if reader.take(4)? != MAGIC {
        return Err(Refusal::Malformed("this is not a change"));
    }
    let _checksum = reader.take(4)?;
    if reader.byte()? != CHANGE {
        return Err(Refusal::Malformed("a chunk is not an uncompressed change"));
    }
    if reader.unsigned()? != reader.0.len() as u64 {
        return Err(Refusal::Malformed("a chunk's length is wrong"));
    }
    let dependencies = reader.limited(MAX_DEPS)?;
    reader.take(dependencies * 32)?;
    if reader.unsigned()? != ACTOR as u64 {
        return Err(Refusal::Malformed("an actor does not have 16 bytes"));
    }
    reader.take(ACTOR as u64)?;
    let (_seq, _start_op, _time) = (reader.unsigned()?, reader.unsigned()?, reader.signed()?);
    let message = reader.limited(MAX_MESSAGE as u64)?;
    reader.take(message)?;
    for _ in 0..reader.limited(MAX_DEPS)? {
        if reader.unsigned()? != ACTOR as u64 {
            return Err(Refusal::Malformed("an actor does not have 16 bytes"));
        }
        reader.take(ACTOR as u64)?;
    }
    let mut columns = Vec::new();
    for _ in 0..reader.limited(MAX_COLUMNS)? {
        columns.push((reader.unsigned()?, reader.unsigned()?));
    }
    let mut value_bytes = None;
    for (spec, length) in columns {
        let data = reader.take(length)?;
        if spec & 8 != 0 {
            return Err(Refusal::Malformed("a column is compressed"));
        }
        match spec & 7 {
            // Groups count by their members.
            0 => {
                if runs(data, |reader| reader.unsigned())?.sum > MAX_OPS {
                    return Err(TOO_MUCH);
                }
            }
            1 | 2 => _ = runs(data, |reader| reader.unsigned().map(|_| 0))?,
            3 => _ = runs(data, |reader| reader.signed().map(|_| 0))?,
            4 => _ = booleans(data)?,
            5 => {
                runs(data, |reader| {
                    let length = reader.limited(MAX_MAP_KEY as u64)?;
                    reader.take(length)?;
                    Ok(length)
                })?;
            }
            6 => value_bytes = Some(runs(data, |reader| Ok(reader.unsigned()? >> 4))?.sum),
            _ if value_bytes.take() == Some(length) => {}
            _ => {
                return Err(Refusal::Malformed(
                    "values have a length other than declared",
                ));
            }
        }
    }
    if value_bytes.is_some_and(|bytes| bytes != 0) {
        return Err(Refusal::Malformed("values are missing"));
    }
    if !reader.0.is_empty() {
        return Err(Refusal::Malformed("a change has data after its operations"));
    }
    Ok(())
}

/// Returns the dependencies that an uncompressed change declares; none if it cannot be decoded that far.
pub(crate) fn dependencies(bytes: &[u8]) -> Vec<ChangeId> {
    let read = || {
        let mut reader = Reader(bytes);
        reader.take(MAGIC.len() as u64 + 4)?;
        if reader.byte()? != CHANGE {
            return Err(Refusal::Malformed("a chunk is not an uncompressed change"));
        }
        let _length = reader.unsigned()?;
        let count = reader.limited(MAX_DEPS)?;
        let hashes = reader.take(count * 32)?;
        Ok::<_, Refusal>(hashes.chunks(32).filter_map(ChangeId::read).collect())
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use automerge::{AutoCommit, ObjType, ROOT, transaction::Transactable};

    use super::*;

    fn change() -> Vec<u8> {
        let mut doc = AutoCommit::new();
        let list = doc.put_object(ROOT, "list", ObjType::List).unwrap();
        for at in 0..40 {
            doc.insert(&list, at, "same").unwrap();
            doc.put(ROOT, format!("key {at}"), at as i64 - 20).unwrap();
        }
        doc.commit();
        doc.get_last_local_change().unwrap().raw_bytes().to_vec()
    }

    #[test]
    fn changes_made_by_automerge_are_allowed() {
        assert_eq!(check(&change()), Ok(()));
    }

    #[test]
    fn truncated_and_extended_changes_are_refused() {
        let change = change();
        for end in 0..change.len() {
            check(&change[..end]).expect_err("it is truncated");
        }
        check(&[&change[..], &[0]].concat()).expect_err("there is data after it");
    }

    /// Creates a chunk with these columns. The checksum is wrong, because this module does not check it.
    fn with_columns(columns: &[(u8, &[u8])]) -> Vec<u8> {
        let mut body = vec![0, 16];
        body.extend([7; 16]);
        body.extend([1, 1, 0, 0, 0, columns.len() as u8]);
        for (spec, data) in columns {
            body.extend([*spec, data.len() as u8]);
        }
        columns.iter().for_each(|(_, data)| body.extend(*data));
        let mut chunk = [&MAGIC[..], &[0; 4], &[CHANGE]].concat();
        chunk.extend([body.len() as u8 | 0x80, (body.len() >> 7) as u8]);
        chunk.extend(body);
        chunk
    }

    #[test]
    fn run_lengths_do_not_expand_without_limit() {
        let many = [0x80, 0x80, 0x80, 0x80, 0x80, 0x20];
        assert_eq!(check(&with_columns(&[(0x42, &[1, 1])])), Ok(()));
        for spec in [0x40, 0x41, 0x42, 0x43, 0x46] {
            let run = [&many[..], &[1]].concat();
            assert_eq!(
                check(&with_columns(&[(spec, &run)])),
                Err(TOO_MUCH),
                "{spec:x}"
            );
            let nulls = [&[0], &many[..]].concat();
            assert_eq!(
                check(&with_columns(&[(spec, &nulls)])),
                Err(TOO_MUCH),
                "{spec:x}"
            );
        }
        assert_eq!(check(&with_columns(&[(0x44, &many)])), Err(TOO_MUCH));
        // Few rows, each a group with many members.
        assert_eq!(
            check(&with_columns(&[(0x70, &[&[1], &many[..]].concat())])),
            Err(TOO_MUCH)
        );
        // A long key, repeated many times.
        let key = [&[0x80, 0x80, 4, 100][..], &[b'k'; 100]].concat();
        assert_eq!(check(&with_columns(&[(0x15, &key)])), Err(TOO_MUCH));
        // A compressed column.
        check(&with_columns(&[(0x4a, &[1, 1])])).expect_err("a compressed column");
    }
}
