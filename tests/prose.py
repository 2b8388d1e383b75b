#!/usr/bin/env python3
"""Checks the prose of the project: what a person reads is plain, and fits a window of 120 columns.

    tests/prose.py              check all files of the repository; exit 1 if there is a finding
    tests/prose.py --count      print the number of findings of each kind instead
    tests/prose.py FILE...      check these files

Three rules:

- A line has at most 120 columns. Tables and lines that hold nothing but a link or an image are excepted.
- A sentence of a comment, of a schema or of a Markdown paragraph does not begin with Who, Whom, Whose, Whoever, What,
  Whatever, Where, Which, How or Whether, unless it is a question. It begins with a noun or a verb.
- Words that docs/glossary.md replaces, in its section "Words that are not used", do not occur.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 120
OPENERS = r"(?:Who|Whom|Whose|Whoever|Whomever|What|Whatever|Where|Wherever|Which|Whichever|How|Whether)"
# At the begin of a text, or after the end of a sentence.
OPENING = re.compile(rf"(?:^|(?<=[.!?]) +){OPENERS}\b(?P<rest>[^.!?]*)(?P<end>[.!?]|$)")
COMMENT = re.compile(r"^\s*(///|//!|//)( ?)(.*)$")
SUFFIXES = {".rs", ".md", ".proto", ".py", ".sh", ".toml"}
# The words are listed in the glossary, and this file names the openers.
SKIPPED = {"docs/glossary.md", "tests/prose.py"}
LINK = re.compile(r"^\s*(?:[-*>|] *)?(?:\[[^\]]*\]:? *\(?)?<?(?:https?://|!\[)\S+\)?\S*$")


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        scripts = name in {"tests/run", "tests/interop/run", ".ci/run"}
        if name and (path.suffix in SUFFIXES or scripts) and path.is_file() and not path.is_symlink():
            yield path


def replaced_words():
    words, inside = [], False
    for line in (ROOT / "docs/glossary.md").read_text().splitlines():
        if line.startswith("#"):
            inside = line.strip("# ").lower() == "words that are not used"
        elif inside and (match := re.match(r"^\| `([^`]+)` \| (.+?) \|$", line)):
            words.append((re.compile(rf"(?<![\w/-]){match[1]}(?![\w/-])", re.IGNORECASE), match[1], match[2]))
    if not words:
        sys.exit("tests/prose.py: docs/glossary.md has no words in its section \"Words that are not used\"")
    return words


def without_code(text):
    """The text with the words in backquotes blanked: they are names, not prose."""
    return re.sub(r"`[^`]*`", lambda code: "`" + "x" * (len(code[0]) - 2) + "`", text)


def rust_paragraphs(lines):
    """Paragraphs of comments, as (line number, text)."""
    number, kind, text = 0, None, []
    for at, line in enumerate(lines, 1):
        match = COMMENT.match(line)
        content = match[3] if match else ""
        begins_item = content.lstrip().startswith(("- ", "* ", "#", "|", "```"))
        if not match or match[1] != kind or not content.strip() or begins_item:
            if text:
                yield number, " ".join(text)
            number, kind, text = at, match[1] if match else None, []
        if match and content.strip():
            if not text:
                number = at
            text.append(content.strip().lstrip("-*# "))
    if text:
        yield number, " ".join(text)


def markdown_paragraphs(lines):
    number, text, fenced = 0, [], False
    for at, line in enumerate(lines, 1):
        fence = line.lstrip().startswith("```")
        if fence:
            fenced = not fenced
        outside = fenced or fence or not line.strip() or line.lstrip().startswith(("#", "|", "<", ">"))
        begins_item = re.match(r"^\s*(?:[-*]|\d+\.) ", line)
        if (outside or begins_item) and text:
            yield number, " ".join(text)
            text = []
        if not outside:
            if not text:
                number = at
            text.append(re.sub(r"^\s*(?:[-*]|\d+\.) +", "", line).strip().lstrip("*"))
    if text:
        yield number, " ".join(text)


def findings_of(path, words):
    name = path.relative_to(ROOT).as_posix()
    lines = path.read_text(errors="replace").splitlines()
    for at, line in enumerate(lines, 1):
        is_table = path.suffix == ".md" and line.lstrip().startswith("|")
        if len(line) > COLUMNS and not is_table and not LINK.match(line):
            yield name, at, "column", f"{len(line)} columns"
    if name in SKIPPED:
        return
    prose = path.suffix in {".rs", ".proto", ".md"}
    if prose:
        paragraphs = markdown_paragraphs(lines) if path.suffix == ".md" else rust_paragraphs(lines)
        for at, text in paragraphs:
            for match in OPENING.finditer(without_code(text)):
                if match["end"] != "?":
                    begin = match[0].strip()
                    yield name, at, "opener", f'a sentence begins with "{begin[:40]}"'
    for at, line in enumerate(lines, 1):
        if path.suffix in {".rs", ".py", ".toml"}:
            # Texts and comments. A string of one word is a name.
            line = " ".join(re.findall(r'"(?:[^"\\]|\\.)*\s(?:[^"\\]|\\.)*"|(?://|#).*', line))
        for pattern, word, instead in words:
            if pattern.search(without_code(line)):
                yield name, at, "word", f'"{word}": use {instead}'


def main():
    arguments = sys.argv[1:]
    count = "--count" in arguments
    named = [Path(argument).resolve() for argument in arguments if not argument.startswith("-")]
    words = replaced_words()
    counts = {"column": 0, "opener": 0, "word": 0}
    for path in named or tracked():
        for name, at, kind, finding in findings_of(path, words):
            counts[kind] += 1
            if not count:
                print(f"{name}:{at}: {finding}")
    if count:
        print(", ".join(f"{kind}: {number}" for kind, number in counts.items()))
    elif any(counts.values()):
        print(f"tests/prose.py: {sum(counts.values())} findings; the rules are at the top of that file")
        sys.exit(1)


if __name__ == "__main__":
    main()
