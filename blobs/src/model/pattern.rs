//! Patterns for the names of files and tensors, as a shell writes them: `*.json`, `model.layers.{0..11}.*`.
//!
//! A pattern is compiled once into a small automaton that reads a name character by character and holds a set of places
//! where it may be. So a match takes at most (characters of the name) × (parts of the pattern) steps, whatever both say: names
//! come from strangers, and a matcher that tries one way after another can be kept busy for years by forty stars.

use std::{fmt, str::FromStr};

/// The longest pattern, in bytes.
pub const MAX_LENGTH: usize = 1024;

/// The most parts of a compiled pattern. A byte of a pattern becomes one or two parts; a range of numbers becomes a few for each
/// digit, so only a long list of wide ranges comes here.
pub const MAX_PARTS: usize = 4096;

/// How deep braces may be nested.
pub const MAX_DEPTH: usize = 8;

/// The most digits of a bound of a range of numbers: what fits into a `u64` whatever the digits are.
pub const MAX_DIGITS: usize = 18;

/// A pattern for the paths of files or the names of tensors.
///
/// | Written | Matches |
/// |---|---|
/// | `*` | any run of characters, also none; in a path, none of them `/` |
/// | `**` | in a path, any run of characters with `/` among them; in a tensor's name, the same as `*` |
/// | `**/` | at the start of a path's component: any number of folders, also none |
/// | `?` | one character; in a path, not `/` |
/// | `[a-cx]`, `[!a-c]` | one character of these, or none of these; in a path, not `/`; `[^a-c]` is `[!a-c]` |
/// | `{a,b,c*}` | any of the alternatives, which are patterns themselves, nested up to [`MAX_DEPTH`] deep |
/// | `{0..11}` | a number of the range, bounds included, in decimal without leading zeros |
/// | `{00001..00012}` | the same with exactly as many digits as the longer bound, because one bound begins with a zero |
/// | `\` | the next character as it stands |
///
/// Everything else matches itself; case matters. A character is a Unicode scalar value.
///
/// As in a `.gitignore`, a pattern without `/` is matched against a file's name in any folder, and a pattern with `/` anywhere
/// against the whole path: `*.json` matches `onnx/config.json`, `onnx/*.json` does not match `a/onnx/config.json`. A `/` at the
/// start stands for the model's folder: `/*.json` matches `config.json` alone. A pattern does not match a folder: what
/// lies in `onnx` is `onnx/**`. A tensor's name is always matched whole, and `/` in it is a character like others.
#[derive(Clone)]
pub struct Pattern {
    source: String,
    program: Vec<Op>,
    /// What every match begins with.
    prefix: String,
    /// What every match ends with.
    suffix: String,
    /// There is nothing else than `prefix`.
    literal: bool,
    /// A `/` is among what it matches literally.
    has_slash: bool,
    /// The texts that stand in it literally.
    runs: Vec<String>,
}

/// Why a text is not a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the pattern {pattern:?} is refused at byte {at}: {reason}")]
pub struct PatternError {
    /// The text, cut after 200 characters.
    pub pattern: String,
    /// Where in the text, in bytes from its start.
    pub at: usize,
    /// What is wrong there.
    pub reason: PatternReason,
}

/// What is wrong at a place in a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatternReason {
    /// It is empty, and would match nothing.
    #[error("it is empty")]
    Empty,
    /// It is longer than [`MAX_LENGTH`].
    #[error("it is longer than {MAX_LENGTH} bytes")]
    TooLong,
    /// It has more than [`MAX_PARTS`] parts.
    #[error("it has more than {MAX_PARTS} parts; split it into several patterns")]
    TooManyParts,
    /// Braces are nested deeper than [`MAX_DEPTH`].
    #[error("its braces are nested more than {MAX_DEPTH} deep")]
    TooDeep,
    /// A `{` without its `}`.
    #[error("this `{{` is never closed; write `\\{{` for the character")]
    UnclosedBrace,
    /// A `}` without its `{`.
    #[error("this `}}` was never opened; write `\\}}` for the character")]
    UnopenedBrace,
    /// Nothing between `{` and `}`.
    #[error("there is nothing between these braces")]
    EmptyBraces,
    /// Something else than two decimal numbers around the `..` of a range.
    #[error(
        "a range is two decimal numbers, as in `{{0..11}}`; write `\\.` for dots in a name of its own"
    )]
    BadRange,
    /// A bound with more than [`MAX_DIGITS`] digits.
    #[error("a bound of a range has more than {MAX_DIGITS} digits")]
    TooManyDigits,
    /// A range among other alternatives, where a shell would take it as text.
    #[error("a range among alternatives needs its own braces, as in `{{{{0..3}},7}}`")]
    RangeInList,
    /// A `[` without its `]`.
    #[error("this `[` is never closed; write `\\[` for the character")]
    UnclosedClass,
    /// Bounds of a class in the wrong order.
    #[error("the first character of this range comes after its last")]
    ReversedClass,
    /// A named class such as `[:digit:]`.
    #[error("classes have no names here; write `[0-9]` for `[[:digit:]]`")]
    NamedClass,
    /// A backslash with nothing behind it.
    #[error("a backslash stands at the end; write `\\\\` for the character")]
    LoneBackslash,
}

