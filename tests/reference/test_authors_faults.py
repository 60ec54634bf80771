"""Mistakes in a user's strategy that would train against the wrong reference, or ignore a setting, are refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from support.models import batch, llama
from support.train_inputs import write_config
from torch import nn

import refkl
from refkl import HeldReference, Reference, ReferenceConfig, build_reference, register_strategy, score_tokens
from refkl.backend import Weight, unwrap, weights_of
from refkl.cli import main
from refkl.reference import BuildRequest, Cost, frozen_copy
from refkl.types import MemoryReport


@dataclass
class Settings:
    layers: bool = False
    rows: int | None = None
    share: float = 1.0


class Mine(HeldReference):
    strategy, Options = "mine", Settings
    copied: Callable[[nn.Module], Any] = staticmethod(copy.deepcopy)

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        return None

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        return "it was asked for"

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        return Cost(0, 0)

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> Any:
        made = cls(request, reason, "a copy")
        made.model = cls.copied(unwrap(request.policy))
        if made.model is None:
            return None
        made.fingerprint()
        return made

    model: Any

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        yield self.model

    def weights(self) -> Iterator[Weight]:
        return weights_of(self.model)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refkl.reference.registry.STRATEGIES", dict(refkl.STRATEGIES))
    register_strategy("mine", Mine)


def closure(policy: nn.Module) -> None:
    forward = policy.forward
    policy.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]


def wrapped(policy: nn.Module) -> None:
    held = {"forward": policy.forward}

    @functools.wraps(policy.forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return held["forward"](*args, **kwargs)

    policy.forward = run  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [closure, wrapped])
def test_a_copy_that_runs_the_policy(change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = llama()
    before = score_tokens(policy, batch()).logp.detach()
    change(policy)
    with pytest.raises(ValueError, match=r"The module model of reference strategy 'mine' runs the policy"):
        build_reference(policy, "mine")
    monkeypatch.setattr(Mine, "copied", staticmethod(lambda policy: frozen_copy(policy, share=False)[0]))
    reference = build_reference(policy, "mine")
    with torch.no_grad():
        policy.lm_head.weight.mul_(2.0)  # type: ignore[union-attr, operator]
    assert torch.equal(reference.score(batch()).logp, before)


def test_accelerates_forward_is_bound_to_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """deepcopy binds a method to the copy, so this is the copy's own."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(PartialState, "_shared_state", {})
    policy = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(llama(), evaluation_mode=True)
    before = score_tokens(policy, batch()).logp.detach()
    reference = build_reference(policy, "mine")
    with torch.no_grad():
        policy.lm_head.weight.mul_(2.0)
    assert torch.allclose(reference.score(batch()).logp, before, atol=0.05)


def test_what_build_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mine, "copied", staticmethod(lambda policy: None))
    with pytest.raises(ValueError, match=r"Mine.build must return a Reference, but returned a NoneType"):
        build_reference(llama(), "mine")


def test_a_class_that_lacks_methods() -> None:
    class Half(HeldReference):
        strategy = "half"

    with pytest.raises(ValueError, match=r"Half lacks activate, .*weights"):
        register_strategy("half", Half)

    class Nameless(Reference):
        strategy = "nameless"
        supports, why, cost, build, score = Mine.supports, Mine.why, Mine.cost, Mine.build, Mine.score

    with pytest.raises(ValueError, match=r"Nameless lacks identity\."):
        register_strategy("nameless", Nameless)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "yes"}, "layers is 'yes' of type str, but strategy 'mine' takes bool"),
        ({"layers": 1}, "layers is 1 of type int"),
        ({"rows": 1.5}, "rows is 1.5 of type float, but strategy 'mine' takes int or null"),
        ({"share": "all"}, "share is 'all' of type str, but strategy 'mine' takes float"),
        ({"rows": None, "share": 1, "layers": True}, None),
    ],
)
def test_options_have_their_types(options: dict[str, Any], message: str | None) -> None:
    config = ReferenceConfig(strategy="mine", options=options)
    if message is None:
        build_reference(llama(), config)
        return
    with pytest.raises(ValueError, match=message):
        build_reference(llama(), config)


@pytest.mark.parametrize(
    "setting", [{"dtype": "bfloat16"}, {"source": "pretrained"}, {"offload": True}, {"device": "cpu"}]
)
def test_a_setting_that_the_class_does_not_list_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"it takes no reference.{next(iter(setting))}"):
        build_reference(llama(), ReferenceConfig(strategy="mine", **setting))


def test_memory_is_that_of_the_weights() -> None:
    reference = build_reference(llama(), "mine")
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for _, p, _ in reference.weights()}
    assert reference.memory() == MemoryReport(device=sum(held.values()), host=0)


def test_modules_to_import_are_named_in_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registers_one.py").write_text("imported = True\nraise ValueError('registers_one was imported')\n")
    config = write_config(tmp_path, reference={"strategy": "mine2"})
    assert main(["check", str(config)]) == 2
    assert "list it in imports" in " ".join(capsys.readouterr().err.split())
    assert main(["check", str(write_config(tmp_path)), "--imports", "[registers_one]"]) == 2
    assert "registers_one was imported" in capsys.readouterr().err
    assert main(["check", str(write_config(tmp_path, imports=["registers_one"]))]) == 2
    assert "registers_one was imported" in capsys.readouterr().err
    assert main(["check", str(write_config(tmp_path, imports=["no_such_module"]))]) == 2
    assert "imports names 'no_such_module', and importing it failed" in capsys.readouterr().err
