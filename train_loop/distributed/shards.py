"""Models in shards: with FSDP2, a process only ever holds its own, from the first weight on.

model on torch's meta device -> Accelerate shards it -> memory for the shards -> `Shards.place`, tensor by tensor
"""

import hashlib

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train_loop.distributed import gloo
from train_loop.errors import InputError, TrainingError, one_line
from train_loop.ops import cpu


def shard(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """A module that Accelerate has sharded with FSDP2; on the meta device, it then gets memory, but no values yet.

    Raises InputError if it is not known which of its parts are layers, which are gathered one by one.
    """
    cpu.hand_back_freed_memory()
    plugin = accelerator.state.fsdp_plugin
    layers = plugin.transformer_cls_names_to_wrap or getattr(module, "_no_split_modules", [])
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy and not layers:
        problem = f"cannot shard a {type(getattr(module, 'model', module)).__name__}, whose layers are not known"
        cure = "launch with --multi_gpu, or name their class in fsdp_transformer_layer_cls_to_wrap"
        raise InputError(f"FSDP2 {problem}; {cure}")
    parameters = dict(module.named_parameters())
    noted = {name: vars(each) for name, each in parameters.items() if vars(each)}
    on_meta = any(each.is_meta for each in parameters.values())
    # Accelerate wants an optimizer with the module. AdamW comes afterwards, when the parameters are what they will be:
    # on the meta device, Accelerate could not tell them apart.
    try:
        prepared, _ = accelerator.prepare(module, torch.optim.SGD([next(iter(parameters.values()))], lr=0.0))
    except ValueError as error:  # of settings that are the launcher's
        raise InputError(f"FSDP2: {one_line(error)}") from None
    if accelerator.device.type == "cpu" and "gloo" in torch.distributed.get_backend():
        gloo.use(prepared)
    if on_meta:
        prepared.to_empty(device=accelerator.device)  # shards are exchanged in place, so tied ones stay tied
    for name, parameter in prepared.named_parameters():
        vars(parameter).update(noted.get(name, {}))
    return prepared


def reshard(module: nn.Module) -> None:
    """Let go of the whole weights that FSDP2 keeps after a forward pass, so that parameters are shards again."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


class Shards:
    """Fills a model, whether it is sharded or not, with whole tensors, of which it takes what this process holds."""

    def __init__(self, model: nn.Module) -> None:
        parameters, buffers = (
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
        self._tensors = dict(parameters) | dict(buffers)
        self._order = [id(each) for each in model.parameters()]
        self._hashes: dict[int, int] = {}

    @torch.no_grad()
    def place(self, name: str, whole: torch.Tensor) -> None:
        """Take a parameter or buffer. Raises InputError if it is tied to one that had other values."""
        tensor = self._tensors[name]
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        hashed = int(torch.hash_tensor(whole).item())
        if self._hashes.setdefault(id(tensor), hashed) != hashed:
            head = [each for each, other in self._tensors.items() if other is tensor][-1]
            problem = f"config.json ties {head} to the embeddings, but the files hold other values for it"
            raise InputError(f"{problem}; set tie_word_embeddings to false in config.json")
        local.copy_(_part(tensor, whole))

    def digest(self) -> str:
        """A hash of all weights, whole: the same as `parameters.digest` of a model that is not sharded.

        Raises TrainingError if a parameter or buffer has not been placed.
        """
        if missing := [name for name, each in self._tensors.items() if id(each) not in self._hashes]:
            raise TrainingError(f"{missing[0]} and {len(missing) - 1} more tensors got no values, which is a bug")
        return hashlib.sha256(repr([self._hashes[each] for each in self._order]).encode()).hexdigest()[:16]


def _part(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return whole[tuple(slice(first, first + count) for first, count in zip(offset, shape, strict=True))]
