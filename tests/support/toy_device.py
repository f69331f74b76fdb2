"""A made-up accelerator, "toy", that lacks what others lack: float64, bfloat16, CUDA, pinned memory.

    echo '[["train", "--config", ...]]' | python -m tests.support.toy_device     runs commands, with models on "toy"

Each of its tensors holds one of the CPU's, on which every operation is done; one whose result would be in float64 is
refused, as Apple's GPUs refuse it. The CPU itself has everything, as beside any device. It is another device than the
CPU in all that torch can see, so a product of the two is an error, and it is named neither "cuda" nor "mps".
"""

import contextlib
import io
import json
import sys
from typing import Any, NoReturn

import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map

_LACKS = (torch.float64, torch.complex128, torch.bfloat16)


class Toy(torch.Tensor):
    """A tensor on "toy"."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Toy":
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("toy", 0),
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **options: Any) -> str:
        return f"Toy({self.inner})"

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)

    def data_ptr(self) -> int:
        """Where it is in memory."""
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        """Its numbers; torch has no such thing for types of tensors that it does not know."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _compute(function, *arguments, **(options or {}))


def _compute(function: Any, *arguments: Any, **options: Any) -> Any:
    """Do an operation of "toy" on the CPU."""
    made_from: dict[int, Toy] = {}

    def unwrap(value: Any) -> Any:
        if isinstance(value, Toy):
            made_from[id(value.inner)] = value
            return value.inner
        if isinstance(value, torch.Tensor) and value.ndim and function not in _COPIES:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, found cpu and toy:0")
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "toy" else value

    leaves_it = torch.device(options.get("device") or "toy").type == "cpu"
    result = function(*tree_map(unwrap, arguments), **tree_map(unwrap, options))
    if leaves_it:
        return result

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or (function is torch.ops.aten.copy_.default and value is arguments[0]):
            return value
        if id(value) in made_from:  # in place
            return made_from[id(value)]
        if value.dtype in _LACKS:
            raise TypeError(f"Cannot convert a toy Tensor to {value.dtype}: the toy framework doesn't support it")
        return Toy(value)

    return tree_map(wrap, result)


_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class _Backend:
    """torch.toy: what every kind of accelerator has, and no more."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def synchronize(self, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


def register() -> None:
    """Let torch know "toy", let Accelerate choose it, and let nobody touch CUDA or pin memory."""
    from accelerate.state import PartialState
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("toy", _Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_compute, "PrivateUse1")
    _KEPT.append(library)
    _device_constructors()  # `with torch.device(...)` remembers the functions that it is for
    torch.tensor = _tensor
    # Weights change their device where they are, as those of real accelerators do, so that tied ones stay tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    PartialState.default_device = property(lambda self: torch.device("toy", 0))  # type: ignore[assignment]
    for name in ("synchronize", "current_stream", "manual_seed", "get_device_name", "empty_cache", "memory_allocated"):
        setattr(torch.cuda, name, _refusing(name))
    for name in ("Event", "Stream", "CUDAGraph"):
        getattr(torch.cuda, name).__new__ = _refusing(name)
    torch.cuda.max_memory_allocated = _refusing("max_memory_allocated")  # type: ignore[assignment]
    torch.Tensor.pin_memory = _refusing("pin_memory")  # type: ignore[assignment, method-assign]


def _indices(index: Any) -> Any:
    """Indices with tensors in the place of lists, which torch would make into tensors in a way that is closed here."""
    each = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part).to("toy") if isinstance(part, list) else part for part in each)


_new_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """torch.tensor, whose own copy to a device goes a way that devices written in Python are not on."""
    if device is None or torch.device(device).type != "toy":
        return _new_tensor(data, device=device, **options)
    return _new_tensor(data, device="cpu", **options).to(device)


_KEPT: list[Any] = []  # a library that is freed takes its operations with it


def _refusing(name: str) -> Any:
    """A function of its own, since libraries look functions up by identity."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise RuntimeError(f"{name}: there is no CUDA and no pinned memory here")

    return refuse


def main() -> None:
    """Run the commands of train_loop that stdin has as JSON, on "toy"; prints [exit code, stdout, stderr] of each."""
    register()
    from accelerate.state import AcceleratorState

    from tests.support.runs import last_of_each
    from train_loop import cli

    outcomes = []
    for command in json.load(sys.stdin):
        AcceleratorState._reset_state(reset_partial_state=True)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(last_of_each(command))
        outcomes.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
