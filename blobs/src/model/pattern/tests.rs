//! Tests of patterns: the grammar, and comparison with a slow reference matcher.

use std::time::{Duration, Instant};

use super::*;
use crate::testing::Random;

fn pattern(source: &str) -> Pattern {
    source.parse().unwrap_or_else(|error| panic!("{error}"))
}

fn paths(source: &str, yes: &[&str], no: &[&str]) {
    let pattern = pattern(source);
    for path in yes {
        assert!(pattern.matches_path(path), "{source} should match {path}");
    }
    for path in no {
        assert!(!pattern.matches_path(path), "{source} matched {path}");
    }
}

fn tensors(source: &str, yes: &[&str], no: &[&str]) {
    let pattern = pattern(source);
    for name in yes {
        assert!(pattern.matches_tensor(name), "{source} should match {name}");
    }
    for name in no {
        assert!(!pattern.matches_tensor(name), "{source} matched {name}");
    }
}

fn refused(source: &str) -> (usize, PatternReason) {
    match source.parse::<Pattern>() {
        Ok(_) => panic!("{source} was accepted"),
        Err(error) => (error.at, error.reason),
    }
}

#[test]
fn a_pattern_without_special_characters_matches_only_itself() {
    tensors(
        "model.norm.weight",
        &["model.norm.weight"],
        &[
            "model.norm.weight2",
            "xmodel.norm.weight",
            "modelxnorm.weight",
            "Model.norm.weight",
            "",
        ],
    );
    paths(
        "config.json",
        &["config.json", "onnx/config.json"],
        &["config-json", "xconfig.json", "config.json/x"],
    );
}

#[test]
fn a_pattern_without_a_slash_matches_in_any_folder_and_one_with_a_slash_only_at_its_path() {
    paths(
        "*.json",
        &["config.json", "a/b/config.json", ".json"],
        &["config.jsonl", "x.json/y"],
    );
    paths(
        "onnx/*.json",
        &["onnx/config.json"],
        &["a/onnx/config.json", "onnx/a/config.json", "config.json"],
    );
    paths("/*.json", &["config.json"], &["onnx/config.json"]);
    paths("/config.json", &["config.json"], &["onnx/config.json"]);
    paths(
        "onnx/**",
        &["onnx/a", "onnx/a/b"],
        &["onnx", "a/onnx/b", "onnxx/a"],
    );
    paths(
        "**/a.json",
        &["a.json", "x/a.json", "x/y/a.json"],
        &["xa.json"],
    );
    paths("x/**/a", &["x/a", "x/y/a", "x/y/z/a"], &["xa", "x/ya"]);
    paths("{x,y}/a", &["x/a", "y/a"], &["z/x/a"]);
    paths("{**/,}b/a", &["b/a", "c/b/a"], &["cb/a"]);
    paths("x**z", &["xz", "a/xyz"], &["x/z/y"]);
}

#[test]
fn only_two_stars_match_a_slash_in_a_path() {
    paths("a/?", &["a/b"], &["a//", "a/b/c"]);
    paths("a?b/c", &["axb/c"], &["a/b/c"]);
    paths("a[!x]b/c", &["ayb/c"], &["a/b/c", "axb/c"]);
    paths("a/x**z", &["a/xz", "a/x/y/z"], &["a/x/y"]);
    tensors("a?b", &["a/b", "axb"], &["ab"]);
    tensors("a*b", &["a/x/b", "ab"], &["a"]);
    tensors("a**b", &["a/x/b", "ab"], &["a"]);
    tensors("**/a", &["x/a", "/a", "x/y/a"], &["a", "xa"]);
}

#[test]
fn ranges_match_their_numbers_in_one_spelling() {
    let pattern = pattern("model.layers.{0..11}.*");
    for layer in 0..200 {
        assert_eq!(
            pattern.matches_tensor(&format!("model.layers.{layer}.mlp")),
            layer <= 11
        );
        assert!(!pattern.matches_tensor(&format!("model.layers.0{layer}.mlp")));
    }
    assert!(!pattern.matches_tensor("model.layers..mlp"));
    tensors(
        "x{00001..00012}y",
        &["x00001y", "x00009y", "x00012y"],
        &["x1y", "x00000y", "x00013y", "x000001y", "x0001y"],
    );
    tensors(
        "{08..110}",
        &["008", "099", "110"],
        &["08", "8", "007", "111", "0110"],
    );
    tensors("{3..1}", &["1", "2", "3"], &["0", "4"]);
    tensors("{7..7}", &["7"], &["6", "07"]);
    tensors("{0..0}", &["0"], &["00", ""]);
    tensors("{{0..3},7,x*}", &["0", "3", "7", "xyz"], &["4", "77"]);
    tensors(
        "{1..999999999999999999}",
        &["1", "999999999999999999"],
        &["0", "1000000000000000000"],
    );
}

