"""Shows the model a fixed text at each evaluation: the loss of each token, and what the model expected in its place.

    text -> tokens t_0 ... t_n        loss of t_i: -ln p(t_i | t_0 ... t_i-1), in nats; the five likeliest in its place

The same few words over a whole run show what the model learns when. The first token has neither, as nothing precedes
it. With FSDP2 all processes run the forward pass, as each holds a part of the weights.
"""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from train_loop.analysis.step_statistics import Write
from train_loop.analysis.trial_step import evaluating
from train_loop.config.schema import PROBE, Config
from train_loop.data.tokenizer import strings
from train_loop.errors import InputError
from train_loop.generation.sampler import prompt_ids
from train_loop.models.building import context_length
from train_loop.training.state import Observer, Run, TrainState

_LIKELIEST = 5


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Raise InputError for a probe that leaves nothing to predict, or exceeds the model's context.

    (A model with a short context sees only the beginning of the default text.)
    """
    tokens, context = len(prompt_ids(tokenizer, config.study.probe or "")), context_length(model)
    if tokens < 2:
        raise InputError("study.probe: has only one token, so there is none to predict; give a longer text")
    if context is not None and tokens - 1 > context and config.study.probe != PROBE:
        raise InputError(f"study.probe: has {tokens} tokens, but the model sees only {context}; give a shorter text")


class Probe(Observer):
    """Records a run's probe after each evaluation, except after step `probed`. All processes must call it."""

    def __init__(self, run: Run, write: Write, probed: int) -> None:
        self.run, self.write, self.probed = run, write, probed

    def after_evaluation(self, state: TrainState, record: dict[str, Any]) -> None:
        """Record the text's tokens, their current losses, and the likeliest tokens in their place."""
        if self.probed == state.step:
            return
        text, tokenizer, context = self.run.config.study.probe or "", self.run.data.tokenizer, self.run.context
        limit = context_length(state.model)
        ids = prompt_ids(tokenizer, text)[: None if limit is None else limit + 1]
        losses: list[float] = []
        likeliest: list[list[list[Any]]] = []

        def visit(logits: torch.Tensor, targets: torch.Tensor) -> None:
            log_p = logits.log_softmax(-1)
            losses.extend((-log_p.gather(1, targets[:, None])[:, 0]).tolist())
            top = log_p.exp().topk(min(_LIKELIEST, log_p.shape[1]))
            for indices, shares in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                likeliest.append([[tokenizer.decode([id_]), p] for id_, p in zip(indices, shares, strict=True)])

        tokens = torch.tensor([ids], device=context.accelerator.device)
        with evaluating(context.objective):
            context.objective(tokens[:, :-1], tokens[:, 1:], visit=visit)
        values = {"text": text, "tokens": strings(tokenizer, ids), "losses": [None, *losses], "top": [None, *likeliest]}
        self.write("probe", state.step, values)
