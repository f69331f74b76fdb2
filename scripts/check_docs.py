"""Checks what the documents say against the repository: links, anchors, file names, commands, settings, Python names.

    python scripts/check_docs.py        # one line a problem; exits with 1 where there is one

- Every relative link of README.md, CONTRIBUTING.md, CHANGELOG.md, docs/*.md and scripts/*/README.md leads to a file,
  every anchor to a heading.
- Every name in backticks or in a block of code that looks like a file of the repository is one. `folder/x.py` may also
  mean train_loop/folder/x.py, and a bare `x.py` any file of that name.
- Every `train-loop X` is a command, every `--option` behind it one of its options, every `--section.key` and every
  `section.key` in backticks a setting. This part asks `python -m train_loop --help`, and is left out where that does
  not run.
- Every module that a Python example imports from train_loop exists, and so does every name that it takes from it.
- Every message in the first column of docs/troubleshooting.md is one of the package's own; "…" stands for any text.

Names of files, modules and what they hold are also checked in the docstrings and comments of train_loop/.

In a table whose head begins with "old", the first column holds names that are gone; they are not looked for.
It reads files and imports nothing but the standard library.
"""

import argparse
import ast
import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOP = ("train_loop/", "scripts/", "tests/", "configs/", "docs/", ".ci/")
SUFFIXES = (".py", ".sh", ".json", ".jsonl", ".yaml", ".html", ".txt", ".md")
FOREIGN = {"run_clm.py", "run_clm_no_trainer.py", "train.py"}  # files of Transformers and of nanoGPT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
CODE = re.compile(r"(`+)(.+?)\1")
FENCE = re.compile(r"^\s*(```+|~~~+)\s*(\w*)")
FILE = re.compile(r"^[\w.*/-]+$")
KEY = re.compile(r"^--([a-z]\w*\.[a-z][\w.]*)")


class Line(NamedTuple):
    """A line of a document; language is that of the block of code it stands in, None outside of one."""

    number: int
    text: str
    language: str | None


class Commands(NamedTuple):
    """What `train-loop` takes: the options of each command, and all settings."""

    options: dict[str, set[str]]
    settings: set[str]

    def knows(self, key: str) -> bool:
        """Whether a key is a setting or lies below one that holds a mapping, as model.architecture does."""
        return any(key == each or key.startswith(f"{each}.") for each in self.settings)


def documents(root: Path) -> list[Path]:
    """What is checked."""
    names = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [
        path
        for path in [*names, *sorted(root.glob("docs/*.md")), *sorted(root.glob("scripts/*/README.md"))]
        if path.is_file()
    ]


def lines(path: Path) -> Iterator[Line]:
    """The lines of a document, without what is not looked at."""
    fence, language, old = "", "", False
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = FENCE.match(text)
        if found and (not fence or (found[1].startswith(fence) and not found[2])):
            fence, language = ("", "") if fence else (found[1], found[2])
            continue
        if not fence:
            old = text.startswith("|") and (old or text.lower().startswith("| old"))
            if old:
                text = re.sub(r"^\|.*?(?<!\\)\|", "|", text)
        yield Line(number, text, language if fence else None)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: set[str] = set()
    for line in lines(path):
        if line.language is None and (heading := re.match(r"^#+\s+(.*?)\s*#*$", line.text)):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            n = 1
            while (name := slug if n == 1 else f"{slug}-{n - 1}") in found:
                n += 1
            found.add(name)
    return found


