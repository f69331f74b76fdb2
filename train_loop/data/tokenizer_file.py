"""Load a tokenizer as its tokenizer.json describes it, and refuse one whose class makes something else of that file.

Transformers chooses a class by tokenizer_config.json, or by the model's type. Some classes take no more than the
entries of tokenizer.json and split text in their own way, so a class of another family gives other token ids without a
word. What the file says counts: classes without a way of their own are loaded from it, others must agree with it.
"""

import os
import re
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from train_loop.config import paths
from train_loop.errors import InputError, one_line
from train_loop.trust import find, read_json

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
PLAIN = "PreTrainedTokenizerFast"
"""The class that all versions of Transformers know, and that does what tokenizer.json says."""
_PLAIN_CLASSES = {PLAIN, "TokenizersBackend", "PreTrainedTokenizer"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # an entry for a single byte
PROBES = (
    "The quick brown fox jumps over the lazy dog. THE QUICK Brown foX",
    " begins and ends with a space ",
    "it's I'll we've DON'T he'd they're rock'n'roll",
    "0 12 345 6789 31415926 3.14 1,000,000 0x1F 1e-5",
    "two  three   four    five     spaces",
    "\n\n \n\t\ttabs\tand\r\nlines\n\n\n",
    "na\u00efve caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \u0130stanbul \ufb01ne \u00bd \u2460",
    "\u4f60\u597d\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u03ba\u03cc\u03c3\u03bc\u03b5 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e",
    "\U0001f99c\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f4bb \u2764\ufe0f",
    "def f(x, *y):\n    return x**2 != [a.b['c']] # {}~^|\\ <a href=\"#\">&amp;</a>\n",
    "$5.00 100% -- ... ?! \u2026 \u201cquotes\u201d \u2014 a_b_c a/b/c.py me@example.org",
    "\x00\x07\x1b\x7f\u00a0\u00ad\u200b\u2028\u3000\ufeff\ufffd",
    "<s>[INST] </s> <unk> [CLS] [MASK] \u2581 \u0120 \u010a ##ing @@",
)
"""Texts of many kinds, which classes split and normalise in different ways."""


def load(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer in a folder or repository.

    Raises InputError if there is none, if a file is damaged, or if class and settings are not those of tokenizer.json.
    """
    where = f"tokenizer {name}"
    settings = read_json(where, name, _SETTINGS) or {}
    path, content = find(name, _FILE), read_json(where, name, _FILE)
    plain = path is not None and is_plain(settings.get("tokenizer_class"))
    file = None if path is None or plain else _core(where, path)
    loader: Any = PreTrainedTokenizerFast if plain else transformers.AutoTokenizer  # which brings torch along
    try:
        tokenizer = loader.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the core raises plain exceptions, and classes whatever their files lack
        if path is not None:
            _core(where, path)  # is it the file's fault?
        missing = "" if path is not None or not os.path.isdir(name) else f"has no {_FILE}, and "
        problem = f"{missing}cannot be loaded ({one_line(error)}){paths.no_folder(name)}"
        raise InputError(f"{where}: {problem}{'' if file is None else f'; {_cure(name)}'}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{where}: has no fast version ({_FILE}), which train_loop needs")
    _check_entries(where, tokenizer, content or {}, settings)
    if content is not None:
        _check_model(where, tokenizer, content, settings)
    if file is not None:
        _check_class(where, tokenizer, for_data(file))
    if not any(_ids(tokenizer.backend_tokenizer, text) for text in PROBES):
        raise InputError(f"{where}: makes no tokens of any text; use one with a vocabulary, in a {_FILE}")
    return tokenizer


def misread(folder: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The class that AutoTokenizer takes for a saved tokenizer, if it makes other ids of texts; None if it does not."""
    found: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ours, theirs = (_copy(each) for each in (tokenizer, found))
    return type(found).__name__ if any(_ids(ours, text) != _ids(theirs, text) for text in PROBES) else None


def _copy(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    return for_data(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))


def is_plain(tokenizer_class: object) -> bool:
    """Whether a class, named in tokenizer_config.json, is one that does what tokenizer.json says."""
    return isinstance(tokenizer_class, str) and tokenizer_class in _PLAIN_CLASSES


def for_data(core: Tokenizer) -> Tokenizer:
    """Have a core encode all of a text, as ordinary text, always into the same ids. Returns the core."""
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = True  # the spelling of a special token is text
    if getattr(core.model, "dropout", None):  # merges left out at random (BPE-dropout)
        core.model.dropout = None
    return core


def _core(where: str, path: str) -> Tokenizer:
    """What tokenizer.json describes; InputError if this version of the library can't read it."""
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the core raises plain exceptions
        problem = f"{_FILE} is damaged, or of a version that the library tokenizers cannot read ({one_line(error)})"
        raise InputError(f"{where}: {problem}; get it anew, or save it again with the newest Transformers") from None


def _cure(name: str) -> str:
    return f"if the file is right, set tokenizer_class to {PLAIN} in {name}/{_SETTINGS}"


def _ids(core: Tokenizer, text: str) -> list[int]:
    """Token ids of a text; none if the core cannot encode it."""
    try:
        return list(core.encode(text, add_special_tokens=False).ids)
    except Exception:  # without a token for the unknown
        return []


def _check_entries(
    where: str, tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Refuse two entries with one id, and added tokens that have another id than their file says."""
    vocabulary = tokenizer.get_vocab()
    if len(set(vocabulary.values())) < len(vocabulary):
        owners: dict[int, str] = {}
        for text, number in sorted(vocabulary.items()):
            if number in owners:
                raise InputError(f"{where}: two entries have the id {number}, {owners[number]!r} and {text!r}")
            owners[number] = text
    for file, stated in ((_FILE, _added(content)), (_SETTINGS, _added_in(settings))):
        for text, number in stated.items():
            if (found := vocabulary.get(text)) is not None and found != number:
                problem = f"{text!r} has the id {found} when it is loaded, but {number} in its {file}"
                raise InputError(f"{where}: {problem}; use the files that were saved together")


def _added(content: dict[str, Any]) -> dict[str, int]:
    """The ids of added tokens by tokenizer.json."""
    added = content.get("added_tokens") or []
    return {str(each["content"]): int(each["id"]) for each in added if {"content", "id"} <= each.keys()}


def _added_in(settings: dict[str, Any]) -> dict[str, int]:
    """The ids of added tokens by tokenizer_config.json."""
    added = settings.get("added_tokens_decoder")
    pairs = added.items() if isinstance(added, dict) else ()
    return {
        str(token.get("content") if isinstance(token, dict) else token): int(number)
        for number, token in pairs
        if str(number).isdecimal()
    }


def _check_model(
    where: str, tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Refuse an end of text that is no entry (it would get a new id, which no model knows), and lost merges."""
    model, added = content["model"], _added(content).keys()
    entries = model.get("vocab") or {}
    known = {*entries} if isinstance(entries, dict) else {each[0] for each in entries}
    end = tokenizer.eos_token
    if end is not None and str(end) not in known | added | _added_in(settings).keys():
        problem = f"its end-of-text token {str(end)!r} is no entry of its {_FILE}"
        raise InputError(f"{where}: {problem}; name one of its entries as eos_token in {_SETTINGS}")
    if model.get("type") == "BPE" and not model.get("merges") and not model.get("ignore_merges"):
        affixes = bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        other = known - added - {*tokenizer.all_special_tokens}
        long = {each for each in other if len(each) > 1 and not _BYTE.fullmatch(each)}
        if len(long) > len(known) / 10 and not affixes:
            problem = f"{len(long)} of its {len(known)} entries are never used, because its {_FILE} has no merges"
            raise InputError(f"{where}: {problem}; get it anew")


def _check_class(where: str, tokenizer: PreTrainedTokenizerFast, file: Tokenizer) -> None:
    """Refuse a class that makes other ids of a text than tokenizer.json does."""
    core = _copy(tokenizer)
    for text in [*PROBES, " ".join(PROBES)]:
        if _ids(core, text) == _ids(file, text):
            continue
        example = next((each for each in text.split(" ") if _ids(core, each) != _ids(file, each)), text)
        ours, theirs = _shown(_ids(core, example)), _shown(_ids(file, example))
        raise InputError(
            f"{where}: its class {type(tokenizer).__name__} and its {_FILE} disagree: the class turns "
            f"{example[:40]!r} into {ours}, the file into {theirs}; {_cure(where.removeprefix('tokenizer '))}"
        )


def _shown(ids: list[int]) -> str:
    return f"tokens {', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''}" if ids else "no tokens"
