"""A fixed text at each evaluation: what each token costs the model, and what it would have said instead.

    text -> tokens t_0 ... t_n        loss of t_i: -ln p(t_i | t_0 ... t_i-1), in nats; the five likeliest in its place

The same few words over a whole training show what is learned when. The first token is predicted from nothing, so it has
neither. With FSDP2 all processes run the forward pass, as each holds a part of the weights.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from train_loop.config.schema import PROBE, Config
from train_loop.data.tokenizer import strings
from train_loop.errors import InputError
from train_loop.generation.sampler import prompt_ids
from train_loop.models import building
from train_loop.models.building import context_length

if TYPE_CHECKING:
    from train_loop.job import Run

_LIKELIEST = 5


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Refuse a probe that has nothing to predict, or is beyond the model's context.

    Raises:
        InputError: with both numbers. (Of the default, a model with a short context sees the beginning.)
    """
    tokens, context = len(prompt_ids(tokenizer, config.study.probe or "")), context_length(model)
    if tokens < 2:
        raise InputError("study.probe: has one token only, and so none to predict; give a longer text")
    if context is not None and tokens - 1 > context and config.study.probe != PROBE:
        raise InputError(f"study.probe: has {tokens} tokens, the model sees {context}; give a shorter text")


@torch.no_grad()
def measure(run: "Run") -> dict[str, Any]:
    """The probe's tokens, their losses and what was likeliest, as study.jsonl has them. All processes call this."""
    text, device = run.config.study.probe or "", run.accelerator.device
    context = context_length(run.model)
    ids = prompt_ids(run.data.tokenizer, text)[: None if context is None else context + 1]
    losses: list[float] = []
    likeliest: list[list[tuple[int, float]]] = []

    def visit(logits: torch.Tensor, targets: torch.Tensor) -> None:
        log_p = logits.log_softmax(-1)
        losses.extend((-log_p.gather(1, targets[:, None])[:, 0]).tolist())
        top = log_p.exp().topk(min(_LIKELIEST, log_p.shape[1]))
        for tokens, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            likeliest.append(list(zip(tokens, probabilities, strict=True)))

    tokens = torch.tensor([ids], device=device)
    training = run.objective.training
    run.objective.eval()
    with building.without_compile(run.config):
        run.objective(tokens[:, :-1], tokens[:, 1:], visit=visit)
    run.objective.train(training)
    decode = run.data.tokenizer.decode
    return {
        "text": text,
        "tokens": strings(run.data.tokenizer, ids),
        "losses": [None, *losses],
        "top": [None, *([[decode([token]), probability] for token, probability in each] for each in likeliest)],
    }
