"""Recomputed activations: the same losses and gradients, to rounding, with less in memory."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.runs import TINY_MODELS
from train_loop import compat
from train_loop.errors import InputError
from train_loop.models import building
from train_loop.models.activation_checkpointing import in_words, layers, recompute, recomputed
from train_loop.ops import cpu, products
from train_loop.rng import seed_torch
from train_loop.training.objective import Objective

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": TINY_MODELS["gpt2"] | {"n_layer": 3, "n_positions": 128},  # its dropout is 0.1
    "llama": TINY_MODELS["llama"] | {"num_hidden_layers": 3, "attention_dropout": 0.1},
}
CHOICES: list[int | str] = ["full", 2, 3, "attention"]
IDS = torch.randint(0, 320, (2, 128), generator=torch.Generator().manual_seed(1))


def built(shape: dict[str, Any], choice: int | str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, vocab_size=320)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **more)
    building.fuse_activations(model)
    recompute(model, choice)
    return model.train()


def forward(model: PreTrainedModel, fast: bool = True, linear: bool = True) -> torch.Tensor:
    """The loss of a batch with dropout, by the matrix products and the dropout of a CPU if `fast`."""
    objective = Objective(model, cpu.speed_up(model, training=True, linear=linear) if fast else None)
    seed_torch(torch.device("cpu"), "dropout", 1)
    loss: torch.Tensor = objective(IDS, IDS.roll(-1, 1))
    return loss


def same(one: PreTrainedModel, other: PreTrainedModel, **how: Any) -> None:
    """Losses and gradients of two models differ by rounding only."""
    losses = [forward(each, **how) for each in (one, other)]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    found = dict(other.named_parameters())
    assert [name for name, _ in one.named_parameters()] == list(found)
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-5, atol=1e-5 * parameter.grad.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", SHAPES)
def test_losses_and_gradients_are_those_without_recomputation(
    name: str, choice: int | str, fast: bool, attention: str
) -> None:
    how = {"attn_implementation": attention}
    same(built(SHAPES[name], "none", **how), built(SHAPES[name], choice, **how), fast=fast)


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_key_value_heads": 2}
GPT_OSS = TINY_MODELS["llama"] | MIXTURE | {"model_type": "gpt_oss", "attention_dropout": 0.1}


def test_a_layer_may_change_what_a_product_returned() -> None:
    """Kept is what it was before; torch would stop at the first of these, and be wrong with the second."""
    same(built(GPT_OSS, "none"), built(GPT_OSS, "attention"))

    def changing(choice: str) -> PreTrainedModel:
        model = built(SHAPES["llama"], choice)
        for layer in model.base_model.layers:
            gate = layer.mlp.gate_proj
            gate.forward = lambda x, gate=gate: nn.functional.linear(x, gate.weight).add_(x.mean(-1, keepdim=True))
        return model

    same(changing("none"), changing("attention"), fast=False)


def test_a_layer_may_occur_twice_in_half_precision() -> None:
    def gradients(choice: str) -> list[torch.Tensor]:
        model = built(SHAPES["llama"], choice)
        inner: Any = model.base_model.layers
        model.base_model.layers = nn.ModuleList([inner[0], inner[1], inner[0]])
        objective = Objective(model)
        seed_torch(torch.device("cpu"), "dropout", 1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(IDS, IDS)
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients("none")
    for choice in ("full", "attention"):
        for one, other in zip(expected, gradients(choice), strict=True):
            torch.testing.assert_close(other, one, rtol=2**-7, atol=2**-7 * one.abs().max().item())


@pytest.mark.slow
def test_compiled_layers_recompute_as_well_and_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    # What splits the graph in two decides what is computed again; it is the same without a minute of making kernels.
    usual = nn.Module.compile
    quick = {"backend": "aot_eager_decomp_partition", "dynamic": False}
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: usual(module, **quick))

    def compiled(choice: int | str) -> PreTrainedModel:
        torch.compiler.reset()
        counters.clear()
        model = built(SHAPES["gpt2"], choice)
        building.compile_layers(model)
        return model

    plain = compiled("none")
    kept = {"none": kept_bytes(plain, linear=False)}
    graphs = counters["stats"]["unique_graphs"]
    for choice in ("full", "attention"):
        model = compiled(choice)
        kept[choice] = kept_bytes(model, linear=False)
        assert counters["stats"]["unique_graphs"] == graphs
        same(plain, model, linear=False)
        plain.zero_grad()
    assert kept["full"] < kept["attention"] < kept["none"]


def kept_bytes(model: PreTrainedModel, **how: Any) -> int:
    """Bytes that a forward pass has allocated and not freed: what it keeps for the backward pass."""
    forward(model, **how).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward(model, **how)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    del loss
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def saved_bytes(model: PreTrainedModel, **how: Any) -> int:
    """Bytes of the different tensors, weights left out, that autograd was asked to keep and no checkpoint took over."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, **how)
    return sum(kept.values())


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("name", SHAPES)
def test_less_is_kept(name: str, fast: bool) -> None:
    saved = {choice: saved_bytes(built(SHAPES[name], choice), fast=fast) for choice in ("none", 3, 2, "full")}
    assert saved["full"] < saved[2] < saved[3] < saved["none"]
    # What a policy keeps, autograd doesn't see.
    kept = {choice: kept_bytes(built(SHAPES[name], choice), fast=fast) for choice in ("none", "full", "attention")}
    assert kept["full"] < 0.5 * kept["none"] and kept["full"] < kept["attention"] < 0.8 * kept["none"]


