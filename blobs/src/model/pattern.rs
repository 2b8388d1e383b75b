//! Patterns for the names of files and tensors, in the style of a shell: `*.json`, `model.layers.{0..11}.*`.
//!
//! A pattern is compiled once into a small automaton. The automaton reads a name character by character and keeps the
//! set of states that it may be in. So a match takes at most (characters of the name) × (parts of the pattern) steps.
//! The bound matters because names come from strangers: forty stars can keep a backtracking matcher busy for years.

use std::{fmt, str::FromStr};

/// The longest pattern, in bytes.
pub const MAX_LENGTH: usize = 1024;

/// The most parts of a compiled pattern. A byte of a pattern becomes one or two parts, and a range of numbers becomes a
/// few for each digit. Only a long list of wide ranges reaches this limit.
pub const MAX_PARTS: usize = 4096;

/// The deepest nesting of braces.
pub const MAX_DEPTH: usize = 8;

/// The most digits of a bound of a range of numbers. Any number of 18 digits fits into a `u64`.
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
/// | `{00001..00012}` | the same with as many digits as the longer bound, because one bound begins with a zero |
/// | `\` | the next character as it stands |
///
/// All other characters match themselves; case matters. A character is a Unicode scalar value.
///
/// As in a `.gitignore`, a pattern without `/` is matched against a file's name in any folder. A pattern with `/` is
/// matched against the whole path: `*.json` matches `onnx/config.json`, but `onnx/*.json` does not match
/// `a/onnx/config.json`. A `/` at the start stands for the model's folder: `/*.json` matches only `config.json`. A
/// pattern does not match a folder; the content of `onnx` is `onnx/**`. A tensor's name is always matched as a whole,
/// and `/` in it has no special meaning.
#[derive(Clone)]
pub struct Pattern {
    source: String,
    program: Vec<Op>,
    /// Text at the beginning of every match.
    prefix: String,
    /// Text at the end of every match.
    suffix: String,
    /// True if the pattern is only `prefix`.
    literal: bool,
    /// True if the pattern contains a literal `/`.
    has_slash: bool,
    /// The runs of literal text in the pattern.
    runs: Vec<String>,
}

/// The reason why a text is not a valid pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid pattern {pattern:?} at byte {at}: {reason}")]
pub struct PatternError {
    /// The text, cut after 200 characters.
    pub pattern: String,
    /// Offset of the error in the text, in bytes.
    pub at: usize,
    /// The kind of error.
    pub reason: PatternReason,
}

/// An error at a position in a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatternReason {
    /// The pattern is empty, and would match nothing.
    #[error("it is empty")]
    Empty,
    /// The pattern is longer than [`MAX_LENGTH`].
    #[error("it is longer than {MAX_LENGTH} bytes")]
    TooLong,
    /// The pattern has more than [`MAX_PARTS`] parts.
    #[error("it has more than {MAX_PARTS} parts; split it into several patterns")]
    TooManyParts,
    /// Braces are nested deeper than [`MAX_DEPTH`].
    #[error("its braces are nested more than {MAX_DEPTH} levels deep")]
    TooDeep,
    /// A `{` without its `}`.
    #[error("this `{{` is never closed; write `\\{{` for the character")]
    UnclosedBrace,
    /// A `}` without its `{`.
    #[error("this `}}` was never opened; write `\\}}` for the character")]
    UnopenedBrace,
    /// Empty braces.
    #[error("there is nothing between these braces")]
    EmptyBraces,
    /// A range whose bounds are not two decimal numbers.
    #[error("a range needs two decimal numbers, as in `{{0..11}}`; write `\\.` for literal dots")]
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
    /// The bounds of a class are in the wrong order.
    #[error("the first character of this range comes after its last")]
    ReversedClass,
    /// A named class such as `[:digit:]`.
    #[error("classes have no names here; write `[0-9]` for `[[:digit:]]`")]
    NamedClass,
    /// A backslash at the end of the pattern.
    #[error("the pattern ends with a backslash; write `\\\\` for the character")]
    LoneBackslash,
}

/// A part of a pattern, as written.
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

