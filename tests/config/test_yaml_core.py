"""YAML 1.2's core schema, as its tables have it; keys that are given twice; files that would take too much."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from train_loop.config.parsing import parse_yaml
from train_loop.config.yaml_core import as_python, dump_yaml, read_yaml
from train_loop.errors import InputError

# Section 10.3.2 of the specification (https://yaml.org/spec/1.2.2/#1032-tag-resolution), and its example 10.8.
CORE: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    "0": 0,
    "-0": 0,
    "0o7": 7,
    "0o10": 8,
    "0x3A": 58,
    "0xff": 255,
    "0x10": 16,
    "-19": -19,
    "+5": 5,
    "010": 10,
    "0.": 0.0,
    "-0.0": -0.0,
    ".5": 0.5,
    "+12e03": 12_000.0,
    "-2E+05": -200_000.0,
    "1e3": 1000.0,
    "1.5E-3": 0.0015,
    "1e-05": 1e-05,
    "0.0005": 0.0005,
    "08": 8,
    "09.5": 9.5,
    "1_000": "1_000",
    "1:30": "1:30",
    "0b1": "0b1",
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **{word: word for word in ("yes", "No", "on", "off", "y", "nULL", "tRUE", "0o8", "-0x1", "+0o7", "0xG", "0O7")},
    **{word: word for word in ("2024-01-01", "2001-12-14t21:59:43.10-05:00", "190:20:30.15", "1e", "e3", "-", ".")},
    **{word: word for word in ("=", "+.nan", "inf", "nan", ".iNF", "- ", "1.2.3", "1,000", "~x", "\u0663", "1 000")},
}


def value(text: str) -> Any:
    return as_python(parse_yaml(text, "file: "))


@pytest.mark.parametrize("text", CORE, ids=ascii)
def test_the_core_schema_is_whole(text: str) -> None:
    text = text.strip()
    found = value(f"key: {text}" if text != "-" else "key: '-'")["key"]
    expected = CORE[text] if text in CORE else text
    assert found == expected and type(found) is type(expected), (text, found)
    if not isinstance(expected, str):
        assert value(f"'{text}'") == value(f'"{text}"') == value(f"!!str {text}") == text


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_what_is_not_a_number_is_a_float(text: str) -> None:
    assert math.isnan(value(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: not valid YAML (a is given twice, first in line 1"),
        ("m:\n  a: 1\n  'a': 2", "line 3, column 3: not valid YAML (a is given twice, first in line 2"),
        (
            "- {a: 1}\n- {a: 1, b: {c: 1,\n c: 2}}",
            "line 3, column 2: not valid YAML (c is given twice, first in line 2",
        ),
        ("a: &x {b: 1, b: 2}", "b is given twice"),
        (
            "a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x",
            "line 4, column 3: not valid YAML (<< is given twice, first in line 3",
        ),
        ("1: a\n0x1: b", "0x1 is given twice, first in line 1"),
        ("? {a: 1, a: 2}\n: b", "a is given twice"),
        ("[a]: 1", "unhashable"),
    ],
)
def test_a_key_that_is_given_twice_is_an_error_with_both_lines(text: str, expected: str) -> None:
    with pytest.raises(InputError, match=r"^file: [^\n]*$") as error:
        parse_yaml(text, "file: ")
    assert expected in str(error.value)


def test_merge_keys_fill_in_what_is_missing() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: [*b, *a], y: 3}\nd: {<<: *b}\n'<<': 1"
    assert value(text) == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 2, "y": 1},
        "c": {"x": 2, "y": 3},
        "d": {"x": 2, "y": 1},
        "<<": 1,
    }
    assert value("a: <<") == {"a": "<<"}


LAUGHS = "a: &a [l, l, l, l, l, l, l, l, l]\n" + "".join(
    f"{chr(99 + n)}: &{chr(99 + n)} [{', '.join([f'*{chr(98 + n) if n else chr(97)}'] * 9)}]\n" for n in range(12)
).replace("*b", "*a")
HOSTILE: dict[str, tuple[str, str]] = {
    "a billion laughs": (LAUGHS, "more than 30,000 values, with aliases written out"),
    "merges of merges": (LAUGHS.replace("[l, l, l, l, l, l, l, l, l]", "{l: 1}").replace("&", "&m"), "alias"),
    "an alias to itself": ("a: &a [1, *a]", "the alias *a stands within what it repeats"),
    "an alias to nothing": ("a: *b", "undefined alias"),
    "deep in brackets": ("[" * 100_000, "nested more than 50 levels"),
    "deep in lines": ("\n".join(" " * n + "a:" for n in range(1000)), "nested more than 50 levels"),
    "many values": ("[" + "1," * 300_000 + "]", "more than 30,000 values"),
    "a large text": ("a: " + "b" * (1 << 20), "characters; settings have at most"),
    "a tab": ("a:\n\tb: 1", "line 2, column 1: not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "another document"),
    "an object of Python": ("a: !!python/object/apply:os.system [ls]", "unknown tag !!python/object/apply:os.system"),
    "a tag of one's own": ("a: !mine 1", "unknown tag !mine"),
    "a tag of YAML 1.1": ("a: !!binary aGk=", "unknown tag !!binary"),
    "a set": ("a: !!set {b, c}", "unknown tag !!set"),
    "a word that is no number": ("a: !!int no", "'no' is no int"),
    "a number of 1.1": ("a: !!int 1_000", "'1_000' is no int"),
    "no number of 1.2": ("a: !!float 0x10", "line 1"),
    "a mapping as a number": ("a: !!int {b: 1}", "line 1"),
    "NUL": ("a: 1\nb: \0", "line 2: not valid YAML (the character U+0000)"),
    "a bell": ("a: \a", "U+0007"),
    "no character": (r'a: "\UFFFFFFFF"', "line 1: not valid YAML"),
    "half a pair": (r'a: "\ud800"', "half a surrogate pair"),
    "10^5000": (f"a: {10**4000}0" + "0" * 1000, "a number of 5,002 digits"),
    "16^5000": (f"a: 0x{'f' * 5000}", "a number of 5,002 digits"),
    "another version": ("%YAML 2.0\n---\na: 1", "version"),
    "no end of a quote": ("a: 'b", "line 1"),
    "merging a word": ("a: {<<: b}", "line 1"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_text_is_refused_early_in_one_line(case: str) -> None:
    text, expected = HOSTILE[case]
    began = time.process_time()
    with pytest.raises(InputError, match=r"^file: [^\n]*$") as error:
        parse_yaml(text, "file: ")
    assert time.process_time() - began < 20
    assert expected in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: 1".encode("utf-16"), "UTF-16"),
        ("a: 1".encode("utf-16-be"), "U+0000"),
        (bytes(range(256)) * 9, "not UTF-8 at byte 128"),
        (b"\x80\x04\x95", "not UTF-8 at byte 0"),
        (b"a: 1\n" * 300_000, "larger than 1,048,576 bytes"),
        (b"\x7fELF\x00", "not valid YAML"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        read_yaml(str(tmp_path / "a.yaml"))
    assert expected in str(error.value)


def test_files_that_never_end_are_refused() -> None:
    with pytest.raises(InputError, match=r"/dev/zero: larger than"):
        read_yaml("/dev/zero")
    assert read_yaml("/dev/null") == {}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfrun: {seed: 1}\r\n")
    assert read_yaml(str(tmp_path / "a.yaml")) == {"run": {"seed": 1}}


# Words that either version of YAML, or Python, takes for something else.
WORDS = st.sampled_from(
    [*CORE, "<<", "012", "0o17", "12:30:45", "y", "1e5", "!!int", "&a", "*a", "#", " a ", "a\n\nb\n"]
)
TEXTS = WORDS | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(2), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_what_is_written_is_read_back(values: dict[str, Any]) -> None:
    assert repr(as_python(parse_yaml(dump_yaml(values), ""))) == repr(values)


@settings(max_examples=100)
@given(st.lists(NUMBERS | st.booleans() | st.none() | st.sampled_from(["yes", "010", "no", "1:30", "~", "a b", "0.5"])))
def test_what_0_1_0_wrote_reads_the_same(values: list[Any]) -> None:
    """PyYAML 1.1 wrote the configurations of earlier runs."""
    text = yaml.safe_dump({"values": values, "rate": 1e-05}, sort_keys=False, allow_unicode=True)
    assert value(text) == yaml.safe_load(text)


@settings(max_examples=100)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), VALUES, max_size=3))
def test_json_is_yaml(values: dict[str, Any]) -> None:
    text = json.dumps(values, default=str)
    if "Infinity" not in text and r"\ud" not in text and r"\u007f" not in text:
        assert value(text) == json.loads(text)
