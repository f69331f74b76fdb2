"""The balance of experts: against Transformers' own function, one layer and one sequence at a time, in float64."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.support.runs import MIXTRAL, TINY_MODELS, Command, events, forget_accelerator
from train_loop import job
from train_loop.analysis.trial_step import evaluating
from train_loop.config.load import config_from_arguments
from train_loop.data.loader import IGNORED
from train_loop.errors import InputError
from train_loop.models import experts
from train_loop.models.activation_checkpointing import recompute
from train_loop.models.experts import sequence_balance
from train_loop.training.objective import Objective

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 60}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
}
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 5, "head_dim": 16},
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 3},
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 16},
    "granitemoe": {"model_type": "granitemoe", "num_local_experts": 4, "logits_scaling": 2.0},  # not the fused loss
    "deepseek_v3": DEEPSEEK,
}


def made(name: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SPECIAL, **(SMALL | TYPES[name] | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for key, each in model.named_parameters():
            if "router" in key or "gate.weight" in key:
                each.mul_(20)  # so that experts are not used alike
    return model


def batch(rows: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets; the first row has some without one, the last one none at all."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, 60, (rows, length), generator=draw)
    targets = inputs.roll(-1, 1)
    targets[0, [0, 3, 4, -1]] = IGNORED
    targets[-1] = IGNORED
    return inputs, targets


def logits_of(model: PreTrainedModel, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The routers' scores before softmax [tokens, experts] of each layer."""
    found: list[torch.Tensor] = []
    gates = [each for each in model.modules() if type(each).__name__.endswith(("Router", "Gating"))]
    for gate in gates:
        weight = gate.weight if hasattr(gate, "weight") else gate.layer.weight
        bias = getattr(gate, "bias", None)
        gate.register_forward_pre_hook(
            lambda module, given, weight=weight, bias=bias: found.append(
                torch.nn.functional.linear(given[0].reshape(-1, weight.shape[1]), weight, bias)
            )
        )
    model(input_ids=inputs, use_cache=False)
    return found