@pytest.mark.parametrize("library", products.LIBRARIES)
def test_no_product_is_computed_again_that_is_kept(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library not in products.available():
        pytest.skip(f"no {library} here")
    monkeypatch.setattr(products, "choice", lambda: products.by_one(library))
    operators: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            operators.append(str(operator))
            return operator(*arguments, **(named or {}))

    def counted(choice: str) -> tuple[int, int]:
        loss = forward(built(SHAPES["llama"], choice))
        operators.clear()
        with Count():
            loss.backward()  # type: ignore[no-untyped-call]
        multiply = ("aten.mm.", "aten.addmm.", "mkldnn._linear", "train_loop.openblas")
        return sum(each.startswith(multiply) for each in operators), sum("softmax" in each for each in operators)

    (plain, attention), (again, attention_again) = counted("none"), counted("attention")
    assert again == plain and attention_again > attention
    assert counted("full")[0] > plain or library == products.OPENBLAS


def test_every_so_many_th_layer_is_recomputed_beginning_with_the_first() -> None:
    def chosen(choice: int | str) -> list[bool]:
        found = built(SHAPES["gpt2"] | {"n_layer": 5}, choice).transformer.h
        return ["forward" in vars(layer) for layer in found]

    assert chosen(2) == [True, False, True, False, True] and chosen(5) == [True, *[False] * 4]
    assert all(chosen("full")) and all(chosen(1)) and all(chosen("attention")) and not any(chosen("none"))


def test_nothing_is_read_or_renamed_and_a_later_choice_replaces_an_earlier_one() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["llama"], vocab_size=320))
    names, described = list(model.state_dict()), model.config.to_dict()
    enable = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{enable}_checkpointing_enable")({"use_reentrant": True})  # by itself, as a script's model may
    assert recomputed(model) == "full"
    for choice in ("full", 2, "attention", 3):
        recompute(model, choice)
        assert recomputed(model) == choice and not compat.checkpoints_activations(model)
        assert list(model.state_dict()) == names and model.config.to_dict() == described
    recompute(model, "none")
    assert recomputed(model) is None and not any("forward" in vars(each) for each in model.modules())


def test_without_gradients_or_training_nothing_is_recomputed() -> None:
    model = built(SHAPES["gpt2"], "full")
    objective = Objective(model)
    calls: list[bool] = []
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: calls.append(torch._C._current_graph_task_id() != -1))
    with torch.no_grad():
        objective(IDS, IDS)
    objective.eval()(IDS, IDS).backward()
    assert calls == [False, False]


def test_layers_are_found_by_the_list_that_they_stand_in() -> None:
    """Transformers names embeddings among what must not be split; layers within layers count once."""
    roberta = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = built(roberta | {"intermediate_size": 64, "is_decoder": True}, "full")
    assert [[type(each).__name__ for each in stack] for stack in layers(model)] == [["RobertaLayer"] * 2]
    assert recomputed(model) == "full" and "forward" not in vars(model.roberta.embeddings)


def test_what_cannot_be_done_is_refused() -> None:
    shape = {"model_type": "ctrl", "n_embd": 32, "n_head": 2, "n_layer": 2, "dff": 64}
    with pytest.raises(InputError, match="which parts of CTRLLMHeadModel are its layers is unknown; use none"):
        built(shape, "attention")
    assert recomputed(built(shape, "none")) is None
    with pytest.raises(InputError, match=r"activation_checkpointing 4: the model has only 3 layers; use at most 3"):
        built(SHAPES["llama"], 4)


def test_a_truth_sheet_reads_as_before() -> None:
    assert [in_words(each) for each in (False, "none", True, "full", 1)] == ["", "", *[", activations recomputed"] * 3]
    assert in_words(3) == ", activations recomputed, of one layer in 3" and in_words("attention")
