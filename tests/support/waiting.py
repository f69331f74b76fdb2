"""Run on two processes whose collectives time out after two seconds; one of them works for five."""

import time
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from train_loop import compat
from train_loop.distributed.collectives import run_on_all_ranks
from train_loop.errors import InputError


def main(what: str) -> None:
    """`what` is "together", "barrier" or "mistake"."""

    def work() -> str:
        if accelerator.process_index == 1:
            time.sleep(5)
            if what == "mistake":
                raise InputError("a file is missing on this host")
        return f"done by {accelerator.process_index}"

    with compat.stdout_kept_clean():
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2))])
    assert accelerator.num_processes == 2
    if what == "barrier":
        work()
        accelerator.wait_for_everyone()
    for _ in range(2):
        try:
            print(run_on_all_ranks(accelerator, "test", work), flush=True)
        except InputError as error:
            print(f"process {accelerator.process_index}: {error}", flush=True)
    accelerator.end_training()
