"""The finished model as a plain Transformers folder: safetensors, configuration, tokenizer, generation settings, card.

`AutoModelForCausalLM.from_pretrained` and `pipeline("text-generation", model=...)` load it as it is.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig, PreTrainedTokenizerFast

from train_loop import files
from train_loop.checkpoint.storage import Parts
from train_loop.config.load import to_yaml
from train_loop.config.schema import Config
from train_loop.console import say, shown
from train_loop.data import tokenizer_file
from train_loop.errors import InputError, one_line
from train_loop.export import older_versions, weights
from train_loop.models.building import context_length
from train_loop.models.ends import ends
from train_loop.training.state import Run

_CURE = "load it with PreTrainedTokenizerFast.from_pretrained"
_OTHER_TOKENIZER = f"""
## Tokenizer

`AutoTokenizer` of Transformers 5 takes {{other}} for this kind of model, whatever tokenizer_config.json says. It splits
text in another way than tokenizer.json, with which this model was trained: {_CURE}.
"""
# What an earlier export of the run may have written besides the files that all have.
_OURS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|(vocab|added_tokens|special_tokens_map)\.json|merges\.txt|"
    r"chat_template\.jinja"
)


def write(
    folder: Path, run: Run, parts: Parts, evaluations: list[dict[str, Any]], step: int, verification: str
) -> weights.Written | None:
    """Write a model folder that is not there yet, with the weights of a step; None if a signal came first.

    Args:
        run: has the model's configuration, its tokenizer, and what the card says.
        parts: the weights of that step's checkpoint.
        verification: how the folder will be verified, for the card; empty if it won't.
    """
    config, model, tokenizer = run.config, run.state.model, run.data.tokenizer
    folder.mkdir()
    model.generation_config = generation_config(config, tokenizer, ends(model, tokenizer))
    model.save_pretrained(folder, state_dict={})  # settings alone: it would need all weights at once
    written = weights.write(folder, model, parts, config.export.max_shard_size, run.context.stop)
    if written is None:
        return None
    if (context := context_length(model)) is not None:
        tokenizer.model_max_length = context
    tokenizer.save_pretrained(folder)
    older_versions.add_old_names(folder)
    card = model_card(config, run.data.ledger(), evaluations, step)
    if verification:
        card += f"\n## Verification\n\n{verification[0].upper()}{verification[1:]}.\n"
    if (other := tokenizer_file.misread(str(folder), tokenizer)) is not None:
        card += _OTHER_TOKENIZER.format(other=other)
        say(f"exported model: Transformers reads its tokenizer as {other}, which gives other tokens; {_CURE}")
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in folder.iterdir():
        files.share(path)
        files.sync(path)
    return written


def publish(temporary: Path, folder: Path) -> None:
    """Move a whole model folder into its place. If others have put files into the one that is there, it is kept."""
    ours = {path.name for path in temporary.iterdir()}
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if others := sorted(name for name in there - ours if not _OURS.fullmatch(name)):
        kept = files.free(folder.with_name(f"{folder.name}-before"))
        os.rename(folder, kept)
        say(f"{folder}: holds {', '.join(others[:3])}, which this run did not write; it is kept as {kept.name}")
    files.replace(temporary, folder)


def generation_config(config: Config, tokenizer: PreTrainedTokenizerFast, ends: list[int]) -> GenerationConfig:
    """The configured sampling as defaults for Transformers' `generate`; a text ends at any of the tokens `ends`."""
    sample = config.sample
    last = {"eos_token_id": ends if len(ends) > 1 else tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    begins = {} if tokenizer.bos_token_id is None else {"bos_token_id": tokenizer.bos_token_id}
    draws = {name: getattr(sample, name) for name in ("temperature", "top_k", "top_p") if sample.temperature}
    return GenerationConfig(
        do_sample=sample.temperature > 0, max_new_tokens=sample.max_new_tokens, **draws, **last, **begins
    )


def model_card(config: Config, ledger: dict[str, Any], evaluations: list[dict[str, Any]], step: int) -> str:
    """README.md of the model folder: what it was trained on, how, and with what result."""
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["train_loop"]}
    base = config.model.name_or_path
    # The Hub reads these two as names of its own repositories, which local paths are not.
    if base and not os.path.exists(base):
        header["base_model"] = base
    if config.data.source == "hub" and config.data.name and not os.path.exists(config.data.name):
        header["datasets"] = [config.data.name]
    origin = f"fine-tuned from `{base}`" if base else f"trained from scratch ({config.model.architecture})"
    data = {"stdlib": "the Python standard library's sources", "files": f"files {config.data.files}"}
    rows = "".join(
        f"| {name.replace('_', ' ')} | {train:,} | {ledger['validation'][name]:,} |\n"
        for name, train in ledger["train"].items()
        if isinstance(train, int)
    )
    results = "".join(
        f"| {each['step']:,} | {shown(each.get('epoch'), 2)} | "
        f"{'not finite' if each['loss'] is None else shown(each['loss'])} | {shown(each.get('perplexity'), 3)} | "
        f"{shown(each.get('bits_per_byte'))} | {shown(each.get('accuracy'))} |\n"
        for each in evaluations
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {config.output_dir.name}

A causal language model, {origin}, with train_loop.

## Results on held-out documents

Every target token of the validation data counts once. Perplexity is exp(loss). The weights here are those of step \
{step:,}.

| step | epoch | loss (nats per token) | perplexity | bits per byte | accuracy |
|---:|---:|---:|---:|---:|---:|
{results}
## Data

Source: {data.get(config.data.source, f"data set `{config.data.name}`")}. Fingerprint: `{ledger["fingerprint"]}`.

| | train | validation |
|---|---:|---:|
{rows}
## Settings

```yaml
{to_yaml(config).strip()}
```
"""


def push(folder: Path, config: Config) -> str:
    """Upload the model folder to the Hub; returns its address. InputError if the Hub refuses, with its reason."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        repository = api.create_repo(config.export.hub_model_id or config.output_dir.name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload model")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        cure = f"the model is in {folder}; log in with hf auth login"
        raise InputError(f"export.push_to_hub: {one_line(error)}; {cure}") from None
    return str(repository)
