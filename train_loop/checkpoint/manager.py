"""Writes checkpoints during training, at most one at a time. If one fails, the run goes on.

    save_async (all processes)   copies the state to CPU memory; then training goes on
      threads                    each writes its part, and tells the main process's thread through the launcher's store
      main's thread              waits for all parts, completes the checkpoint, removes older ones
    wait (all processes)         waits until that is done; returns what went wrong, if anything did

No thread takes part in a collective, because collectives belong to the training. The copies stay allocated, because
getting fresh memory from the kernel takes longer than copying. Where memory is too short for them, a process writes
its part at once, one tensor after another, and trains on only then.
"""

import json
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from train_loop import devices, files
from train_loop.checkpoint import storage
from train_loop.checkpoint.storage import Checksums, Shards
from train_loop.console import say
from train_loop.distributed.collectives import KeyValueMailbox, broadcast_from_main, run_on_all_ranks
from train_loop.errors import one_line

_SECONDS_BETWEEN_LOOKS = 0.05
_SPARED = 0.05  # of the memory of a machine; copies leave so much of it free


class CheckpointManager:
    """Writes a run's checkpoints, and keeps the newest; those of steps found to be damaged don't count.

    Writing in the background costs each process as much CPU memory as it writes (12 bytes per parameter), and is done
    where there is so much. `step` is that
    of the last checkpoint that was begun (or resumed from); None before that.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, keep: int, background: bool, damaged: Collection[int] = ()
    ) -> None:
        self.accelerator, self.folder, self.keep, self.background = accelerator, folder, keep, background
        self.damaged = set(damaged)
        self.step: int | None = None
        self._number = 0  # counts the checkpoints that were begun; the same on all processes
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._abandoned = threading.Event()
        self._buffers: dict[str, torch.Tensor] = {}
        if accelerator.is_main_process:
            storage.clear(folder)
        self._token = broadcast_from_main(accelerator, files.new_token())

    def save_async(
        self,
        model: torch.nn.Module,
        optimizer: storage.Optimizer,
        state: dict[str, Any],
        protected_steps: Collection[int] = (),
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Save the state as it is now. All processes must call this, after the same step.

        `state` has plain values for state.json. Checkpoints of `protected_steps` are not removed. The main process's
        thread calls `before`, which writes what else must be on disk before the checkpoint is.
        """
        self._join()
        main = self.accelerator.is_main_process
        held = storage.shards(model, optimizer, main)
        parts = self.accelerator.num_processes if self.accelerator.is_fsdp2 else 1
        self.step, self._problem = int(state["step"]), None
        self._number += 1
        if parts == 1 and not main:
            return
        rest = (state | {"parts": parts}, protected_steps, before)
        if self.background and self._has_room(held):
            # Not a daemon thread: the interpreter waits for it at exit.
            self._thread = threading.Thread(target=self._write, args=(self._copied(held), *rest), name="checkpoint")
            self._thread.start()
        else:
            self._write(held, *rest)

    def wait(self) -> str | None:
        """Wait until the checkpoint is complete; returns what went wrong, or None. All processes must call this."""
        run_on_all_ranks(self.accelerator, "checkpoint", self._join)
        if (problem := broadcast_from_main(self.accelerator, self._problem)) is not None:
            self.step = None
        return problem

    def abandon(self) -> None:
        """Stop waiting for other processes, because one may be gone; wait only for this process's thread."""
        self._abandoned.set()
        self._join()

    def _join(self) -> None:
        """Wait for this process's thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _has_room(self, held: Shards) -> bool:
        """Whether there is memory for a copy, also if every process on this host wants as much for one."""
        new = [
            piece.values.nbytes
            for kind in held
            for name, piece in held[kind].items()
            if f"{kind}/{name}" not in self._buffers
        ]
        memory = psutil.virtual_memory()
        wanted = sum(new) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        short = bool(new) and memory.available - wanted < _SPARED * memory.total
        if short and self.accelerator.is_main_process and self._number == 1:
            say(
                f"careful: {memory.available / 1e9:.1f} GB of memory are available, too little to copy the state; "
                "so training waits while a checkpoint is written"
            )
        return not short

    def _copied(self, held: Shards) -> Shards:
        """A copy in CPU memory that training does not touch."""
        pinned = devices.pins_memory(self.accelerator.device)
        copies: Shards = {}
        for kind, tensors in held.items():
            copies[kind] = {}
            for name, piece in tensors.items():
                values, key = piece.values, f"{kind}/{name}"
                if key not in self._buffers:
                    self._buffers[key] = torch.empty_like(values, device="cpu", pin_memory=pinned).contiguous()
                self._buffers[key].copy_(values, non_blocking=True)
                copies[kind][name] = piece._replace(values=self._buffers[key])
        if pinned:
            devices.synchronize(self.accelerator.device)
        return copies

    def _write(
        self, held: Shards, state: dict[str, Any], protected_steps: Collection[int], before: Callable[[], None]
    ) -> None:
        """Do this process's share of writing a checkpoint. No error here ends the run, whatever it is."""
        step, parts, main = int(state["step"]), int(state["parts"]), self.accelerator.is_main_process
        temporary = files.private(storage.folder_of(self.folder, step), self._token)
        part = self.accelerator.process_index if parts > 1 else 0
        try:
            sums = self._exchange(part, parts, lambda: storage.write_part(temporary, part, parts, held))
            if main:
                before()
                storage.commit(temporary, state, sums)
                self.damaged.discard(step)
        except Exception as error:
            self._problem = one_line(error)
            if main and not self._abandoned.is_set():
                files.remove(temporary)  # make room for other files
                say(f"step {step}: the checkpoint could not be written ({self._problem}); training goes on")
            return
        if main:
            try:
                storage.prune(self.folder, self.keep, step, protected_steps, self.damaged)
            except OSError as error:
                say(f"step {step}: old checkpoints could not be removed ({one_line(error)})")

    def _exchange(self, part: int, parts: int, write: Callable[[], Checksums]) -> Checksums:
        """Write a part; the main process gets the checksums of all parts, or an OSError if one could not be written."""
        if parts == 1:
            return write()
        try:
            answer: dict[str, Any] = {"sums": write()}
        except Exception as error:
            answer = {"problem": f"process {part}: {one_line(error)}"}
        board = KeyValueMailbox(self.accelerator, f"checkpoint {self._number}")
        board.write(part, json.dumps(answer))
        if part:
            return {}
        sums: Checksums = {}
        for text in board.read_all(self._abandoned.wait, _SECONDS_BETWEEN_LOOKS):
            answer = json.loads(text)
            if "problem" in answer:
                raise OSError(answer["problem"])
            sums |= answer["sums"]
        return sums
