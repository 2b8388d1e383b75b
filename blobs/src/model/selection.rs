//! Selections: the part of a model that is wanted, as files, tensors and bytes.

use std::ops::Range;

use crate::{
    Manifest, Pattern,
    extract::{self, shown},
    header::MAX_SAFETENSORS_HEADER,
    manifest,
    path::{self, PathError},
    tree::{GROUP, Tree},
};

/// The most patterns for files, and the most for tensors. With the most tensors that a manifest may list, each pattern
/// takes some tenths of a second.
pub const MAX_PATTERNS: usize = 1024;

/// The most names that an error suggests.
const SUGGESTIONS: usize = 3;

/// Patterns for the wanted part of a model. Without any pattern, the whole model is wanted.
///
/// A file that matches a pattern of `files` is wanted whole. Of other files, only the tensors that match a pattern of
/// `tensors` are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// Patterns for paths of files.
    pub files: Vec<Pattern>,
    /// Patterns for names of tensors.
    pub tensors: Vec<Pattern>,
}

/// The result of applying a selection to a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selected {
    files: Vec<SelectedFile>,
}

/// The wanted part of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelectedFile {
    /// Index of the file in the manifest.
    pub file: usize,
    /// Size of the file, in bytes.
    pub size: u64,
    /// The wanted part.
    pub wanted: Wanted,
}

/// The wanted part of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The whole file.
    Whole,
    /// Some tensors.
    Tensors {
        /// Indices of the wanted tensors in the file's tensor list, sorted by offset. Not empty.
        tensors: Vec<usize>,
        /// The bytes that [`extract::plan`] needs; empty for GGUF.
        header: Range<u64>,
        /// All needed byte ranges, by start: the header, then the tensors. They are not empty, and do not overlap or
        /// touch.
        ranges: Vec<Range<u64>>,
    },
}