def oracle(model: PreTrainedModel, name: str, inputs: torch.Tensor, targets: torch.Tensor, weight: float) -> Any:
    """nll, sum over sequences of targets x mean over layers of Transformers' balance, in float64; the gradient."""
    double = copy.deepcopy(model).double()
    double.config._experts_implementation = "eager"  # the others have no float64
    total: Any = 0.0
    top = double.config.num_experts_per_tok
    gates = logits_of(double, inputs)
    for row in range(len(inputs)):
        real = targets[row] != IGNORED
        of_layers = []
        for each in gates:
            gate = each.view(*inputs.shape, -1)[row]
            if name == "deepseek_v3":  # sigmoids, which add up to 1: softmax of their logarithms
                gate = (gate.sigmoid() / gate.sigmoid().sum(-1, keepdim=True)).log()
            if real.any():
                own = load_balancing_loss_func((gate,), gate.shape[-1], top, real[None].long())
                of_layers.append(own)
        if of_layers:
            total = total + real.sum() * torch.stack(of_layers).mean()
    logits = double(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    (nll + weight * total).backward()
    return float(nll.detach()), float(total.detach()), {name: each.grad for name, each in double.named_parameters()}


@pytest.mark.parametrize("name", TYPES)
def test_loss_stays_and_gradient_gains_transformers_own_balance(name: str) -> None:
    model, (inputs, targets) = made(name), batch()
    nll, total, gradients = oracle(model, name, inputs, targets, weight=0.7)
    found = experts.find(model, 0.7)
    assert found is not None
    objective = Objective(model, experts=found).train()
    assert objective.loss_path == ("logits" if name == "granitemoe" else "fused")
    loss = objective(inputs, targets)
    assert loss.item() == Objective(model)(inputs, targets).item()  # to the bit
    loss.backward()
    assert loss.item() == pytest.approx(nll, rel=1e-5)
    assert [float(each) for each in found.sums] == [pytest.approx(total, rel=1e-5)]
    largest = max(float(each.abs().max()) for each in gradients.values() if each is not None)
    for key, each in model.named_parameters():
        if gradients[key] is not None:
            torch.testing.assert_close(each.grad.double(), gradients[key], rtol=1e-4, atol=1e-5 * largest)


def test_balance_of_a_sequence_is_transformers_function_of_it() -> None:
    """Ignored positions are those that its attention mask leaves out."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, 6, generator=draw, dtype=torch.float64) * 2
    real = torch.rand(4, 9, generator=draw) < 0.6
    for top in (1, 2, 5):
        ours, whole = (sequence_balance(logits.softmax(-1), each, top) for each in (real, torch.ones_like(real)))
        for row in range(4):
            assert float(whole[row]) == pytest.approx(float(load_balancing_loss_func((logits[row],), 6, top)), rel=1e-6)
            theirs = load_balancing_loss_func((logits[row],), 6, top, real[row][None].long())
            assert float(ours[row]) == pytest.approx(float(theirs), rel=1e-6)  # it counts in fp32
    assert float(sequence_balance(torch.full((1, 6, 6), 1 / 6), torch.ones(1, 6).bool(), 2)) == pytest.approx(2)


def test_two_layers_that_collapse_on_other_experts_do_not_look_balanced() -> None:
    """What Transformers' function, pooled over layers, takes for perfect."""
    first = torch.tensor([9.0, 9, 0, 0]).expand(1, 8, 4)
    layers, real = (first, first.flip(-1)), torch.ones(1, 8).bool()
    assert float(load_balancing_loss_func(tuple(each[0] for each in layers), 4, 2)) == pytest.approx(2, abs=0.01)
    for each in layers:
        assert float(sequence_balance(each.softmax(-1), real, 2)) == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize("choice", ["full", 2, "attention"])
def test_recomputed_activations_count_once_with_the_same_gradient(choice: int | str) -> None:
    gradients = []
    for chosen in ("none", choice):
        model, (inputs, targets) = made("mixtral", attention_dropout=0.1), batch()
        recompute(model, chosen)
        found = experts.find(model, 0.5)
        assert found is not None
        objective = Objective(model, experts=found).train()
        torch.manual_seed(3)
        objective(inputs, targets).backward()
        assert len(found.sums) == 1
        assert not found._outputs  # nothing is kept of the layers that ran again
        gradients.append([found.sums[0], *(each.grad for each in model.parameters())])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_layers_are_balanced_alike_and_share_their_code() -> None:
    """There are more layers than torch would compile the same code for."""
    found_gradients = []
    for compiled in (False, True):
        model, (inputs, targets) = made("mixtral", num_hidden_layers=10), batch()
        model.config._experts_implementation = "eager"  # some versions cannot trace the others in fp32
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for layer in model.model.layers if compiled else ():
            layer.compile(dynamic=False, backend="eager")
        found = experts.find(model, 0.5)
        assert found is not None
        Objective(model, experts=found).train()(inputs, targets).backward()
        assert len(found.sums) == 1
        assert bool(torch._dynamo.utils.counters["stats"]) == compiled
        assert not torch._dynamo.utils.counters["recompile_limit"]
        found_gradients.append([found.sums[0], *(each.grad for each in model.parameters())])
    torch._dynamo.reset()
    for plain, other in zip(*found_gradients, strict=True):
        torch.testing.assert_close(plain, other)


def test_evaluation_does_not_count() -> None:
    model, (inputs, targets) = made("mixtral"), batch()
    found = experts.find(model, 0.5)
    assert found is not None
    objective = Objective(model, experts=found).train()
    with evaluating(objective):
        objective(inputs, targets)
        objective(inputs, targets, statistics=True)
        assert not found._outputs
    with torch.no_grad():
        objective(inputs, targets)
    assert not found.sums
    assert not found._outputs


def test_balance_is_fp32_under_autocast() -> None:
    model, (inputs, targets) = made("mixtral"), batch()
    found = experts.find(model, 0.5)
    assert found is not None
    objective = Objective(model, experts=found).train()
    with torch.autocast("cpu", torch.bfloat16):
        seen: list[torch.Tensor] = []
        with found.watched(lambda name, routed: seen.append(routed.scores)):
            objective(inputs, targets).backward()
    assert {each.dtype for each in [*seen, *found.sums]} == {torch.float32}
    assert all(float((each.sum(-1) - 1).abs().max()) < 1e-5 for each in seen)


@pytest.mark.parametrize("name", TYPES)
def test_routers_are_found_and_understood(name: str) -> None:
    model = made(name)
    found = experts.find(model)
    assert found is not None
    model.eval()(input_ids=batch()[0], use_cache=False)
    assert len(found.routers) == 2
    assert {each.top for each in found.routers.values()} == {model.config.num_experts_per_tok}
    assert {each.experts for each in found.routers.values()} == {5 if name == "qwen3_moe" else 4}
    kinds = {each.kind for each in found.routers.values()} - {"probabilities"}  # which some versions put out
    assert kinds <= {"sigmoid" if name == "deepseek_v3" else "softmax"}


def test_a_router_that_begins_with_zeros_is_understood_too() -> None:
    """Its weights are all the same, whatever makes them; then its code tells."""
    for name, kind in (("deepseek_v3", "sigmoid"), ("gpt_oss", "softmax")):
        model = made(name)
        with torch.no_grad():
            for key, each in model.named_parameters():
                if "gate.weight" in key or "router" in key:
                    each.zero_()
        found = experts.find(model)
        assert found is not None
        model.eval()(input_ids=batch()[0], use_cache=False)
        assert {each.kind for each in found.routers.values()} == {kind}


def test_router_tells_what_it_chose_though_a_bias_decided() -> None:
    model = made("deepseek_v3", n_group=1)
    for each in model.modules():
        if hasattr(each, "e_score_correction_bias"):
            each.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 9.0]))
    found = experts.find(model)
    assert found is not None
    seen: list[Any] = []
    model.eval()(input_ids=batch()[0], use_cache=False)
    if any(each.chooses is None for each in found.routers.values()):
        pytest.skip("this version's routers keep their choice to themselves")
    with found.watched(lambda name, routed: seen.append(routed)):
        model(input_ids=batch()[0], use_cache=False)
    assert all(bool((each.chosen == 3).any(-1).all()) for each in seen)


