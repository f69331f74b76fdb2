"""Write a model folder so that Transformers 4 reads the same model from it as Transformers 5, which wrote it.

Version 5 has renamed some settings. Version 4 leaves out what it does not know, without a word: it would take its own
default for the base of rotary positions, and give other logits. So the old names are written beside the new ones.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from train_loop.data.tokenizer_file import PLAIN, is_plain

# Parts of version 5's rope_parameters that are settings of their own in version 4: of layers that see all of the text
# (base, rotated share of a head), and of those that see a window (base). A few types had other names for them.
_BASE, _SHARE = "rope_theta", "partial_rotary_factor"
_NAMES = (_BASE, _SHARE, "rope_local_base_freq")
_OTHER_NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct", ""),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct", ""),
    "modernbert-decoder": ("global_rope_theta", "", "local_rope_theta"),
}


def add_old_names(folder: Path) -> None:
    """Add the names that version 4 knows to the settings in a model folder; what version 5 reads stays the same.

    Where version 5 would read something else then, or nothing, the file stays as it was.
    """
    _change(folder / "tokenizer_config.json", _tokenizer)
    path = folder / "config.json"
    if path.is_file():
        before, text = _read(folder), path.read_text(encoding="utf-8")
        _change(path, _model)
        after = _read(folder)
        if any(name not in after or after[name] != value for name, value in before.items()):
            path.write_text(text, encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    """What this version of Transformers reads from a model's settings; nothing if it fails."""
    try:
        return dict(AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict())
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _change(path: Path, change: Any) -> None:
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = change(dict(found))
    if changed != found:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    if is_plain(settings.get("tokenizer_class")):
        settings["tokenizer_class"] = PLAIN
    if isinstance(
        settings.get("extra_special_tokens"), list
    ):  # a mapping in version 4, which has another name for this
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def _model(settings: dict[str, Any]) -> dict[str, Any]:
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict):
        return settings
    layers = {kind: each for kind, each in rope.items() if isinstance(each, dict)}
    if layers:
        rope = layers.get("full_attention") or next(iter(layers.values()))
    local = layers.get("sliding_attention", {}).get(_BASE)
    names = _OTHER_NAMES.get(settings.get("model_type", ""), _NAMES)
    for name, value in zip(names, (rope.get(_BASE), rope.get(_SHARE), local), strict=True):
        if name and value is not None:
            settings.setdefault(name, value)
    scaling = {name: value for name, value in rope.items() if name not in (_BASE, _SHARE)}
    if scaling.get("rope_type", "default") != "default":
        settings.setdefault("rope_scaling", scaling)
    return settings
