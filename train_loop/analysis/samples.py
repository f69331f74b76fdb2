"""An observer that samples a text or two after each evaluation, for the log and the reader."""

from collections.abc import Callable
from typing import Any

from train_loop.config.sampling import sampling_of
from train_loop.console import say
from train_loop.distributed.agreement import StopPoll
from train_loop.distributed.collectives import unsharded
from train_loop.generation.decoding import NotFiniteError
from train_loop.generation.sampler import Sampler
from train_loop.models.building import without_compile
from train_loop.training.state import Observer, Run, TrainState


class Samples(Observer):
    """Continues the configured prompts. If there are none, it samples a whole text, if the tokenizer can begin one.

    `known` (step, samples) says how many texts were sampled after that step before the run was resumed.
    """

    def __init__(self, run: Run, write: Callable[[dict[str, Any]], None], known: tuple[int, int]) -> None:
        self.context, self.write, self.known = run.context, write, known
        settings, tokenizer = run.config.sample, run.data.tokenizer
        begins = tokenizer.bos_token_id is not None
        self.prompts = ([""] if begins else []) if settings.prompts is None else settings.prompts
        self.sampling = sampling_of(run.config)
        self.sampler = Sampler(run.state.model, tokenizer, notice=lambda line: None)

    def after_evaluation(self, state: TrainState, record: dict[str, Any]) -> None:
        """Sample the texts that the log doesn't have yet."""
        accelerator, main = self.context.accelerator, self.context.accelerator.is_main_process
        if record["loss"] is None:
            if main and self.prompts:
                say("  sample: skipped, as the model's loss is not finite")
            return
        # Sharded weights are gathered layer by layer, so all processes must take part in sampling.
        together = accelerator.is_fsdp2
        poll = StopPoll(accelerator, self.context.stop, alone=not together)
        done = self.known[1] if self.known[0] == state.step else 0
        with unsharded(accelerator, self.context.objective), without_compile(state.model):
            for prompt in self.prompts[done:] if main or together else []:
                try:
                    text = next(self.sampler.sample([prompt], self.sampling, stop=poll))[0].text
                except NotFiniteError as error:  # the same on all processes
                    if main:
                        say(f"  sample: {prompt!r} is skipped: {error}")
                    continue
                if poll():
                    break
                self.write({"event": "sample", "step": state.step, "prompt": prompt, "continuation": text})
                if main:
                    say(f"  sample: {prompt}{text}")