@pytest.mark.parametrize(
    ("name", "changes", "asked", "weight"),
    [
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.25}, None, 0.25),
        ("mixtral", {"output_router_logits": False, "router_aux_loss_coef": 0.25}, None, 0.0),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.25}, 0.5, 0.5),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.25}, 0.0, 0.0),
        ("deepseek_v3", {"output_router_logits": True}, None, 0.0),  # has none of its own
    ],
)
def test_weight_is_the_configurations_own_by_default(
    name: str, changes: dict[str, Any], asked: float | None, weight: float
) -> None:
    found = experts.find(made(name, **changes), asked)
    assert found is not None
    assert found.weight == weight


def test_a_model_that_is_trained_again_is_only_watched_once() -> None:
    model, (inputs, targets) = made("mixtral"), batch()
    first, second = experts.find(model, 0.5), experts.find(model, 0.5)
    assert first is not None and second is not None
    Objective(model, experts=second).train()(inputs, targets)
    assert not first._outputs and len(second.sums) == 1
    assert experts.find(model, 0.0) is not None
    model(input_ids=inputs)
    hooked = [each for module in model.modules() for each in (module._forward_hooks, module._forward_pre_hooks)]
    assert not any(hooked)  # nothing stays where nothing is balanced


def test_model_without_experts_has_no_balance() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SPECIAL, **TINY_MODELS["gpt2"]))
    assert experts.find(model) is None
    assert experts.find(model, 0.0) is None
    with pytest.raises(InputError, match=r"model.balance_weight: GPT2LMHeadModel has no router"):
        experts.find(model, 0.01)