/// The reason why a selection cannot be applied to a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelectionError {
    /// There are more patterns than [`MAX_PATTERNS`].
    #[error("there are more than {MAX_PATTERNS} patterns for {0}s")]
    TooManyPatterns(&'static str),
    /// A pattern matches nothing in the model, and is probably wrong.
    #[error("no {what} of the model matches {pattern:?}{}", suggest(.close))]
    NoMatch {
        /// `file` or `tensor`.
        what: &'static str,
        /// The first pattern that matches nothing.
        pattern: String,
        /// Up to three similar names, closest first, each cut after 200 characters.
        close: Vec<String>,
    },
    /// The manifest puts the first tensor of a safetensors file at an offset that exceeds the longest header.
    #[error("the header of {path:?} would have {bytes} bytes, more than the format allows")]
    Header {
        /// Path of the file.
        path: String,
        /// Bytes before the first tensor.
        bytes: u64,
    },
    /// Two results would have the same path, for example those of `x.gguf` and `x.safetensors`.
    #[error("two files of the selection would clash: {0}")]
    Clash(#[from] PathError),
}

fn suggest(close: &[String]) -> String {
    if close.is_empty() {
        return String::new();
    }
    let quoted: Vec<_> = close.iter().map(|name| format!("{name:?}")).collect();
    format!("; similar names: {}", quoted.join(", "))
}

impl Selection {
    /// Returns true if the whole model is selected.
    pub fn is_everything(&self) -> bool {
        self.files.is_empty() && self.tensors.is_empty()
    }

    /// Applies the selection to a model.
    ///
    /// A tensor pattern that matches only in files that are wanted whole counts as matched. The time is bounded by the
    /// number of patterns times the length of all names, whatever their content.
    ///
    /// # Errors
    /// [`SelectionError`] if a pattern matches nothing, or the result cannot be written as files.
    pub fn select(&self, manifest: &Manifest) -> Result<Selected, SelectionError> {
        for (patterns, what) in [(&self.files, "file"), (&self.tensors, "tensor")] {
            if patterns.len() > MAX_PATTERNS {
                return Err(SelectionError::TooManyPatterns(what));
            }
        }
        let mut wanted_files = PatternHits::new(&self.files);
        let mut wanted_tensors = PatternHits::new(&self.tensors);
        let mut files = Vec::new();
        for (index, file) in manifest.files().iter().enumerate() {
            let is_whole = wanted_files.any_matches(|pattern| pattern.matches_path(&file.path));
            let tensors: Vec<usize> = (0..file.tensors.len())
                .filter(|i| {
                    wanted_tensors
                        .any_matches(|pattern| pattern.matches_tensor(&file.tensors[*i].name))
                })
                .collect();
            let wanted = if is_whole || self.is_everything() {
                Wanted::Whole
            } else if !tensors.is_empty() {
                wanted_tensors_of(file, tensors)?
            } else {
                continue;
            };
            files.push(SelectedFile {
                file: index,
                size: file.size,
                wanted,
            });
        }
        let all = manifest.files();
        if let Some(pattern) = wanted_files.first_without_match() {
            let names = all.iter().map(|file| file.path.as_str());
            return Err(no_match("file", pattern, names));
        }
        if let Some(pattern) = wanted_tensors.first_without_match() {
            let tensors = all.iter().flat_map(|file| &file.tensors);
            let names = tensors.map(|tensor| tensor.name.as_str());
            return Err(no_match("tensor", pattern, names));
        }
        let paths: Vec<String> = files
            .iter()
            .map(|selected| match selected.wanted {
                Wanted::Whole => all[selected.file].path.clone(),
                Wanted::Tensors { .. } => extract::result_path(&all[selected.file].path),
            })
            .collect();
        path::check_all(paths.iter().map(String::as_str))?;
        Ok(Selected { files })
    }
}

impl Selected {
    /// Selects whole files by their paths.
    pub fn of_files(manifest: &Manifest, is_wanted: impl Fn(&str) -> bool) -> Self {
        let files = manifest.files().iter().enumerate();
        let files = files.filter(|(_, file)| is_wanted(&file.path));
        let files = files.map(|(index, file)| SelectedFile {
            file: index,
            size: file.size,
            wanted: Wanted::Whole,
        });
        Self {
            files: files.collect(),
        }
    }

    /// Returns the files with wanted content, in the manifest's order.
    pub fn files(&self) -> &[SelectedFile] {
        &self.files
    }

    /// Returns the wanted part of the manifest's file with this index, if any.
    pub fn get(&self, file: usize) -> Option<&SelectedFile> {
        let at = self.files.binary_search_by_key(&file, |f| f.file).ok()?;
        Some(&self.files[at])
    }

    /// Returns the number of wanted bytes, including headers.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(SelectedFile::bytes).sum()
    }

    /// Returns the chunk groups with wanted content in the manifest's file with this index; see
    /// [`SelectedFile::groups`].
    pub fn groups(&self, file: usize) -> Vec<Range<u64>> {
        self.get(file).map(SelectedFile::groups).unwrap_or_default()
    }
}

impl SelectedFile {
    /// Returns the wanted byte ranges, by start. They are not empty, and do not overlap or touch; an empty file has
    /// none.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        match &self.wanted {
            Wanted::Whole if self.size == 0 => Vec::new(),
            Wanted::Whole => std::iter::once(0..self.size).collect(),
            Wanted::Tensors { ranges, .. } => ranges.clone(),
        }
    }

    /// Returns the number of wanted bytes.
    pub fn bytes(&self) -> u64 {
        match &self.wanted {
            Wanted::Whole => self.size,
            Wanted::Tensors { ranges, .. } => ranges.iter().map(|r| r.end - r.start).sum(),
        }
    }

    /// Returns the chunk groups of [`GROUP`] bytes that hold wanted bytes, as ranges of their indices, by start. The
    /// ranges are not empty, and do not overlap or touch. An empty file that is wanted has one group, of no bytes.
    pub fn groups(&self) -> Vec<Range<u64>> {
        match &self.wanted {
            Wanted::Whole => std::iter::once(0..Tree::new(self.size).groups()).collect(),
            Wanted::Tensors { ranges, .. } => merge(
                ranges
                    .iter()
                    .map(|range| range.start / GROUP..range.end.div_ceil(GROUP)),
            ),
        }
    }
}

