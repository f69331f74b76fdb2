"""Shows the model a fixed text at each evaluation: the loss of each token, and what the model expected in its place.

    text -> tokens t_0 ... t_n        loss of t_i: -ln p(t_i | t_0 ... t_i-1), in nats; the five likeliest in its place

The same few words over a whole run show what the model learns when. The first token has neither, as nothing precedes
it. With FSDP2 all processes run the forward pass, as each holds a part of the weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from train_loop.config.schema import PROBE, Config
from train_loop.data.tokenizer import strings
from train_loop.errors import InputError
from train_loop.generation.sampler import prompt_ids
from train_loop.models.building import context_length, without_compile
from train_loop.training.state import Observer, Run, StepContext, TrainState

_LIKELIEST = 5


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Refuse a probe that leaves nothing to predict, or exceeds the model's context.

    Raises:
        InputError: with both numbers. (A model with a short context sees only the beginning of the default text.)
    """
    tokens, context = len(prompt_ids(tokenizer, config.study.probe or "")), context_length(model)
    if tokens < 2:
        raise InputError("study.probe: has only one token, so there is none to predict; give a longer text")
    if context is not None and tokens - 1 > context and config.study.probe != PROBE:
        raise InputError(f"study.probe: has {tokens} tokens, but the model sees only {context}; give a shorter text")


class Probe(Observer):
    """Records the probe after each evaluation. All processes must call it.

    Args:
        run: a run that is set up; its `study.probe` is the text.
        write: called with the event, the step and the values of each record.
        probed: the last step with a recorded probe before the run was resumed.
    """

    def __init__(self, run: Run, write: Callable[[str, int, dict[str, Any]], None], probed: int) -> None:
        self.run, self.write, self.probed = run, write, probed

    def after_evaluation(self, state: TrainState, record: dict[str, Any]) -> None:
        """Record the current loss of each token of the text."""
        if self.probed != state.step:
            text, tokenizer = self.run.config.study.probe or "", self.run.data.tokenizer
            self.write("probe", state.step, measure(self.run.context, state.model, tokenizer, text))


@torch.no_grad()
def measure(
    context: StepContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str
) -> dict[str, Any]:
    """A text's tokens, their losses and the likeliest ones, as in study.jsonl. All processes must call this."""
    objective, limit = context.objective, context_length(model)
    ids = prompt_ids(tokenizer, text)[: None if limit is None else limit + 1]
    losses: list[float] = []
    likeliest: list[list[tuple[int, float]]] = []

    def visit(logits: torch.Tensor, targets: torch.Tensor) -> None:
        log_p = logits.log_softmax(-1)
        losses.extend((-log_p.gather(1, targets[:, None])[:, 0]).tolist())
        top = log_p.exp().topk(min(_LIKELIEST, log_p.shape[1]))
        for tokens, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            likeliest.append(list(zip(tokens, probabilities, strict=True)))

    tokens = torch.tensor([ids], device=context.accelerator.device)
    training = objective.training
    objective.eval()
    with without_compile(model):
        objective(tokens[:, :-1], tokens[:, 1:], visit=visit)
    objective.train(training)
    return {
        "text": text,
        "tokens": strings(tokenizer, ids),
        "losses": [None, *losses],
        "top": [None, *([[tokenizer.decode([id_]), p] for id_, p in tokens] for tokens in likeliest)],
    }
