"""The registry and the choice: auto's reasons, unknown names, and backends that a strategy cannot serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import batch, gpt2, llama

import refkl
from refkl import ReferenceConfig, build_reference
from refkl.backend import Backend
from refkl.reference import BuildRequest, CloneReference, choose


def test_auto_says_why() -> None:
    full = refkl.build_reference(llama())
    assert full.strategy == "clone" and "140.4 kB" in full.reason
    lora = refkl.build_reference(get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"])))
    assert lora.strategy == "adapter" and "fresh" in lora.reason


def test_unknown_names_give_the_nearest() -> None:
    known = "adapter, auto, clone, fsdp2, shared_trunk, swap, zero3"
    with pytest.raises(ValueError, match=rf"Did you mean 'clone'\? Known: {known}"):
        refkl.build_reference(llama(), "clones")


def test_a_strategy_that_cannot_work_here_names_the_one_that_can() -> None:
    with pytest.raises(ValueError, match=r"ZeRO-3, and this is plain on 1 process\. Use 'clone' instead"):
        refkl.build_reference(llama(), "zero3")


def test_registering_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refkl.reference.registry.STRATEGIES", dict(refkl.STRATEGIES))
    with pytest.raises(ValueError, match="exists already"):
        refkl.register_strategy("clone", CloneReference)
    with pytest.raises(ValueError, match="subclass"):
        refkl.register_strategy("mine", dict)  # type: ignore[arg-type]

    class Mine(CloneReference):
        strategy = "mine"

    refkl.register_strategy("mine", Mine)
    assert refkl.build_reference(llama(), "mine").strategy == "mine"


def test_what_auto_leaves_to_a_name_is_named() -> None:
    """All weights train, so auto takes a copy, which under ZeRO-3 has no device of its own; swap has."""
    request = BuildRequest(llama(), ReferenceConfig(device="cpu"), Backend("zero3", 2), None)
    with pytest.raises(ValueError, match=r"'auto' finds no strategy .* on zero3 .*; asked for by name, 'swap' can:"):
        choose(request)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    ("device", "match"),
    [
        ("cuda" if not torch.cuda.is_available() else "xpu", "but torch finds (no accelerator|only cuda devices)"),
        ("cuda:99", "but (torch finds no accelerator|this process sees)"),
        ("meta", "reference.device is 'meta', but torch finds"),
        ("gpu", "reference.device 'gpu' is not a device. Use 'cpu'"),
        ("", "reference.device '' is not a device"),
    ],
)
def test_a_device_that_is_not_here_is_refused(device: str, match: str, make: Any) -> None:
    for strategy in ("clone", "auto"):
        with pytest.raises(ValueError, match=match):
            build_reference(make(), ReferenceConfig(strategy=strategy, device=device))
    assert build_reference(make(), ReferenceConfig(strategy="clone", device="cpu")).score(batch()).logp.isfinite().all()