/// Returns the wanted part of a file for `tensors`, given in any order.
fn wanted_tensors_of(
    file: &manifest::File,
    mut tensors: Vec<usize>,
) -> Result<Wanted, SelectionError> {
    let header = extract::header_range(file);
    // Otherwise a hostile manifest could have a terabyte fetched, and read into memory, as a header.
    if header.end > MAX_SAFETENSORS_HEADER + 8 {
        return Err(SelectionError::Header {
            path: shown(&file.path),
            bytes: header.end,
        });
    }
    tensors.sort_by_key(|index| extract::sort_key(&file.tensors[*index]));
    let places = tensors.iter().map(|index| {
        let tensor = &file.tensors[*index];
        tensor.start..tensor.end
    });
    let ranges = merge(std::iter::once(header.clone()).chain(places));
    Ok(Wanted::Tensors {
        tensors,
        header,
        ranges,
    })
}

/// Joins ranges that overlap or touch, and drops empty ones. The ranges are sorted by start.
fn merge(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges.filter(|range| !range.is_empty()) {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Patterns, with a record of which have matched.
struct PatternHits<'a> {
    patterns: &'a [Pattern],
    hit: Vec<bool>,
}

impl<'a> PatternHits<'a> {
    fn new(patterns: &'a [Pattern]) -> Self {
        Self {
            patterns,
            hit: vec![false; patterns.len()],
        }
    }

    /// Returns true if any pattern matches. Skips patterns whose answer cannot change anything.
    fn any_matches(&mut self, matches: impl Fn(&Pattern) -> bool) -> bool {
        let mut is_wanted = false;
        for (pattern, hit) in self.patterns.iter().zip(&mut self.hit) {
            if (!is_wanted || !*hit) && matches(pattern) {
                *hit = true;
                is_wanted = true;
            }
        }
        is_wanted
    }

    /// Returns the first pattern that has matched nothing.
    fn first_without_match(&self) -> Option<&'a Pattern> {
        let at = self.hit.iter().position(|hit| !hit)?;
        Some(&self.patterns[at])
    }
}

fn no_match<'a>(
    what: &'static str,
    pattern: &Pattern,
    names: impl Iterator<Item = &'a str>,
) -> SelectionError {
    SelectionError::NoMatch {
        what,
        pattern: pattern.to_string(),
        close: close(pattern, names).into_iter().map(shown).collect(),
    }
}

/// Returns the names most similar to a pattern's text. The score of a name counts the characters of its common prefix
/// with the pattern, and the triples of characters that occur in both. Case is ignored; of equally similar names, the
/// shorter comes first. Makes one pass over the names, with a few steps per byte.
fn close<'a>(pattern: &Pattern, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    // A slot for each triple, by a 16-bit hash. It is 0 if the pattern does not contain the triple, else the number of
    // the last name for which the triple was counted.
    let mut triples = vec![0_u32; 1 << 16];
    let place = |triple: &[u8]| {
        let mixed = triple.iter().fold(0_u32, |mixed, byte| {
            (mixed << 8) | u32::from(byte.to_ascii_lowercase())
        });
        (mixed.wrapping_mul(0x9e37_79b1) >> 16) as usize
    };
    for run in pattern.runs() {
        for triple in run.as_bytes().windows(3) {
            triples[place(triple)] = 1;
        }
    }
    let mut best: Vec<(usize, &str)> = Vec::with_capacity(SUGGESTIONS + 1);
    for (name, mark) in names.zip(2..) {
        let prefix = pattern.prefix().bytes();
        let mut score = prefix
            .zip(name.bytes())
            .take_while(|(a, b)| a.eq_ignore_ascii_case(b))
            .count();
        for triple in name.as_bytes().windows(3) {
            let counted = &mut triples[place(triple)];
            if *counted != 0 && *counted != mark {
                *counted = mark;
                score += 1;
            }
        }
        let is_before = |(other_score, other): &(usize, &str)| {
            (*other_score, name.len(), name) > (score, other.len(), *other)
        };
        if score == 0 || best.iter().any(|(_, other)| *other == name) {
            continue;
        }
        let at = best.iter().take_while(|other| is_before(other)).count();
        if at < SUGGESTIONS {
            best.insert(at, (score, name));
            best.truncate(SUGGESTIONS);
        }
    }
    best.into_iter().map(|(_, name)| name).collect()
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is meant"
)]
mod tests {
    use std::{collections::BTreeSet, time::Instant};