/// A part of a pattern as it is written.
enum Node {
    Char(char),
    One,
    Class(Class),
    Run {
        crosses: bool,
    },
    /// `**/` at the start of a component.
    Folders,
    Any(Vec<Vec<Node>>),
}

#[derive(Debug, Clone)]
struct Class {
    negated: bool,
    ranges: Vec<(char, char)>,
}

impl Class {
    fn digits(first: u8, last: u8) -> Node {
        if first == last {
            return Node::Char(first.into());
        }
        Node::Class(Self {
            negated: false,
            ranges: vec![(first.into(), last.into())],
        })
    }

    fn has(&self, c: char) -> bool {
        self.ranges.iter().any(|(a, b)| (*a..=*b).contains(&c)) != self.negated
    }
}

/// A place in the automaton and what leads on from it. Targets are always ahead, so following them ends.
#[derive(Debug, Clone)]
enum Op {
    /// This character leads to the next place.
    Char(char),
    /// Any character does.
    One,
    /// One of a class does.
    Class(Class),
    /// Any character leads here again; the next place is reached without one.
    Run {
        /// In a path, `/` too.
        crosses: bool,
    },
    /// The next place and this one are reached without a character.
    Split(usize),
    /// The same, the target in paths only.
    SplitInPaths(usize),
    /// This place is reached without a character.
    Jump(usize),
    /// The end of a match.
    Match,
}

/// What a name is, which decides what `/` in it means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Path,
    Tensor,
}

impl Pattern {
    /// Whether the pattern matches the `/`-separated path of a file: its last component if the pattern has no `/`, else all of it.
    pub fn matches_path(&self, path: &str) -> bool {
        let text = if self.has_slash {
            path
        } else {
            path.rsplit('/').next().unwrap_or(path)
        };
        if self.literal {
            return text == self.prefix.strip_prefix('/').unwrap_or(&self.prefix);
        }
        (self.prefix.starts_with('/') || text.starts_with(&self.prefix))
            && text.ends_with(&self.suffix)
            && self.run(text, Kind::Path)
    }

    /// Whether the pattern matches the whole name of a tensor.
    pub fn matches_tensor(&self, name: &str) -> bool {
        if self.literal {
            return name == self.prefix;
        }
        name.starts_with(&self.prefix)
            && name.ends_with(&self.suffix)
            && self.run(name, Kind::Tensor)
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.source
    }

    /// The text that every match begins with; empty if the pattern begins with something else.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The texts that stand in the pattern literally, in its order.
    pub(crate) fn runs(&self) -> &[String] {
        &self.runs
    }

    fn run(&self, text: &str, kind: Kind) -> bool {
        let slash_ends = |c| kind == Kind::Path && c == '/';
        let mut now = Places::new(self.program.len());
        let mut next = Places::new(self.program.len());
        now.reach(&self.program, 0, kind);
        for c in text.chars() {
            if now.list.is_empty() {
                return false;
            }
            next.clear();
            for at in &now.list {
                let leads_to = match &self.program[*at] {
                    Op::Char(wanted) if *wanted == c => at + 1,
                    Op::One if !slash_ends(c) => at + 1,
                    Op::Class(class) if !slash_ends(c) && class.has(c) => at + 1,
                    Op::Run { crosses } if *crosses || !slash_ends(c) => *at,
                    _ => continue,
                };
                next.reach(&self.program, leads_to, kind);
            }
            std::mem::swap(&mut now, &mut next);
        }
        now.has(self.program.len() - 1)
    }
}

