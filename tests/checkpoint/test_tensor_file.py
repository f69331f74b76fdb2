"""Safetensors files written tensor by tensor: the library's own, byte for byte."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from train_loop.checkpoint import tensor_file


def test_a_file_is_what_the_library_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7, dtype=torch.bfloat16),
        "count": torch.tensor([2**40]),
        "mask": torch.tensor([[True, False]]),
        "nothing": torch.empty(0, 4),
        "double": torch.randn(2, 2, dtype=torch.float64),
        'half \u00e9 "quoted"': torch.randn(1, dtype=torch.float16),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "alone": torch.tensor(1.5),
    }
    metadata = {"rows": '{"b": [0, 6]}'}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    tensor_file.write(tmp_path / "mine.safetensors", tensors | {"b": tensors["b"].t().contiguous().t()}, metadata)
    assert (tmp_path / "mine.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert all(
        map(
            torch.equal,
            load_file(tmp_path / "mine.safetensors").values(),
            load_file(tmp_path / "theirs.safetensors").values(),
        )
    )
