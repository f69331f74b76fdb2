"""Products by any library: torch's own numbers, for whoever is fp32 on a CPU, and torch itself for all others."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import PATHS, batch, configured
from train_loop.data import tokenizer
from train_loop.models import building
from train_loop.ops import cpu, cross_entropy, products
from train_loop.training.objective import Objective


def build(kind: str, tokenizer_folder: Path) -> Any:
    built = building.build(configured(PATHS[kind][0]), tokenizer.load(str(tokenizer_folder))).eval()
    torch.manual_seed(0)
    for parameter in built.parameters():
        if parameter.dim() == 1:  # biases are zeros at first
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return built


def gradients(built: Any, tied: cpu.TiedGradient | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    names, parameters = zip(*built.named_parameters(), strict=True)
    module = Objective(built)
    module.tied = tied
    nll = module(*batch())
    return nll.detach(), dict(zip(names, torch.autograd.grad(2 * nll, parameters), strict=True))


@pytest.mark.parametrize("library", products.available())
@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "qwen3", "gpt_neox", "phi"])
def test_loss_and_gradients_are_torchs(
    kind: str, library: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(kind, tokenizer_folder)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "fits", lambda *tensors: False)
        expected, theirs = gradients(built)
    cpu.use_products(built)
    used: list[int] = []
    forward = products.forward
    monkeypatch.setattr(products, "forward", lambda *arguments: used.append(0) or forward(*arguments))
    monkeypatch.setattr(products, "choice", lambda: products.by_one(library))
    monkeypatch.setattr(cross_entropy, "_CPU_CHUNK", 50)  # two chunks: gradients are added up
    found, mine = gradients(built)
    assert len(used) > 10
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=2e-5, msg=lambda text, at=name: at + text)
    # Autocast and other devices' and dtypes' tensors are none of its business.
    used.clear()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # which would keep casts without gradients
        gradients(built)
    built.to(torch.float64)(batch()[0])
    assert not used


def kept(built: Any) -> int:
    """Bytes, but for the weights, that a forward pass keeps for the backward pass."""
    weights = {each.untyped_storage().data_ptr() for each in built.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nll = Objective(built)(*batch())
    assert nll.requires_grad  # and so keeps the tensors until here
    return sum(found.values())


def test_the_outputs_of_gelus_and_norms_are_made_again(tokenizer_folder: Path) -> None:
    built = build("gpt2", tokenizer_folder)
    before = kept(built)
    cpu.use_products(built)
    tokens, config = batch()[0].numel(), built.config
    outputs = 4 * tokens * (4 * config.n_embd + 2 * config.n_embd) * config.n_layer  # a GELU's and two norms' a layer
    assert kept(built) == before - outputs
    with torch.no_grad():
        assert not hasattr(built.transformer.ln_f(torch.ones(1, config.n_embd)), "made_from")
    # Changed in place on its way, it is no GELU's any more.
    mlp = built.transformer.h[0].mlp
    mlp.act.register_forward_hook(lambda module, inputs, output: output.mul_(3))
    _, found = gradients(built)
    plain = build("gpt2", tokenizer_folder)
    plain.transformer.h[0].mlp.act.register_forward_hook(lambda module, inputs, output: output.mul_(3))
    _, expected = gradients(plain)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied"])
def test_a_tied_embeddings_gradient_is_added_to_the_heads(
    kind: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(kind, tokenizer_folder)
    _, expected = gradients(built)
    tied = cpu.tie_gradients(built)
    assert tied is not None
    taken: list[torch.Tensor | None] = []
    take = tied.take
    monkeypatch.setattr(tied, "take", lambda: taken.append(tied.waiting) or take())
    _, found = gradients(built, tied)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, at=name: at + text)
    name = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    assert taken[0] is not None and taken[0].data_ptr() == found[name].data_ptr() and tied.waiting is None
    # Where the loss leaves nothing, the embedding makes its own.
    _, alone = gradients(built)
    torch.testing.assert_close(alone[name], expected[name], rtol=1e-5, atol=1e-6)


def test_gradients_of_untied_embeddings_are_left_alone(tokenizer_folder: Path) -> None:
    assert cpu.tie_gradients(build("qwen3", tokenizer_folder)) is None


def test_gelu_is_the_models_own(tokenizer_folder: Path) -> None:
    built = build("gpt2", tokenizer_folder)
    x = torch.linspace(-9, 9, 999)
    fused = [module for module in built.modules() if type(module) is torch.nn.GELU]
    expected = 0.5 * x.double() * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)))
    assert len(fused) == 2
    torch.testing.assert_close(fused[0](x).double(), expected, rtol=1e-5, atol=1e-6)


def test_freed_memory_is_kept_where_the_c_library_is_glibc() -> None:
    glibc = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    assert cpu.keep_freed_memory() == glibc


def test_a_model_may_change_a_products_output_in_place() -> None:
    """As Gemma 3n and RoCBert do."""
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

    def gradients() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        y[..., 0] *= 2
        y += 1
        return torch.autograd.grad((y**2).sum(), tuple(layer.parameters()))

    expected = gradients()
    cpu.use_products(layer)  # type: ignore[arg-type]
    assert isinstance(layer.forward, cpu._Linear)
    for mine, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