    use super::*;
    use crate::{Hash, manifest::Tensor, testing::Random};

    fn file(path: &str, size: u64, tensors: &[(&str, u64, u64)]) -> manifest::File {
        manifest::File {
            path: path.to_owned(),
            size,
            blake3: Hash::of(path.as_bytes()),
            sha256: [0; 32],
            tensors: tensors
                .iter()
                .map(|(name, start, end)| Tensor {
                    name: (*name).to_owned(),
                    dtype: "U8".to_owned(),
                    shape: vec![end - start],
                    start: *start,
                    end: *end,
                    blake3: Hash::of(format!("{path} {name} {start} {end}").as_bytes()),
                })
                .collect(),
        }
    }

    fn selection(files: &[&str], tensors: &[&str]) -> Selection {
        let parse = |patterns: &[&str]| patterns.iter().map(|p| p.parse().unwrap()).collect();
        Selection {
            files: parse(files),
            tensors: parse(tensors),
        }
    }

    fn model() -> Manifest {
        Manifest::new(vec![
            file("config.json", 600, &[]),
            file("empty", 0, &[]),
            file(
                "m.gguf",
                400_000,
                &[("blk.0.w", 1000, 1100), ("blk.1.w", 200_000, 300_000)],
            ),
            file(
                "model-1.safetensors",
                1_000_000,
                &[
                    ("model.layers.0.a", 800, 1000),
                    ("model.layers.0.b", 1000, 70_000),
                    ("model.layers.1.a", 70_000, 140_000),
                    ("model.layers.1.none", 140_000, 140_000),
                    ("model.layers.2.a", 140_000, 1_000_000),
                ],
            ),
            file(
                "model-2.safetensors",
                2000,
                &[("norm", 100, 2000), ("none", 2000, 2000)],
            ),
            file("onnx/config.json", 5, &[]),
        ])
        .unwrap()
    }

    fn at(selected: &Selected, file: usize) -> (&[usize], Range<u64>, &[Range<u64>]) {
        match &selected.get(file).unwrap().wanted {
            Wanted::Tensors {
                tensors,
                header,
                ranges,
            } => (tensors, header.clone(), ranges),
            Wanted::Whole => panic!("the file is wanted whole"),
        }
    }

    #[test]
    fn without_patterns_everything_is_wanted() {
        let model = model();
        let selected = Selection::default().select(&model).unwrap();
        assert_eq!(selected.files().len(), 6);
        assert!(selected.files().iter().all(|f| f.wanted == Wanted::Whole));
        assert_eq!(selected.bytes(), model.size());
        assert_eq!(selected.groups(0), [0..1]);
        assert_eq!(selected.groups(1), [0..1]);
        assert_eq!(selected.get(1).unwrap().ranges(), []);
        assert_eq!(selected.groups(2), [0..7]);
        assert_eq!(selected.groups(6), []);
    }

