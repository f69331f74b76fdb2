"""Isolated documents: what is in one changes nothing in another, on every attention that can; the rest is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import NO_DROPOUT, TINY_MODELS, Command, events
from tests.test_model import configured
from train_loop import job
from train_loop.analysis import truth_sheet
from train_loop.config.load import config_from_arguments
from train_loop.config.schema import Config
from train_loop.data import preparation, tokenizer
from train_loop.data.loader import IGNORED, Windows
from train_loop.data.order import MicroBatch
from train_loop.data.token_store import _DOCUMENT, Ledger, TokenStore
from train_loop.models import building
from train_loop.training.objective import Objective

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": TINY_MODELS["gpt2"] | NO_DROPOUT,
    "llama": TINY_MODELS["llama"],
    "qwen3": TINY_MODELS["llama"] | {"model_type": "qwen3", "head_dim": 16},
    "gemma2": TINY_MODELS["llama"] | {"model_type": "gemma2", "head_dim": 16},  # the path with logits; sliding windows
}


def packed(folder: Path, documents: list[list[int]]) -> TokenStore:
    """A store of documents that are given as tokens, end-of-text token included."""
    tokens = np.array([token for document in documents for token in document], dtype="<u2")
    ends = np.zeros(len(documents), dtype=_DOCUMENT)
    ends["token_end"] = np.cumsum([len(document) for document in documents])
    folder.mkdir(exist_ok=True)
    (folder / "tokens.bin").write_bytes(tokens.tobytes())
    (folder / "documents.bin").write_bytes(ends.tobytes())
    return TokenStore(folder, "<u2", Ledger(documents=len(documents), text_tokens=len(tokens)))


@given(
    st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=12), min_size=1, max_size=12).filter(
        lambda documents: sum(map(len, documents)) > 1
    ),
    st.integers(1, 9),
)
def test_windows_know_where_documents_begin(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], block_size: int
) -> None:
    """Against the definition, token by token."""
    tokens = [token for document in documents for token in document]
    place = [number for document in documents for number in range(len(document))]
    windows = Windows(packed(tmp_path_factory.mktemp("store"), documents), block_size, 0, isolate=True)
    blocks = np.arange(len(windows))
    batch = windows[MicroBatch(0, blocks)]
    assert batch.positions is not None
    counted = 0
    for row in range(len(windows)):
        for column in range(block_size):
            at = row * block_size + column
            target = int(batch.targets[row, column])
            if at < len(tokens):
                assert int(batch.inputs[row, column]) == tokens[at]
                assert int(batch.positions[row, column]) == min(place[at], column)
            if at + 1 < len(tokens) and place[at + 1] != 0:
                assert target == tokens[at + 1]
                counted += 1
            else:
                assert target == IGNORED
        assert windows.targets(np.array([row])) == int((batch.targets[row] != IGNORED).sum())
    assert windows.targets(blocks) == counted == len(tokens) - len(documents)


def test_the_ledger_counts_first_tokens(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = Config()
    settings.data.source, settings.data.files = "files", [f"{corpus}/*.txt"]
    settings.data.cache_dir = str(tmp_path)
    settings.tokenizer.name_or_path = str(tokenizer_folder)
    plain = preparation.prepare(settings, shown=False)
    settings.data.isolate_documents = True
    isolated = preparation.prepare(settings, shown=False)
    assert isolated.folder == plain.folder and isolated.fingerprint == plain.fingerprint
    core = tokenizer.encoder(plain.tokenizer)
    for side in ("train", "validation"):
        before, after = getattr(plain, side).ledger, getattr(isolated, side).ledger
        assert after.first_tokens == after.documents > 1
        assert after.trained_targets == before.trained_targets - before.documents + 1
        assert after.trained_targets + after.first_tokens + after.dropped_tokens == after.text_tokens + after.eos_tokens
        names = [getattr(isolated, side).document_at(int(end) - 1)[0] for end in getattr(isolated, side).document_ends]
        first = [core.encode(Path(name).read_text()).offsets[0][1] for name in names]
        assert after.predicted_bytes == after.bytes - sum(first)  # ASCII: a character is a byte
        assert before.predicted_bytes == before.bytes - first[0]


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name in SHAPES
        for attention in ("sdpa", "eager")
        if (name, attention) != ("gemma2", "sdpa")
    ],
)
def test_one_document_changes_nothing_in_another(tokenizer_folder: Path, name: str, attention: str) -> None:
    its_tokenizer = tokenizer.load(str(tokenizer_folder))
    built = building.build(configured(SHAPES[name], attention=attention), its_tokenizer).eval()
    with torch.no_grad():  # large weights, so that everything has an influence to see
        for parameter in built.parameters():
            parameter *= 1 if parameter.ndim < 2 else 5
    objective = Objective(built)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 320, (2, 32), generator=generator)
    positions = torch.cat([torch.arange(12), torch.arange(20)]).repeat(2, 1)
    other = inputs.clone()
    other[:, :12] = (other[:, :12] + 7) % 320

    def logits(tokens: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            return objective._logits(tokens, at).unflatten(0, tokens.shape)

    isolated, changed = logits(inputs, positions), logits(other, positions)
    assert torch.equal(isolated[:, 12:], changed[:, 12:]) and not torch.equal(isolated[:, :12], changed[:, :12])
    # The second document alone, in a window of its own, gives the same.
    torch.testing.assert_close(isolated[:, 12:], logits(inputs[:, 12:], None), rtol=1e-4, atol=1e-4)
    crossing = logits(inputs, None) - logits(other, None)
    assert crossing[:, 12:].abs().amax() > 1e-3  # without positions they do reach each other


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("isolate", [True, False])
def test_the_truth_sheet_says_whether_documents_cross(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, name: str, isolate: bool
) -> None:
    shape = json.dumps(SHAPES[name])
    arguments = settings(model__architecture=shape, data__isolate_documents=str(isolate).lower(), train__epochs=1)
    assert command("train", *arguments) == 0
    sheet = json.loads((tmp_path / "run" / "truth.json").read_text())
    assert sheet["documents"] == {"isolated": isolate, "cross": not isolate}
    expected = "isolated: none influences another" if isolate else "packed: one influences the next"
    assert expected in command.err
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]
    assert sum(event["tokens"] for event in events(tmp_path / "run", "step")) == ledger["trained_targets"]
    evaluated = events(tmp_path / "run", "evaluation")[-1]
    assert command("evaluate", "--model", tmp_path / "run" / "model", *arguments) == 0
    assert json.loads(command.out)["loss"] == pytest.approx(evaluated["loss"], rel=1e-7)


def test_what_cannot_isolate_is_refused(
    command: Command,
    settings: Callable[..., list[str]],
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bloom = json.dumps({"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2})  # knows no positions
    isolated = settings(data__isolate_documents="true", model__architecture=bloom)
    assert command("train", *isolated) == 2
    assert "data.isolate_documents: BloomForCausalLM" in command.err and not (tmp_path / "run").exists()
    # A model that takes positions and does not mind them is found out by looking.
    monkeypatch.setattr(
        Objective, "_arguments", lambda self, inputs, positions: {"input_ids": inputs, "use_cache": False}
    )
    isolated = settings(data__isolate_documents="true")
    for arguments in (["train", *isolated], ["evaluate", "--model", str(model_folder), *isolated]):
        assert command(*arguments) == 2
        assert "lets one document influence another" in command.err and not (tmp_path / "run").exists()
    assert len(command.err.strip().splitlines()) == 1 or "already prepared" in command.err


def test_flash_attention_gets_one_row_with_every_border_in_its_positions(tokenizer_folder: Path) -> None:
    objective = Objective(building.build(configured(SHAPES["llama"]), tokenizer.load(str(tokenizer_folder))))
    objective.model.config._attn_implementation = "flash_attention_2"
    inputs, positions = torch.arange(6).view(2, 3), torch.tensor([[0, 1, 0], [0, 1, 2]])
    given_ = objective._arguments(inputs, positions)
    assert given_["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert given_["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]


def test_blocks_of_one_or_two_tokens_have_nothing_to_cross(settings: Callable[..., list[str]]) -> None:
    run = job.set_up(config_from_arguments(settings(data__block_size=2))).run
    assert not truth_sheet.documents_cross(Accelerator(), run.context.objective, run.config)