def wrong_links(path: Path) -> Iterator[tuple[int, str]]:
    """Links that lead nowhere."""
    for line in lines(path):
        if line.language is not None:
            continue
        for match in LINK.finditer(CODE.sub("", line.text)):
            link = match[1] or match[2]
            if re.match(r"^[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name) if name else path
            if not target.exists():
                yield line.number, f"the link {link} leads to no file"
            elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
                yield line.number, f"the link {link} leads to no heading"


def code(line: Line) -> list[str]:
    """The code of a line: all of it inside of a block, else what stands in backticks."""
    return [line.text] if line.language is not None else [match[2] for match in CODE.finditer(line.text)]


def wrong_files(path: Path, files: set[str]) -> Iterator[tuple[int, str]]:
    """Names that look like a file of the repository, and are none."""
    for line in lines(path):
        for text in code(line):
            for word in re.split(r"[\s=,;()\[\]'\"]+", text):
                word = word.strip(":`").removeprefix("./")
                if FILE.match(word) and not _is_there(word, line.language is not None, files):
                    yield line.number, f"there is no {word}"


def _is_there(word: str, block: bool, files: set[str]) -> bool:
    """Whether a word is a file of the repository, or does not look like one."""
    if word.startswith(TOP):
        name = word.rstrip("/")
        return any(fnmatch.fnmatch(each, name) or each.startswith(f"{name}/") for each in files)
    if not word.endswith((".py", ".sh")) or "*" in word or block or word in FOREIGN:
        return True
    if "/" in word:
        return word in files or f"train_loop/{word}" in files
    return any(each.rpartition("/")[2] == word for each in files)


def wrong_commands(path: Path, commands: Commands) -> Iterator[tuple[int, str]]:
    """Commands, options and settings that do not exist."""
    sections = {key.partition(".")[0] for key in commands.settings}
    calling, continued = "", False
    for line in lines(path):
        calling = calling if continued and line.language is not None else ""
        continued = line.text.rstrip().endswith("\\")
        for text in code(line):
            words = text.split(" #")[0].split()
            if line.language is None:
                calling = ""
            for n, word in enumerate(words):
                before = words[n - 1] if n else ""
                if before in ("train-loop", ".venv/bin/train-loop") or (before == "train_loop" and "-m" in words[:n]):
                    if re.match(r"^[a-z]+$", word) and word not in commands.options:
                        yield line.number, f"there is no command train-loop {word}"
                    calling = word if word in commands.options else ""
                elif (key := KEY.match(word)) and key[1] != "section.key":
                    if not commands.knows(key[1]):
                        yield line.number, f"there is no setting {key[1]}"
                elif calling and (option := re.match(r"^--[a-z]\w*", word)):
                    if option[0] not in commands.options[calling]:
                        yield line.number, f"train-loop {calling} has no option {option[0]}"
            key = re.match(r"^([a-z]\w*)\.[a-z]\w*(\.\w+)*(?=[:\s]|$)", text) if line.language is None else None
            if key and key[1] in sections and not key[0].endswith(SUFFIXES) and not commands.knows(key[0]):
                yield line.number, f"there is no setting {key[0]}"


def wrong_imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """What Python examples take from train_loop, and what is not there."""
    face = root / "train_loop" / "__init__.py"
    said = face.read_text(encoding="utf-8") if face.is_file() else ""
    for line in lines(path):
        if line.language not in ("python", "py", "pycon") and path.suffix != ".py":
            continue
        if found := re.match(r"^\W*(?:from|import) (train_loop(?:\.\w+)*)(?: import (.*))?", line.text):
            module = root.joinpath(*found[1].split("."))
            source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            if not source.is_file():
                yield line.number, f"there is no module {found[1]}"
                continue
            text = source.read_text(encoding="utf-8")
            for name in re.findall(r"(?:^|,)[\s(]*(\w+)", (found[2] or "").split("#")[0]):
                if not re.search(rf"\b{name}\b", text) and not (module / f"{name}.py").is_file():
                    yield line.number, f"{found[1]} has no {name}"
        if path.suffix == ".py":
            continue
        for name in re.findall(r"(?<![\w.])train_loop\.(\w+)", line.text):
            place = root / "train_loop" / name
            if not re.search(rf"\b{name}\b", said) and not (place.is_dir() or place.with_suffix(".py").is_file()):
                yield line.number, f"train_loop has no {name}"


def wrong_messages(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Messages that the package does not have."""
    if path.name != "troubleshooting.md":
        return
    said = []
    for source in sorted((root / "train_loop").rglob("*.py")):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        said += [each for each in strings if isinstance(each, str)]
    for line in lines(path):
        if line.language is None and (message := re.match(r"^\| `([^`]+)` \|", line.text)):
            for part in filter(None, (each.strip() for each in message[1].split("…"))):
                if not any(part in each for each in said):
                    yield line.number, f"no message says: {part}"


def asked(root: Path) -> Commands | None:
    """The commands, their options and the settings, as `--help` tells them; None where it does not run."""

    def told(*arguments: str) -> str:
        command = [sys.executable, "-m", "train_loop", *arguments, "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, timeout=120).stdout

    try:
        names = re.findall(r"^  (\w+) {2,}", told(), re.MULTILINE)
        helps = {name: told(name) for name in names}
    except (OSError, subprocess.SubprocessError):
        return None
    found = set(re.findall(r"^\s*--(\w+\.[\w.]+)", helps.get("train", ""), re.MULTILINE))
    return Commands({name: {*re.findall(r"--\w+", text), "--help"} for name, text in helps.items()}, found)


def tracked(root: Path) -> set[str]:
    """The names of the repository's files."""
    skipped = re.compile(r"(^|/)(\.venv[^/]*|\.git|__pycache__|site|runs|build|\.\w+_cache)(/|$)")
    names = (each.relative_to(root).as_posix() for each in root.rglob("*") if each.is_file())
    return {name for name in names if not skipped.search(name)}


def problems(root: Path) -> Iterator[str]:
    """Everything that is wrong, one line each."""
    files, commands = tracked(root), asked(root)
    if commands is None:
        print("check_docs: train_loop does not run here, so no command and no setting was checked", file=sys.stderr)
    for path in documents(root):
        found = [*wrong_links(path), *wrong_files(path, files), *wrong_imports(path, root), *wrong_messages(path, root)]
        if commands is not None:
            found += wrong_commands(path, commands)
        yield from (f"{path.relative_to(root)}:{number}: {problem}" for number, problem in sorted(set(found)))
    for path in sorted((root / "train_loop").rglob("*.py")):
        found = [*wrong_files(path, files), *wrong_imports(path, root)]
        yield from (f"{path.relative_to(root)}:{number}: {problem}" for number, problem in sorted(set(found)))


def main() -> int:
    """Print what is wrong; 1 where there is something."""
    parser = argparse.ArgumentParser(description="Check the documents against the repository.")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    found = [*problems(parser.parse_args().root)]
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