#[test]
fn small_ranges_match_exactly_their_numbers() {
    let mut random = Random(1);
    for _ in 0..300 {
        let (a, b) = (random.below(1200), random.below(1200));
        let plain = pattern(&format!("{{{a}..{b}}}"));
        let padded = pattern(&format!("{{{a:05}..{b}}}"));
        for n in 0..1300 {
            let inside = (a.min(b)..=a.max(b)).contains(&n);
            assert_eq!(plain.matches_tensor(&n.to_string()), inside, "{plain} {n}");
            assert_eq!(padded.matches_tensor(&format!("{n:05}")), inside);
            assert!(n >= 10_000 || !padded.matches_tensor(&n.to_string()));
        }
    }
}

#[test]
fn classes_alternatives_and_escapes() {
    tensors("[a-c]x", &["ax", "cx"], &["dx", "x", "aax"]);
    tensors("[!a-c]", &["d", "-"], &["a", ""]);
    tensors("[^a]", &["b"], &["a"]);
    tensors("[]a-]", &["]", "a", "-"], &["b"]);
    tensors("[\\]\\-x]", &["]", "-", "x"], &["\\"]);
    tensors("[重-量]?", &["重み"], &["あみ"]);
    tensors(
        "a{b,c*,{d,e}f,}g",
        &["abg", "acxyg", "adfg", "aefg", "ag", "acg"],
        &["adg", "ab"],
    );
    tensors("{a}", &["a"], &["{a}"]);
    tensors("{..,a}", &["..", "a"], &[]);
    tensors("\\{a\\,b\\}\\*\\\\", &["{a,b}*\\"], &["a*\\"]);
    tensors("a,b]", &["a,b]"], &["a", "b]"]);
    tensors("{a\\,b,c}", &["a,b", "c"], &["a", "b"]);
    tensors("{0\\..3,x}", &["0..3"], &["0", "1"]);
    tensors("?", &["é", "模", "🦀"], &["e\u{301}", ""]);
}

#[test]
fn bad_patterns_are_refused_with_position_and_reason() {
    use PatternReason::*;
    for (source, at, reason) in [
        ("", 0, Empty),
        ("ab{c", 2, UnclosedBrace),
        ("ab{c,{d}", 2, UnclosedBrace),
        ("é}", 2, UnopenedBrace),
        ("a{}", 1, EmptyBraces),
        ("{a..c}", 1, BadRange),
        ("{1..}", 1, BadRange),
        ("{-1..2}", 1, BadRange),
        ("{0..9..2}", 1, BadRange),
        ("x{0..3,7}", 2, RangeInList),
        ("x{7,0..3}", 4, RangeInList),
        ("{0..1234567890123456789}", 1, TooManyDigits),
        ("x[ab", 1, UnclosedClass),
        ("[]", 0, UnclosedClass),
        ("[!]", 0, UnclosedClass),
        ("[a-", 0, UnclosedClass),
        ("[xc-a]", 2, ReversedClass),
        ("[[:digit:]]", 1, NamedClass),
        ("ab\\", 2, LoneBackslash),
        ("[\\", 1, LoneBackslash),
        ("{{{{{{{{{a}}}}}}}}}", 8, TooDeep),
    ] {
        assert_eq!(refused(source), (at, reason), "{source}");
    }
    assert!("{{{{{{{{a}}}}}}}}".parse::<Pattern>().is_ok());
    assert!("a".repeat(MAX_LENGTH).parse::<Pattern>().is_ok());
    assert_eq!(refused(&"a".repeat(MAX_LENGTH + 1)), (MAX_LENGTH, TooLong));
    assert_eq!(refused(&"{".repeat(MAX_LENGTH)).1, TooDeep);
    let wide = "{123456789123456789..987654321987654321}".repeat(25);
    assert_eq!(refused(&wide).1, TooManyParts);
    let error = "a{".parse::<Pattern>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid pattern \"a{\" at byte 1: this `{` is never closed; write `\\{` for the character"
    );
}

