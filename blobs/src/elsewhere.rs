//! Content that this machine has in other blobs: tensors of other models and revisions, in whatever file and at whatever place they lie there.
//!
//! It is only a guess until it is checked: a provider sends the parents of the groups, without their content, and what does not fit them is fetched.

use std::{
    collections::{HashMap, HashSet},
    io,
    ops::Range,
    sync::Arc,
};

use crate::{
    Hash, Store, StoreError,
    bitfield::Bitfield,
    manifest::File,
    source::Source,
    tree::{GROUP, Tree},
};

/// Files held open for what is taken from them.
const MAX_SOURCES: usize = 256;

/// Where the content of a blob that is to come lies in other blobs.
#[derive(Debug)]
pub(crate) struct Elsewhere {
    /// By place in the blob; none overlaps another.
    pieces: Vec<Piece>,
    groups: Bitfield,
}

#[derive(Debug)]
struct Piece {
    range: Range<u64>,
    source: Arc<Source>,
    at: u64,
}

/// A tensor of a file that is to come, by the file's place among those asked about.
type Place = (usize, usize);

impl Elsewhere {
    /// Looks for the tensors of `files` in all models of the store, by their hashes; for each blob of which whole groups were found, where they are.
    /// Blocks.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) fn find(
        store: &Store,
        files: &[&File],
    ) -> Result<HashMap<Hash, Arc<Self>>, StoreError> {
        let mut wanted: HashMap<Hash, Vec<Place>> = HashMap::new();
        for (at, file) in files.iter().enumerate() {
            for (i, tensor) in file.tensors.iter().enumerate() {
                if tensor.start < tensor.end {
                    wanted.entry(tensor.blake3).or_default().push((at, i));
                }
            }
        }
        if wanted.is_empty() {
            return Ok(HashMap::new());
        }
        let coming: HashSet<Hash> = files.iter().map(|file| file.blake3).collect();
        let mut looked_at = HashSet::new();
        let mut sources = 0;
        let mut found: HashMap<Place, (Arc<Source>, u64)> = HashMap::new();
        for model in store.models()? {
            let Some(manifest) = store.manifest(&model.id)? else {
                continue;
            };
            for file in manifest.files() {
                if coming.contains(&file.blake3) || !looked_at.insert(file.blake3) {
                    continue;
                }
                let mut source = None;
                let mut tried = false;
                for tensor in &file.tensors {
                    let Some(places) = wanted.get(&tensor.blake3) else {
                        continue;
                    };
                    let fits = |(at, i): &&Place| {
                        let wanted = &files[*at].tensors[*i];
                        wanted.end - wanted.start == tensor.end.saturating_sub(tensor.start)
                    };
                    for place in places.iter().filter(fits) {
                        if found.contains_key(place) {
                            continue;
                        }
                        if !std::mem::replace(&mut tried, true) && sources < MAX_SOURCES {
                            source = store.whole(&file.blake3)?.map(Arc::new);
                            sources += usize::from(source.is_some());
                        }
                        if let Some(source) = &source {
                            found.insert(*place, (Arc::clone(source), tensor.start));
                        }
                    }
                    if tried && source.is_none() {
                        // It is not here: no other tensor of it is either.
                        break;
                    }
                }
            }
        }
        let mut pieces: HashMap<usize, Vec<Piece>> = HashMap::new();
        for ((at, i), (source, start)) in found {
            let tensor = &files[at].tensors[i];
            pieces.entry(at).or_default().push(Piece {
                range: tensor.start..tensor.end,
                source,
                at: start,
            });
        }
        let of_files = pieces.into_iter().filter_map(|(at, pieces)| {
            let file = files[at];
            let elsewhere = Self::new(Tree::new(file.size), pieces);
            (elsewhere.groups.count() > 0).then(|| (file.blake3, Arc::new(elsewhere)))
        });
        Ok(of_files.collect())
    }

    fn new(tree: Tree, mut pieces: Vec<Piece>) -> Self {
        pieces.sort_by_key(|piece| (piece.range.start, piece.range.end));
        let mut end = 0;
        // Tensors of a hostile manifest may overlap.
        pieces.retain(|piece| {
            let fits = piece.range.start >= end && piece.range.end <= tree.size();
            end = if fits { piece.range.end } else { end };
            fits
        });
        let mut groups = Bitfield::empty(tree.groups());
        let mut run = 0..0;
        for piece in &pieces {
            if piece.range.start != run.end {
                run.start = piece.range.start;
            }
            run.end = piece.range.end;
            let first = run.start.div_ceil(GROUP);
            let last = match run.end == tree.size() {
                true => tree.groups(),
                false => run.end / GROUP,
            };
            if first < last {
                groups.insert_range(first..last);
            }
        }
        Self { pieces, groups }
    }

    /// The groups of which all bytes were found.
    pub(crate) fn groups(&self) -> &Bitfield {
        &self.groups
    }

    /// Reads what was found of the blob from `offset` on; it is not checked. Blocks.
    ///
    /// # Errors
    /// What the disk says; `UnexpectedEof` where nothing was found.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let place = self.pieces.partition_point(|piece| piece.range.end <= at);
            let piece = self
                .pieces
                .get(place)
                .filter(|piece| piece.range.start <= at);
            let Some(piece) = piece else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            let n = (piece.range.end - at).min((buffer.len() - done) as u64) as usize;
            let from = piece.at + (at - piece.range.start);
            piece
                .source
                .read_unchecked(&mut buffer[done..done + n], from)?;
            done += n;
        }
        Ok(())
    }
}