/// A set of places, each once.
struct Places {
    list: Vec<usize>,
    /// For each place, the last round in which it was reached.
    reached: Vec<u64>,
    round: u64,
    /// Places still to be followed; kept for its memory.
    stack: Vec<usize>,
}

impl Places {
    fn new(places: usize) -> Self {
        Self {
            list: Vec::new(),
            reached: vec![0; places],
            round: 1,
            stack: Vec::new(),
        }
    }

    fn clear(&mut self) {
        self.list.clear();
        self.round += 1;
    }

    /// Adds a place, and all that is reached from it without a character.
    fn reach(&mut self, program: &[Op], at: usize, kind: Kind) {
        self.stack.push(at);
        while let Some(at) = self.stack.pop() {
            if self.reached[at] == self.round {
                continue;
            }
            self.reached[at] = self.round;
            match program[at] {
                Op::Split(target) => self.stack.extend([at + 1, target]),
                Op::SplitInPaths(target) if kind == Kind::Path => {
                    self.stack.extend([at + 1, target]);
                }
                Op::SplitInPaths(_) => self.stack.push(at + 1),
                Op::Jump(target) => self.stack.push(target),
                Op::Run { .. } => {
                    self.list.push(at);
                    self.stack.push(at + 1);
                }
                Op::Char(_) | Op::One | Op::Class(_) | Op::Match => self.list.push(at),
            }
        }
    }

