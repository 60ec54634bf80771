"""The cache tells models apart that differ beside their weights and configuration, or refuses what it cannot see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import batch, gpt2, llama
from torch import Tensor, nn

from refkl import Reference, ReferenceConfig, build_reference
from refkl.reference.cached.structure import structure


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) * 2.0


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) * 3.0


Tripled.__qualname__ = Doubled.__qualname__  # as a class that was edited between two runs


def _with(activation: nn.Module) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
            if hasattr(layer.mlp, "act_fn"):
                layer.mlp.act_fn = activation
            else:
                layer.mlp.act = activation

    return change


def _scaled(model: nn.Module) -> None:
    model.model.layers[0].self_attn.scaling *= 2.0


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "as it was made": lambda model: None,
    "another activation": _with(nn.ReLU()),
    "a setting of the activation": _with(nn.LeakyReLU(0.1)),
    "another setting": _with(nn.LeakyReLU(0.2)),
    "code of the user's own": _with(Doubled()),
    "code that was edited": _with(Tripled()),
}


def _cached(policy: nn.Module, folder: Path, strategy: str = "clone") -> Reference:
    return build_reference(policy, ReferenceConfig(strategy=strategy, cache=str(folder)))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_models_of_the_same_weights_that_compute_something_else(make: Callable[[], Any], tmp_path: Path) -> None:
    changes = CHANGES | ({"a number that a layer reads": _scaled} if make is llama else {})
    found: dict[str, Tensor] = {}
    for name, change in changes.items():
        torch.manual_seed(0)
        policy = make()
        change(policy)
        right = build_reference(policy, "clone").score(batch()).logp
        reference = _cached(policy, tmp_path)
        assert torch.equal(reference.score(batch()).logp, right), name
        assert reference.cache is not None and reference.cache.stats.misses == 3, name
        found[name] = right
    values = list(found.values())
    assert all(not torch.equal(a, b) for n, a in enumerate(values) for b in values[:n])


def test_the_same_model_is_found_whatever_holds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama()
    first = _cached(base, tmp_path)
    right = first.score(batch()).logp
    assert first.cache is not None
    first.cache.write()
    torch.manual_seed(0)
    policy = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    second = _cached(policy, tmp_path, "adapter")
    assert torch.equal(second.score(batch()).logp, right)
    assert second.cache is not None and second.cache.stats.hits == 3


def _hooked(model: nn.Module) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output)


def _replaced(model: nn.Module) -> None:
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: own(x) * 2.0


@pytest.mark.parametrize(("change", "what"), [(_hooked, "forward hook"), (_replaced, "replaced forward")])
def test_what_cannot_be_seen_is_refused(change: Callable[[nn.Module], None], what: str, tmp_path: Path) -> None:
    policy = llama()
    change(policy)
    with pytest.raises(ValueError, match=rf"layers\.0.* has a {what} of tests"):
        _cached(policy, tmp_path, "swap").score(batch())


def test_dropout_and_hooks_of_known_libraries_change_nothing() -> None:
    policy = llama()
    before = structure(policy)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.enable_input_require_grads()
    assert structure(policy) == before