    #[test]
    fn selected_files_are_wanted_whole_and_of_other_files_the_tensors_and_the_header() {
        let selected = selection(
            &["*.json", "model-2.*"],
            &["model.layers.{0..1}.*", "blk.1.*"],
        )
        .select(&model())
        .unwrap();
        let whole: Vec<usize> = selected
            .files()
            .iter()
            .filter(|f| f.wanted == Wanted::Whole)
            .map(|f| f.file)
            .collect();
        assert_eq!(whole, [0, 4, 5]);
        assert_eq!(
            at(&selected, 3),
            (&[0, 1, 2, 3][..], 0..800, &[0..140_000][..])
        );
        assert_eq!(at(&selected, 2), (&[1][..], 0..0, &[200_000..300_000][..]));
        assert_eq!(selected.groups(2), [3..5]);
        assert_eq!(selected.groups(3), [0..3]);
        assert_eq!(selected.get(1), None);
        assert_eq!(selected.bytes(), 600 + 100_000 + 140_000 + 2000 + 5);
    }

    #[test]
    fn file_patterns_select_no_tensors_and_tensor_patterns_no_whole_files() {
        let selected = selection(&["*.json"], &[]).select(&model()).unwrap();
        assert_eq!(selected.files().len(), 2);
        let selected = selection(&[], &["norm", "model.layers.2.a"])
            .select(&model())
            .unwrap();
        assert_eq!(at(&selected, 3).2, [0..800, 140_000..1_000_000]);
        assert_eq!(selected.groups(3), [0..1, 2..16]);
        assert_eq!(at(&selected, 4).2, [0..2000]);
        let selected = selection(&[], &["none"]).select(&model()).unwrap();
        assert_eq!(at(&selected, 4), (&[1][..], 0..100, &[0..100][..]));
    }

    #[test]
    fn a_file_with_only_empty_tensors_is_all_header() {
        let model = Manifest::new(vec![file(
            "m.safetensors",
            500,
            &[("a", 500, 500), ("b", 500, 500)],
        )])
        .unwrap();
        let selected = selection(&[], &["a"]).select(&model).unwrap();
        assert_eq!(at(&selected, 0), (&[0][..], 0..500, &[0..500][..]));
    }

    #[test]
    fn a_tensor_pattern_that_matches_only_in_whole_files_counts_as_matched() {
        selection(&["model-2*"], &["norm"])
            .select(&model())
            .unwrap();
    }

