"""Feeds a model token by token: keys and values of what it has seen stay in a cache, so each token is fed once.

Rows of different lengths are padded on the left, so that their last tokens, which the next ones follow, share one
column. A mask hides the padding, and positions count from each row's own first token:

    ids        . . a b      mask  0 0 1 1      positions  0 0 0 1
               c d e f            1 1 1 1                 0 1 2 3
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from train_loop import compat, devices
from train_loop.models.building import first_position

Rows = Sequence[Sequence[int]]
"""Token ids, row by row; rows may differ in length."""

_ROOM = 64  # tokens


class Feed(Protocol):
    """What generation needs from a model: it takes tokens and returns logits [batch, vocabulary] of the next ones."""

    model: PreTrainedModel

    def start(self, rows: Rows, max_further_tokens: int) -> torch.Tensor:
        """Start over with these rows, with space for further tokens in each; the logits after each row."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one more token per row, int64 [batch]. Returns the logits after it."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Go on with the rows of these numbers only, in this order."""


class Decoder:
    """A `Feed` for any causal language model, with a growing cache."""

    def __init__(self, model: PreTrainedModel, use_cache: bool = True) -> None:
        """Decoder of a model already in the right mode (train or eval); without `use_cache`, all is recomputed."""
        self.model = model
        self._use_cache = use_cache
        self._cache_name = compat.cache_name(model)
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}

    def start(self, rows: Rows, max_further_tokens: int) -> torch.Tensor:
        """Begin with an empty cache."""
        self._ids, mask = _padded(rows, self.model.device)
        self._mask = None if bool(mask.all()) else mask
        self._cache: Any = None
        return self._forward()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Let the cache grow by one place."""
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return self._forward()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Drop the other rows from the cache."""
        index = torch.tensor(rows, device=self._ids.device)
        self._ids = self._ids[index]
        self._mask = None if self._mask is None else self._mask[index]
        layers = getattr(self._cache, "layers", [])
        if layers and all(hasattr(layer, "batch_select_indices") for layer in layers):
            self._cache.batch_select_indices(index)
        else:
            self._cache = None  # another kind of state, which is recomputed

    def _forward(self) -> torch.Tensor:
        new = 1 if self._cache is not None else self._ids.shape[1]
        inputs: dict[str, Any] = {"input_ids": self._ids[:, -new:], self._cache_name: self._cache}
        if self._mask is not None:
            inputs |= {"attention_mask": self._mask, "position_ids": _positions(self._mask)[:, -new:]}
        try:
            output: Any = self.model(**inputs, use_cache=self._use_cache, **self._options)
        except Exception as error:
            if not self._use_cache or devices.is_out_of_memory(error):
                raise
            # A few models train, but cannot use their own cache: their texts are recomputed.
            self._use_cache, self._cache = False, None
            return self._forward()
        if self._use_cache and self._cache is None:
            _make_room(output.get(self._cache_name))
        self._cache = output.get(self._cache_name) if self._use_cache else None
        return output.logits[:, -1].float()


class _Roomy(DynamicLayer):
    """Keys and values of a layer, [batch, heads, length, width], with room behind them: a new token copies no old ones.

    Whatever else changes them, as dropping rows does, leaves tensors outside of that room, and they move to a new one.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self._rooms: list[torch.Tensor | None] = [None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values of new tokens; returns all of them."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._added(0, self.keys, key_states), self._added(1, self.values, value_states)
        return self.keys, self.values

    def _added(self, which: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        room, length = self._rooms[which], old.shape[-2]
        end = length + new.shape[-2]
        if room is None or old.data_ptr() != room.data_ptr() or end > room.shape[-2]:
            room = old.new_empty(*old.shape[:-2], end + max(_ROOM, end // 4), old.shape[-1])
            room[..., :length, :] = old
            self._rooms[which] = room
        room[..., length:end, :] = new
        return room[..., :end, :]


def _make_room(cache: Any) -> None:
    """Let a filled cache's layers grow in place; those of other kinds (windows that slide, states) stay as they are."""
    layers = getattr(cache, "layers", [])
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[place] = _Roomy(layer)


class StaticDecoder:
    """A `Feed` through a cache of fixed size, so that every step does the same work on the same memory.

    A GPU can then record the step once and replay it as a whole, instead of waiting for Python to launch each of its
    hundreds of small kernels.
    """

    def __init__(self, model: PreTrainedModel, record: "Record") -> None:
        """Decoder of a model in eval mode that `fits`; `record` turns a step into a replay, as a `recorder` does."""
        self.model = model
        self._record = record
        self._cache_name = compat.cache_name(model)
        self._batch = self._size = 0
        self._replay: Callable[[], None] | None = None

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether a step of this model depends on tensors only."""
        parameters = _parameters(model)
        return (
            compat.static_cache_counts()
            and bool(model._can_compile_fullgraph)
            and "position_ids" in parameters
            and "logits_to_keep" in parameters
            and all(type(layer) is StaticLayer for layer in StaticCache(model.config, max_cache_len=1).layers)
        )

    def start(self, rows: Rows, max_further_tokens: int) -> torch.Tensor:
        """Fill a cache of fixed size, and record the steps that follow."""
        device = self.model.device
        ids, mask = _padded(rows, device)
        batch, length = ids.shape
        if batch != self._batch or length + max_further_tokens > self._size:
            self._batch, self._size, self._replay = batch, length + max_further_tokens, None
            self._cache = StaticCache(self.model.config, max_cache_len=self._size)
            self._mask = torch.empty(batch, self._size, dtype=torch.int64, device=device)
            self._tokens, self._positions = torch.zeros(2, batch, 1, dtype=torch.int64, device=device)
        self._cache.reset()
        self._mask.fill_(1)  # causality hides what is not written yet
        self._mask[:, :length] = mask
        self._rows = torch.arange(batch, device=device)
        positions = _positions(mask)
        logits = self._forward(ids, positions)

        def rewind() -> None:
            for layer in self._cache.layers:
                assert isinstance(layer, StaticLayer)
                layer.cumulative_length.fill_(length)
            self._positions.copy_(positions[:, -1:] + 1)

        rewind()
        if self._replay is None and max_further_tokens > 0:
            self._logits = torch.empty_like(logits)
            self._replay = self._record(self._step, rewind)
            rewind()
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Replay the recording with these tokens."""
        assert self._replay is not None, "no further tokens were announced"
        self._tokens[self._rows, 0] = tokens
        self._replay()
        return self._logits[self._rows]

    def select_rows(self, rows: Sequence[int]) -> None:
        """The other rows are still computed, but not used."""
        self._rows = self._rows[torch.tensor(rows, device=self._rows.device)]

    def _step(self) -> None:
        self._logits.copy_(self._forward(self._tokens, self._positions))
        self._positions.add_(1)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output: Any = self.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: self._cache},
        )
        return output.logits[:, -1].float()


Record = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]
"""(step, rewind) -> replay: `rewind` undoes steps, `replay` does what `step` does."""


def recorder(device: torch.device) -> Record | None:
    """Records a step's kernels as a graph of the device; None if the device has no graphs.

    A step that can't be recorded is replayed as it is: Transformers' eager attention, for one, copies a number from the
    host in every step.
    """
    if (graph_type := devices.graph_type(device)) is None:
        return None
    backend: Any = torch.get_device_module(device)

    def record(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
        side = backend.Stream()
        side.wait_stream(backend.current_stream())
        with backend.stream(side):  # libraries allocate in their first calls, which a recording does not allow
            for _ in range(3):
                step()
                rewind()
        backend.current_stream().wait_stream(side)
        graph = graph_type()
        try:
            with backend.graph(graph):
                step()
        except RuntimeError as error:
            if devices.is_out_of_memory(error):
                raise
            return step
        return graph.replay

    return record


def _parameters(model: PreTrainedModel) -> Any:
    return inspect.signature(model.forward).parameters


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths can share a batch: the model must take positions, from 0, and a mask."""
    return {"position_ids", "attention_mask"} <= _parameters(model).keys() and first_position(model) == 0


def _padded(rows: Rows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left, and the mask that hides the padding; int64 [batch, longest row]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Each token's position in its own row, int64 [batch, length]; padding gets position 0."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)