/// A state of the automaton, and its transitions. Targets are always later states, so following them ends.
#[derive(Debug, Clone)]
enum Op {
    /// The given character leads to the next state.
    Char(char),
    /// Any character leads to the next state.
    One,
    /// A character of the class leads to the next state.
    Class(Class),
    /// Any character leads back to this state; the next state is reached without a character.
    Run {
        /// True if `/` in a path counts as well.
        crosses: bool,
    },
    /// The next state and the target are reached without a character.
    Split(usize),
    /// As `Split`, but the target is reached in paths only.
    SplitInPaths(usize),
    /// The target is reached without a character.
    Jump(usize),
    /// The end of a match.
    Match,
}

/// The kind of a name, which decides the meaning of `/` in it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Path,
    Tensor,
}

impl Pattern {
    /// Returns true if the pattern matches the path of a file, separated by `/`. A pattern without `/` is matched
    /// against the last component only.
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

    /// Returns true if the pattern matches the whole name of a tensor.
    pub fn matches_tensor(&self, name: &str) -> bool {
        if self.literal {
            return name == self.prefix;
        }
        name.starts_with(&self.prefix)
            && name.ends_with(&self.suffix)
            && self.run(name, Kind::Tensor)
    }

    /// Returns the pattern as written.
    pub fn as_str(&self) -> &str {
        &self.source
    }

    /// Returns the text at the beginning of every match; empty if the pattern does not begin with literal text.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Returns the runs of literal text in the pattern, in order.
    pub(crate) fn runs(&self) -> &[String] {
        &self.runs
    }

    fn run(&self, text: &str, kind: Kind) -> bool {
        let slash_ends = |c| kind == Kind::Path && c == '/';
        let mut now = StateSet::new(self.program.len());
        let mut next = StateSet::new(self.program.len());
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

/// A set of states.
struct StateSet {
    list: Vec<usize>,
    /// For each state, the last round in which it was reached.
    reached: Vec<u64>,
    round: u64,
    /// States still to be followed; kept to reuse its memory.
    stack: Vec<usize>,
}

impl StateSet {
    fn new(states: usize) -> Self {
        Self {
            list: Vec::new(),
            reached: vec![0; states],
            round: 1,
            stack: Vec::new(),
        }
    }

    fn clear(&mut self) {
        self.list.clear();
        self.round += 1;
    }

    /// Adds a state, and all states that it reaches without a character.
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
        // A leading slash anchors the pattern to the model's folder; the paths themselves have no leading slash.
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
    /// Compares the patterns as written: two spellings of the same pattern are not equal.
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

/// Parses a pattern from left to right. An error has a position and a reason.
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

    /// Returns the character after a backslash at `at`.
    fn escaped(&mut self, at: usize) -> Result<char, Refusal> {
        self.next().ok_or((at, PatternReason::LoneBackslash))
    }

    /// Parses parts up to the end; within braces, up to the `,` or `}` that ends the alternative. `starts` is true if a
    /// path component begins here.
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

    /// Parses the rest of a class after the `[` at `open`.
    fn class(&mut self, open: usize) -> Result<Class, Refusal> {
        let unclosed = (open, PatternReason::UnclosedClass);
        let negated = self.eat("!") || self.eat("^");
        let mut ranges = Vec::new();
        loop {
            let at = self.at;
            let first = match self.next().ok_or(unclosed)? {
                // Directly after the opening bracket, `]` is a member, as in every shell.
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

    /// Parses the rest of a brace expression after the `{` at `open`.
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
                // A sequence ends only at `,`, at `}` or at the end.
                Some(_) => break,
                None => return Err((open, PatternReason::UnclosedBrace)),
            }
        }
        self.depth -= 1;
        Ok(Node::Any(alternatives))
    }

    /// Parses a range of numbers with its closing brace, if the alternative at this position is one.
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

/// Returns a node for the decimal numbers between two bounds of at most [`MAX_DIGITS`] digits, given in any order.
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

/// Returns nodes for the numbers from `low` to `high`, which have the same number of digits. Numbers that share the
/// first digit with a bound are restricted further; for those in between, the other digits are free.
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