    fn missed(files: &[&str], tensors: &[&str]) -> (&'static str, String, Vec<String>) {
        match selection(files, tensors).select(&model()) {
            Err(SelectionError::NoMatch {
                what,
                pattern,
                close,
            }) => (what, pattern, close),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_reported_with_similar_names() {
        let (what, pattern, close) = missed(&["*.json", "Config.jsn"], &[]);
        assert_eq!((what, pattern.as_str()), ("file", "Config.jsn"));
        assert_eq!(close[..2], ["config.json", "onnx/config.json"]);
        let (what, _, close) = missed(&[], &["norm", "model.layer.1.*"]);
        assert_eq!(what, "tensor");
        assert_eq!(
            close,
            [
                "model.layers.1.a",
                "model.layers.1.none",
                "model.layers.0.a"
            ]
        );
        assert_eq!(missed(&[], &["*.layers.7.*"]).2.len(), 3);
        assert_eq!(missed(&[], &["§§§§"]).2, [""; 0]);
        let error = selection(&[], &["nrm"]).select(&model()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no tensor of the model matches \"nrm\"; similar names: \"none\", \"norm\""
        );
    }

    #[test]
    fn results_with_the_same_path_are_refused() {
        let model = Manifest::new(vec![
            file("x.gguf", 100, &[("a", 0, 10)]),
            file("x.safetensors", 100, &[("a", 50, 60), ("b", 60, 100)]),
        ])
        .unwrap();
        let refused = |files: &[&str], tensors: &[&str]| {
            matches!(
                selection(files, tensors).select(&model),
                Err(SelectionError::Clash(_))
            )
        };
        assert!(refused(&[], &["a"]));
        assert!(refused(&["*.safetensors"], &["a"]));
        assert!(!refused(&["*.gguf"], &["a"]));
        assert!(!refused(&[], &["b"]));
    }

    #[test]
    fn hostile_manifests_give_errors_or_disjoint_ranges_within_the_file() {
        let model = Manifest::new(vec![file(
            "m.safetensors",
            1 << 40,
            &[("a", 1 << 39, 1 << 40)],
        )])
        .unwrap();
        assert!(matches!(
            selection(&[], &["a"]).select(&model),
            Err(SelectionError::Header { bytes, .. }) if bytes == 1 << 39
        ));
        assert!(selection(&["*"], &["a"]).select(&model).is_ok());

        let mut random = Random(1);
        for _ in 0..500 {
            let size = random.below(1_000_000) as u64;
            let names: Vec<String> = (0..1 + random.below(20)).map(|i| format!("t{i}")).collect();
            // Tensors of a manifest never overlap: offsets in order, in pairs.
            let mut places: Vec<u64> = (0..2 * names.len())
                .map(|_| random.below(size as usize + 1) as u64)
                .collect();
            places.sort_unstable();
            places.dedup();
            let tensors: Vec<(&str, u64, u64)> = names
                .iter()
                .zip(places.chunks_exact(2))
                .map(|(name, place)| (name.as_str(), place[0], place[1]))
                .collect();
            let path = ["m.gguf", "m.safetensors"][random.below(2)];
            let model = Manifest::new(vec![file(path, size, &tensors)]).unwrap();
            let selected = selection(&[], &["t?", "t0*"]).select(&model).unwrap();
            let (chosen, header, ranges) = at(&selected, 0);
            assert!(ranges.is_sorted_by(|a, b| a.end < b.start));
            assert!(ranges.iter().all(|r| r.start < r.end && r.end <= size));
            let parts = chosen.iter().map(|i| tensors[*i].1..tensors[*i].2);
            let wanted: Vec<_> = parts.chain([header]).filter(|r| !r.is_empty()).collect();
            let mut groups = BTreeSet::new();
            for part in &wanted {
                assert!(
                    ranges
                        .iter()
                        .any(|r| r.start <= part.start && part.end <= r.end)
                );
                groups.extend(part.start / GROUP..=(part.end - 1) / GROUP);
            }
            let merged = selected.groups(0);
            assert!(merged.is_sorted_by(|a, b| a.end < b.start));
            assert!(merged.into_iter().flatten().eq(groups));
        }
    }

    #[test]
    fn selecting_and_suggesting_among_hundreds_of_thousands_of_tensors_takes_seconds() {
        let tensors: Vec<Tensor> = (0..400_000)
            .map(|i| Tensor {
                name: format!("model.layers.{}.mlp.experts.{i}.w", i / 10_000),
                dtype: String::new(),
                shape: Vec::new(),
                start: 1000 + i,
                end: 1001 + i,
                blake3: Hash::of(b"of one byte"),
            })
            .collect();
        let model = Manifest::new(vec![manifest::File {
            tensors,
            ..file("m.safetensors", 2_000_000, &[])
        }])
        .unwrap();
        let began = Instant::now();
        let selected = selection(&[], &["model.layers.{0..11}.*", "*.experts.399999.w"])
            .select(&model)
            .unwrap();
        assert_eq!(at(&selected, 0).0.len(), 120_001);
        assert_eq!(at(&selected, 0).2, [0..121_000, 400_999..401_000]);
        let (what, close) = match selection(&[], &["*.expert.77.w"]).select(&model) {
            Err(SelectionError::NoMatch { what, close, .. }) => (what, close),
            other => panic!("{other:?}"),
        };
        assert_eq!((what, close.len()), ("tensor", 3));
        // Takes a second or two; the rest is for a busy machine.
        assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
    }

    #[test]
    fn too_many_patterns_are_refused() {
        let pattern: Pattern = "norm".parse().unwrap();
        let many = Selection {
            files: Vec::new(),
            tensors: vec![pattern; MAX_PATTERNS + 1],
        };
        assert!(matches!(
            many.select(&model()),
            Err(SelectionError::TooManyPatterns("tensor"))
        ));
    }
}
