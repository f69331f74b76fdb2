"""FSDP2's collectives over gloo: what torch's own give, with less memory."""

import json
from pathlib import Path

import pytest
import torch

from tests.support import forked
from tests.support.launch import ON_CPU, launchers, processes
from train_loop.distributed import gloo

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [2, 3])
def test_they_give_what_torchs_own_give(tmp_path: Path, number: int) -> None:
    each = launchers(number, processes(number), ON_CPU)
    ended = forked.together("tests.support.exchanged", (str(tmp_path / "done"),), each, 60)
    assert not any(code for code, _ in ended), ended
    for rank in range(number):
        found = json.loads((tmp_path / f"done.{rank}").read_text())
        assert len(found) == (4 if rank in (0, number - 1) else 3)
        for name, result in found.items():
            assert result["gathered"] and result["same"] and result["error"] < 2, (rank, name, result)


def test_what_is_gathered_reuses_memory_once_nobody_uses_it() -> None:
    gather = gloo.Gather()

    def allocate(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return gather.allocate((count,), dtype=dtype, device=CPU)

    first, second = allocate(1000), allocate(900)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2  # FSDP2 holds one while it gathers the next
    del first
    third = allocate(990)
    assert third.shape == (990,) and {third.data_ptr(), second.data_ptr()} == places
    del second, third
    assert allocate(950, torch.bfloat16).dtype == torch.bfloat16


def test_no_more_memory_is_kept_than_was_used_at_once() -> None:
    gather = gloo.Gather()
    for count in (10, 1000, 20, 3000, 30, 2000):
        tensor = gather.allocate((count,), dtype=torch.float32, device=CPU)
        following = gather.allocate((5,), dtype=torch.float32, device=CPU)
        del tensor, following
    assert len(gather._kept) <= 2
    kept = [len(memory) for memory, _ in gather._kept]
    assert max(kept) == 3000