    fn has(&self, at: usize) -> bool {
        self.reached[at] == self.round
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(source: &str) -> Result<Self, PatternError> {
        let refuse = |(at, reason)| PatternError {
            pattern: source.chars().take(200).collect(),
            at,
            reason,
        };
        if source.is_empty() {
            return Err(refuse((0, PatternReason::Empty)));
        }
        if source.len() > MAX_LENGTH {
            return Err(refuse((MAX_LENGTH, PatternReason::TooLong)));
        }
        let mut parser = Parser {
            source,
            at: 0,
            depth: 0,
        };
        let nodes = parser.sequence(true).map_err(refuse)?;
        let mut program = Vec::new();
        // A leading slash says where to look; paths do not have it.
        if let Some(Node::Char('/')) = nodes.first() {
            program.push(Op::SplitInPaths(2));
        }
        compile(&nodes, &mut program)
            .and_then(|()| push(&mut program, Op::Match))
            .map_err(|reason| refuse((0, reason)))?;
        let literal = |node: &Node| match node {
            Node::Char(c) => Some(*c),
            _ => None,
        };
        let prefix: String = nodes.iter().map_while(literal).collect();
        let suffix: Vec<char> = nodes.iter().rev().map_while(literal).collect();
        let mut runs = Vec::new();
        literals(&nodes, &mut runs);
        Ok(Self {
            source: source.to_owned(),
            literal: prefix.chars().count() == nodes.len(),
            has_slash: has_slash(&nodes),
            program,
            prefix,
            suffix: suffix.into_iter().rev().collect(),
            runs,
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pattern").field(&self.source).finish()
    }
}

impl PartialEq for Pattern {
    /// Written the same; patterns that are written in two ways and match the same are not equal.
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for Pattern {}

fn push(program: &mut Vec<Op>, op: Op) -> Result<(), PatternReason> {
    if program.len() == MAX_PARTS {
        return Err(PatternReason::TooManyParts);
    }
    program.push(op);
    Ok(())
}

fn compile(nodes: &[Node], program: &mut Vec<Op>) -> Result<(), PatternReason> {
    for node in nodes {
        match node {
            Node::Char(c) => push(program, Op::Char(*c))?,
            Node::One => push(program, Op::One)?,
            Node::Class(class) => push(program, Op::Class(class.clone()))?,
            Node::Run { crosses } => push(program, Op::Run { crosses: *crosses })?,
            Node::Folders => {
                let after = program.len() + 3;
                push(program, Op::SplitInPaths(after))?;
                push(program, Op::Run { crosses: true })?;
                push(program, Op::Char('/'))?;
            }
            Node::Any(alternatives) => {
                let mut jumps = Vec::with_capacity(alternatives.len());
                let Some((last, others)) = alternatives.split_last() else {
                    continue;
                };
                for alternative in others {
                    let split = program.len();
                    push(program, Op::Split(0))?;
                    compile(alternative, program)?;
                    jumps.push(program.len());
                    push(program, Op::Jump(0))?;
                    program[split] = Op::Split(program.len());
                }
                compile(last, program)?;
                let end = program.len();
                for jump in jumps {
                    program[jump] = Op::Jump(end);
                }
            }
        }
    }
    Ok(())
}

fn has_slash(nodes: &[Node]) -> bool {
    nodes.iter().any(|node| match node {
        Node::Char(c) => *c == '/',
        Node::Folders => true,
        Node::Any(alternatives) => alternatives.iter().any(|nodes| has_slash(nodes)),
        Node::One | Node::Class(_) | Node::Run { .. } => false,
    })
}

/// Collects the runs of literal characters.
fn literals(nodes: &[Node], runs: &mut Vec<String>) {
    let mut run = String::new();
    for node in nodes {
        if let Node::Char(c) = node {
            run.push(*c);
            continue;
        }
        if !run.is_empty() {
            runs.push(std::mem::take(&mut run));
        }
        if let Node::Any(alternatives) = node {
            for alternative in alternatives {
                literals(alternative, runs);
            }
        }
    }
    if !run.is_empty() {
        runs.push(run);
    }
}

/// Reads a pattern from left to right. Errors are a place and what is wrong there.
struct Parser<'a> {
    source: &'a str,
    at: usize,
    depth: usize,
}

type Refusal = (usize, PatternReason);

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest().chars().next()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, text: &str) -> bool {
        let eaten = self.rest().starts_with(text);
        if eaten {
            self.at += text.len();
        }
        eaten
    }

    /// The character behind a backslash at `at`.
    fn escaped(&mut self, at: usize) -> Result<char, Refusal> {
        self.next().ok_or((at, PatternReason::LoneBackslash))
    }

    /// Parts up to the end, or within braces to the `,` or `}` that ends the alternative. `starts` says that a path's component
    /// begins here.
    fn sequence(&mut self, starts: bool) -> Result<Vec<Node>, Refusal> {
        let mut nodes = Vec::new();
        loop {
            let at = self.at;
            if self.depth > 0 && self.rest().starts_with([',', '}']) {
                return Ok(nodes);
            }
            let Some(c) = self.next() else {
                return Ok(nodes);
            };
            let starts = match nodes.last() {
                None => starts,
                Some(node) => matches!(node, Node::Char('/') | Node::Folders),
            };
            nodes.push(match c {
                '\\' => Node::Char(self.escaped(at)?),
                '?' => Node::One,
                '[' => Node::Class(self.class(at)?),
                '{' => self.braces(at, starts)?,
                '}' => return Err((at, PatternReason::UnopenedBrace)),
                '*' => {
                    let mut crosses = false;
                    while self.eat("*") {
                        crosses = true;
                    }
                    if crosses && starts && self.eat("/") {
                        Node::Folders
                    } else {
                        Node::Run { crosses }
                    }
                }
                c => Node::Char(c),
            });
        }
    }

    /// What follows a `[` at `open`.
    fn class(&mut self, open: usize) -> Result<Class, Refusal> {
        let unclosed = (open, PatternReason::UnclosedClass);
        let negated = self.eat("!") || self.eat("^");
        let mut ranges = Vec::new();
        loop {
            let at = self.at;
            let first = match self.next().ok_or(unclosed)? {
                // Right behind the bracket it is a member, as in every shell.
                ']' if !ranges.is_empty() => return Ok(Class { negated, ranges }),
                '[' if self.rest().starts_with(':') => {
                    return Err((at, PatternReason::NamedClass));
                }
                '\\' => self.escaped(at)?,
                c => c,
            };
            let mut last = first;
            if self.rest().starts_with('-') && !self.rest().starts_with("-]") {
                self.eat("-");
                let at = self.at;
                last = match self.next().ok_or(unclosed)? {
                    '\\' => self.escaped(at)?,
                    c => c,
                };
            }
            if first > last {
                return Err((at, PatternReason::ReversedClass));
            }
            ranges.push((first, last));
        }
    }

    /// What follows a `{` at `open`.
    fn braces(&mut self, open: usize, starts: bool) -> Result<Node, Refusal> {
        if self.depth == MAX_DEPTH {
            return Err((open, PatternReason::TooDeep));
        }
        if self.rest().starts_with('}') {
            return Err((open, PatternReason::EmptyBraces));
        }
        self.depth += 1;
        let mut alternatives = Vec::new();
        loop {
            if let Some(range) = self.range(alternatives.is_empty())? {
                self.depth -= 1;
                return Ok(range);
            }
            alternatives.push(self.sequence(starts)?);
            match self.next() {
                Some(',') => {}
                // Only these two and the end stop a sequence.
                Some(_) => break,
                None => return Err((open, PatternReason::UnclosedBrace)),
            }
        }
        self.depth -= 1;
        Ok(Node::Any(alternatives))
    }

    /// A range of numbers, if the alternative that begins here is one; it takes the closing brace with it.
    fn range(&mut self, is_first: bool) -> Result<Option<Node>, Refusal> {
        let at = self.at;
        let rest = self.rest();
        let Some(end) = rest.find(['{', '}', ',', '\\', '[', '*', '?']) else {
            return Ok(None);
        };
        let Some((first, last)) = rest[..end].split_once("..") else {
            return Ok(None);
        };
        let alone = is_first && rest[end..].starts_with('}');
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match (alone, is_number(first) && is_number(last)) {
            (true, true) => {}
            (true, false) => return Err((at, PatternReason::BadRange)),
            (false, true) if rest[end..].starts_with([',', '}']) => {
                return Err((at, PatternReason::RangeInList));
            }
            (false, _) => return Ok(None),
        }
        if first.len().max(last.len()) > MAX_DIGITS {
            return Err((at, PatternReason::TooManyDigits));
        }
        self.at += end + 1;
        Ok(Some(numbers(first, last)))
    }
}

/// The decimal numbers from one bound to the other, of at most [`MAX_DIGITS`] digits each, in whatever order the bounds are.
fn numbers(first: &str, last: &str) -> Node {
    let value = |text: &str| {
        text.bytes()
            .fold(0_u64, |value, digit| value * 10 + u64::from(digit - b'0'))
    };
    let low = value(first).min(value(last));
    let high = value(first).max(value(last));
    let is_padded = |text: &str| text.len() > 1 && text.starts_with('0');
    if is_padded(first) || is_padded(last) {
        let width = first.len().max(last.len());
        let digits = |value| format!("{value:0width$}");
        return Node::Any(vec![of_width(
            digits(low).as_bytes(),
            digits(high).as_bytes(),
        )]);
    }
    let mut alternatives = Vec::new();
    for width in 1..=MAX_DIGITS as u32 {
        let smallest = if width == 1 { 0 } else { 10_u64.pow(width - 1) };
        let (low, high) = (low.max(smallest), high.min(10_u64.pow(width) - 1));
        if low <= high {
            alternatives.push(of_width(
                low.to_string().as_bytes(),
                high.to_string().as_bytes(),
            ));
        }
    }
    Node::Any(alternatives)
}

/// The numbers from `low` to `high`, which have the same number of digits: those that share the first digit with a bound are
/// bounded further, those between take any digits.
fn of_width(low: &[u8], high: &[u8]) -> Vec<Node> {
    let (Some((l, low_rest)), Some((h, high_rest))) = (low.split_first(), high.split_first())
    else {
        return Vec::new();
    };
    if l == h {
        let mut nodes = vec![Node::Char((*l).into())];
        nodes.extend(of_width(low_rest, high_rest));
        return nodes;
    }
    let zeros = vec![b'0'; low_rest.len()];
    let nines = vec![b'9'; low_rest.len()];
    let mut alternatives = Vec::new();
    let (mut from, mut to) = (*l, *h);
    if low_rest != zeros {
        from += 1;
        let mut nodes = vec![Node::Char((*l).into())];
        nodes.extend(of_width(low_rest, &nines));
        alternatives.push(nodes);
    }
    if high_rest != nines {
        to -= 1;
        let mut nodes = vec![Node::Char((*h).into())];
        nodes.extend(of_width(&zeros, high_rest));
        alternatives.push(nodes);
    }
    if from <= to {
        let mut nodes = vec![Class::digits(from, to)];
        nodes.extend(low_rest.iter().map(|_| Class::digits(b'0', b'9')));
        alternatives.push(nodes);
    }
    if alternatives.len() == 1 {
        return alternatives.remove(0);
    }
    vec![Node::Any(alternatives)]
}

#[cfg(test)]
mod tests;