def test_experts_that_no_router_scores_for_each_token_are_refused() -> None:
    """Doge looks up experts by two halves of their numbers."""
    shape = SMALL | {"model_type": "doge", "is_moe": True, "num_experts": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SPECIAL, **shape)).eval()
    try:
        model(input_ids=batch()[0], use_cache=False)
    except TypeError:
        pytest.skip("this version of Transformers cannot run it")
    assert experts.find(model, 0.1) is not None
    with pytest.raises(InputError, match=r"model.balance_weight: DogeForCausalLM has no router"):
        model(input_ids=batch()[0], use_cache=False)


@pytest.mark.parametrize("own", [-1.0, float("nan"), "much"])
def test_configurations_own_weight_is_checked(own: Any) -> None:
    model = made("mixtral", output_router_logits=True)
    model.router_aux_loss_coef = own
    with pytest.raises(InputError, match="router_aux_loss_coef"):
        experts.find(model)


def test_balance_keeps_all_experts_in_use_and_without_it_some_never_are(
    settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Two of eight experts have a head start."""
    shares, losses = {}, {}
    for weight in (0.0, 0.3):
        forget_accelerator()
        changes: dict[str, Any] = {"train__max_steps": 40, "study__every": 40, "evaluation__every": 40}
        folder = tmp_path / str(weight)
        config = config_from_arguments(settings(run__output_dir=folder, model__balance_weight=weight, **changes))
        config.model.architecture = None
        torch.manual_seed(0)
        sizes = SMALL | TYPES["gpt_oss"] | {"num_local_experts": 8}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SPECIAL | {"vocab_size": 512}, **sizes))
        with torch.no_grad():
            for name, each in model.named_parameters():
                if name.endswith("router.bias"):
                    each[:2] += 0.5
        job.train(config, model=model)
        lines = map(json.loads, (folder / "study.jsonl").read_text(encoding="utf-8").splitlines())
        (found,) = [each["experts"] for each in lines if each["event"] == "statistics"]
        shares[weight] = [each["tokens"] for each in found.values()]
        losses[weight] = [each.get("balance_loss") for each in events(folder, "step")]
    for without, balanced in zip(shares[0.0], shares[0.3], strict=True):
        assert sum(share < 0.01 for share in without) >= 2
        assert min(balanced) > 0.05
    assert losses[0.0] == [None] * 40
    assert losses[0.3][0] > 2.5 > 2.2 > losses[0.3][-1] > 2


def test_model_with_a_balance_of_its_own_trains(command: Command, settings: Callable[..., list[str]]) -> None:
    """The reported loss is the language model's; the truth sheet compares it with the model's own, without balance."""
    shape = json.dumps(MIXTRAL | {"output_router_logits": True, "router_aux_loss_coef": 0.5})
    arguments = settings(model__architecture=shape, train__max_steps=2)
    assert command("train", *arguments) == 0, command.err
    assert "2 of 4 for each token, in each of 2 routers" in command.err and "balanced with weight 0.5" in command.err
    folder = Path(arguments[arguments.index("--run.output_dir") + 1])
    truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    assert truth["experts"]["weight"] == 0.5 and truth["loss"]["difference"] < 1e-5
    steps = events(folder, "step")
    assert all(2 <= each["balance_loss"] <= 4 for each in steps)
    assert steps[0]["loss"] == pytest.approx(truth["loss"]["value"], rel=0.1)  # not half a balance, about 1, higher
    assert json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))["output_router_logits"]
    assert not any("balance_loss" in each for each in events(folder, "evaluation"))
    other = [*arguments, "--model.balance_weight", "0.25", "--train.max_steps", "3"]
    assert command("train", *other) == 2
    assert "model.balance_weight: None -> 0.25" in command.err


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        ("0.01", "model.balance_weight: GPT2LMHeadModel has no router that scores experts"),
        ("-1", "balance_weight: expected a number >= 0"),
        ("nan", "balance_weight: expected a number >= 0"),
        ("inf", "balance_weight: expected a number >= 0"),
        ("much", "balance_weight: expected a number >= 0"),
    ],
)
def test_a_weight_that_cannot_be_is_one_line(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, weight: str, says: str
) -> None:
    assert command("train", *settings(model__balance_weight=weight)) == 2
    lines = [line for line in command.err.splitlines() if line.startswith("train-loop: ")]
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "run").exists()
