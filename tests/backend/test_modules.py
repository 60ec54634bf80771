"""Walks over a model that every score makes: what torch's own slower ones find, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.models import llama
from torch import Tensor, nn

from refkl.backend import canonical_name, named_weights, parameters_in, submodules


class Shared(nn.Module):
    """A layer under two names, a buffer under two, one that no checkpoint holds, and one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.again = self.outer[0]
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.outer[0].weight
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("made", torch.ones(1), persistent=False)
        self.register_buffer("same", self.kept)
        self.register_buffer("nothing", None)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": llama,
    "shared": Shared,
    "compiled": lambda: torch.compile(llama()),
    "LoRA": lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"])),
    "saved module": lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "prompt": lambda: get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
}


def by_torch(model: nn.Module, *, prompt: bool) -> Iterator[tuple[str, Tensor]]:
    held = model.state_dict(keep_vars=True)
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in held)
    for name, tensor in (*model.named_parameters(), *buffers):
        yield canonical_name(name, prompt=prompt), tensor


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_those_that_a_checkpoint_holds_each_once(kind: str) -> None:
    model = MODELS[kind]()
    found, expected = list(named_weights(model)), list(by_torch(model, prompt=kind == "prompt"))
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert all(own is other for (_, own), (_, other) in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", MODELS)
def test_modules_and_their_parameters_are_all_found(kind: str) -> None:
    model = MODELS[kind]()
    found = submodules(model)
    assert found[0] is model and len(found) == len(set(found)) and set(found) == set(model.modules())
    assert {id(p) for p in parameters_in(found)} == {id(p) for p in model.parameters()}