#[test]
fn a_pattern_is_shown_as_written() {
    let written = "a/{x,y}*[!b]\\?{00..12}";
    let pattern = pattern(written);
    assert_eq!(pattern.to_string(), written);
    assert_eq!(pattern.to_string().parse::<Pattern>().unwrap(), pattern);
    assert_eq!(format!("{pattern:?}"), format!("Pattern({written:?})"));
}

#[test]
fn hostile_patterns_and_names_take_milliseconds() {
    let name = "a".repeat(1000);
    for source in [
        "*a".repeat(200),
        "**a".repeat(200),
        "{a,aa}".repeat(100),
        "{a,a*}".repeat(100),
        "{,a}".repeat(150),
        "{*,{*,{*,{*,*a}b}c}d}".repeat(20),
        "?*".repeat(300),
    ] {
        // A class: with a literal letter, the suffix check would reject the name before the first step.
        let pattern = pattern(&(source.clone() + "[b]"));
        assert!(pattern.prefix.is_empty() && pattern.suffix.is_empty());
        let began = Instant::now();
        assert!(!pattern.matches_tensor(&name));
        assert!(!pattern.matches_path(&name));
        // Generous, for a busy machine; an exponential match would take longer than the age of the universe.
        assert!(began.elapsed() < Duration::from_secs(2), "{source}");
    }
}

#[test]
fn no_text_makes_parsing_or_matching_panic() {
    let alphabet: Vec<char> = "ab/*?[]{},.0129!^-\\é模".chars().collect();
    let mut random = Random(2);
    let mut accepted = 0;
    for _ in 0..50_000 {
        let source = random.text(&alphabet, 24);
        let name = random.text(&alphabet, 12);
        if let Ok(pattern) = source.parse::<Pattern>() {
            accepted += 1;
            pattern.matches_path(&name);
            pattern.matches_tensor(&name);
        }
    }
    assert!(accepted > 1000);
}

/// Returns all texts that a pattern with braces and without ranges stands for.
fn expand(source: &str) -> Vec<String> {
    let Some(open) = source.find('{') else {
        return vec![source.to_owned()];
    };
    let (mut depth, mut from, mut choices) = (0, open + 1, Vec::new());
    for (at, c) in source.char_indices().skip_while(|(at, _)| *at < open) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if (c == ',' && depth == 1) || depth == 0 {
            choices.push(&source[from..at]);
            from = at + 1;
        }
        if depth == 0 {
            break;
        }
    }
    choices
        .iter()
        .flat_map(|choice| expand(&format!("{}{choice}{}", &source[..open], &source[from..])))
        .collect()
}

/// Matches by backtracking. With `path`, a star does not match `/`.
fn slow(pattern: &[u8], text: &[u8], path: bool) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', rest @ ..] => {
            let crosses = rest.first() == Some(&b'*');
            slow(rest, text, path)
                || (!text.is_empty()
                    && (crosses || !path || text[0] != b'/')
                    && slow(pattern, &text[1..], path))
        }
        [b'?', rest @ ..] => {
            !text.is_empty() && (!path || text[0] != b'/') && slow(rest, &text[1..], path)
        }
        [c, rest @ ..] => text.first() == Some(c) && slow(rest, &text[1..], path),
    }
}

#[test]
fn matches_equal_those_of_a_backtracking_matcher() {
    let mut random = Random(3);
    let (mut tried, mut matched) = (0, 0);
    while tried < 20_000 {
        let source = random.text(&['a', 'b', '*', '?', '{', ',', '}'], 10);
        let Ok(pattern) = source.parse::<Pattern>() else {
            continue;
        };
        tried += 1;
        let name = random.text(&['a', 'b', ',', '/'], 6);
        let expected = expand(&source)
            .iter()
            .any(|source| slow(source.as_bytes(), name.as_bytes(), false));
        assert_eq!(pattern.matches_tensor(&name), expected, "{source} {name}");
        matched += usize::from(expected);
    }
    assert!(matched > 500, "{matched}");
    for _ in 0..20_000 {
        let source = format!("x/{}", random.text(&['a', 'b', '*', '?'], 8));
        let path = format!("x/{}", random.text(&['a', 'b', '/'], 6));
        let expected = slow(source.as_bytes(), path.as_bytes(), true);
        assert_eq!(
            pattern(&source).matches_path(&path),
            expected,
            "{source} {path}"
        );
    }
}
