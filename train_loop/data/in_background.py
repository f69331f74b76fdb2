"""Threads for a library that hears no signals while it works, as the Rust core of tokenizers does.

Python handles a signal in its main thread, between two of its own instructions. So the main thread must only wait: then
Ctrl-C ends the wait at once. A thread that is deep in a library is left behind and forgotten.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from tokenizers import Tokenizer

Task = TypeVar("Task")
Result = TypeVar("Result")
_PATIENCE_SECONDS = 0.5  # for threads that are about to finish
_BATCH_CHARACTERS = 1 << 17  # of texts that are handed over together
_BATCHES = 8  # that wait to be learned from


class Workers(Generic[Task, Result]):
    """Threads that apply one function to what is submitted. Leaving the context forgets what is not begun yet."""

    def __init__(self, work: Callable[[Task], Result], threads: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Task, Future[Result]] | None] = queue.SimpleQueue()
        self._work = work
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self._left = False

    def __enter__(self) -> "Workers[Task, Result]":
        for thread in self._threads:
            thread.start()
        return self

    def submit(self, task: Task) -> "Future[Result]":
        """The result, or the error, of a task to come."""
        future: Future[Result] = Future()
        self._tasks.put((task, future))
        return future

    def __exit__(self, *error: object) -> None:
        self._left = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (each := self._tasks.get()) is not None and not self._left:
            task, future = each
            try:
                future.set_result(self._work(task))
            except BaseException as error:
                future.set_exception(error)


def train(core: Tokenizer, trainer: Any, texts: Iterable[str]) -> None:
    """Train a tokenizer on texts, which are read in this thread while another one learns."""
    fed: queue.Queue[list[str] | None] = queue.Queue(_BATCHES)
    left = False

    def feed() -> Iterator[list[str]]:
        while (batch := fed.get()) is not None:
            yield batch
        if left:
            raise InterruptedError  # nobody waits for the tokenizer any more

    def learn(_: None) -> None:
        core.train_from_iterator(feed(), trainer)

    with Workers(learn, 1) as learner:
        learned = learner.submit(None)
        try:
            for batch in _batches(texts):
                while not learned.done():  # if it is done already, it has failed
                    try:
                        fed.put(batch, timeout=1)
                        break
                    except queue.Full:
                        continue
            if not learned.done():
                fed.put(None)
            learned.result()
        except BaseException:
            left = True
            with fed.mutex:
                fed.queue.clear()
            fed.put(None)
            raise


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
