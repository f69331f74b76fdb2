"""A store that somebody writes to while a run reads it ends the run with a line, and its workers with it."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_loop
from train_loop.config.load import config_from_arguments
from train_loop.errors import InputError


class Cutting(train_loop.Observer):
    """Cuts the training tokens after the first step."""

    def after_step(self, *_: Any) -> None:
        for path in Path(os.environ["TRAIN_LOOP_CACHE"]).glob("stores/*/train/tokens.bin"):
            os.truncate(path, 10)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_is_cut_during_a_run(
    settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("TRAIN_LOOP_CACHE", str(tmp_path / "cache"))
    config = config_from_arguments(settings(data__num_workers=workers, train__max_steps=500))
    before = multiprocessing.active_children()  # of other tests
    with pytest.raises(InputError, match=r"tokens.bin: damaged \(has been cut\); remove .* to prepare it again$"):
        train_loop.train(config, callbacks=[Cutting()])
    assert {*multiprocessing.active_children()} <= {*before}
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "tokens.bin: damaged" in status["reason"]
