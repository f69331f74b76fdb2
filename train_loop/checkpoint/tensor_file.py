"""Writes safetensors files one tensor at a time, so that no more than one has to be in CPU memory.

A file is the length of its header (8 bytes, little-endian), the header in JSON, padded with spaces to a multiple of 8
bytes, and the tensors' bytes in the header's order (github.com/huggingface/safetensors#format). The library, which
writes all tensors at once, sorts them by type, the widest first, then by name; so does this.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
}


def begin(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, int]:
    """Create a file with a header and room for these tensors, of which shapes and types are used.

    Returns where the bytes of each have to be, in the header's order.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    order = list(_TYPES)
    first, firsts = 0, {}
    for name in sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        end = first + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
        firsts[name], first = first, end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + first)
    return {name: 8 + len(header) + each for name, each in firsts.items()}


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors, which may be on any device."""
    firsts = begin(path, tensors, metadata)
    with open(path, "r+b") as file:
        for name, first in firsts.items():
            file.seek(first)
            file.write(bytes_of(tensors[name].detach().to("cpu").contiguous()))


def bytes_of(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
