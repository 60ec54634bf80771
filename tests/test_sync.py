"""When a reference moves: schedules in steps of the optimizer, resets, and what the first reference would say."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapters import lora, moved, scored
from support.launching import accelerate_launch
from support.models import batch, llama
from support.own_loop import OWN_LOOP
from support.trl_runs import dpo, grpo, logged
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import BEMACallback

from refkl import KLConfig, ReferenceSync, SyncConfig, SyncReferenceCallback, build_reference, kl, score_tokens
from refkl.backend import named_weights
from refkl.sync import reset_optimizer
from refkl.trl import KLDPOTrainer, KLGRPOTrainer

# in a loop of one's own


def steps(sync: ReferenceSync, policy: nn.Module, count: int, kls: list[float] | None = None) -> list[int]:
    """The steps at which it moved."""
    for number in range(count):
        moved(policy, 0.01)
        sync.step(policy, kl=None if kls is None else kls[number])
    return [update["step"] for update in sync.updates]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SyncConfig(every=3), [3, 6, 9]),
        (SyncConfig(every=1, alpha=0.01), list(range(1, 11))),
        (SyncConfig(every=3, warmup=2), [5, 8]),
        (SyncConfig(every=1, warmup=8), [9, 10]),
        (SyncConfig(every=4, average="bema"), [4, 8]),
    ],
    ids=str,
)
def test_it_moves_when_the_schedule_says(config: SyncConfig, expected: list[int]) -> None:
    policy = llama()
    sync = ReferenceSync(build_reference(policy, "clone"), config)
    assert steps(sync, policy, 10) == expected
    assert sync.reference.updates == len(expected)
    assert config.average == "bema" or {u["alpha"] for u in sync.updates} == {config.settled().alpha}


def test_defaults_are_the_soft_variants_recommendation() -> None:
    assert (SyncConfig().every, SyncConfig().settled().alpha) == (512, 0.6)


def test_a_moving_average_is_the_recursion_written_out() -> None:
    policy = llama()
    sync = ReferenceSync(build_reference(policy, "clone"), SyncConfig(every=1, alpha=0.1))
    weight = policy.model.layers[0].mlp.up_proj.weight
    average = weight.detach().double().clone()
    for _ in range(20):
        moved(policy, 0.1)
        sync.step(policy)
        average += 0.1 * (weight.detach().double() - average)
    found = sync.reference.model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(found.double(), average, rtol=0, atol=1e-5)


def test_a_reset_when_the_kl_has_passed_the_limit() -> None:
    policy = llama()
    config = SyncConfig(every=None, max_kl=0.5, warmup=2)
    sync = ReferenceSync(build_reference(policy, "clone"), config)
    assert steps(sync, policy, 6, [9.0, 9.0, 0.4, 0.6, 0.5, 0.7]) == [4, 6]
    assert sync.updates[0] == {"step": 4, "alpha": 1.0, "kl": 0.6}
    assert torch.equal(sync.reference.score(batch()).logp, scored(policy))
    both = ReferenceSync(build_reference(policy, "clone"), SyncConfig(every=2, alpha=0.5, max_kl=0.5))
    assert steps(both, policy, 6, [0.1, 0.1, 9.0, 9.0, 0.1, 0.1]) == [2, 3, 4, 6]
    assert [u["alpha"] for u in both.updates] == [0.5, 1.0, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"max_kl needs the KL of each step: pass kl="):
        ReferenceSync(build_reference(policy, "clone"), config).step(policy)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor", "RMSprop", "NAdam", "Rprop", "ASGD"])
def test_a_reset_optimizer_goes_on_as_a_new_one(kind: str) -> None:
    options = {"lr": 0.05, **({"momentum": 0.9, "dampening": 0.5} if kind == "SGD" else {})}
    first, second = (nn.Linear(3, 3) for _ in range(2))
    used = getattr(torch.optim, kind)(first.parameters(), **options)

    def step(model: nn.Module, optimizer: Any, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()

    for seed in range(3):
        step(first, used, seed)
    second.load_state_dict(first.state_dict())
    fresh = getattr(torch.optim, kind)(second.parameters(), **options)
    reset_optimizer(used)
    for seed in range(3, 6):
        step(first, used, seed)
        step(second, fresh, seed)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_optimizer_is_reset_with_the_reference() -> None:
    policy = llama()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    sync = ReferenceSync(
        build_reference(policy, "clone"), SyncConfig(every=2, max_kl=0.5, reset_optimizer=True), optimizer
    )
    for kl_now, reset in ((0.1, False), (0.1, False), (0.9, True)):
        optimizer.zero_grad()
        score_tokens(policy, batch()).logp.sum().backward()
        optimizer.step()
        sync.step(policy, kl=kl_now)
        assert (not optimizer.state) == reset
    for steps in (0, 5):  # also where it goes on from a state
        again = ReferenceSync(build_reference(policy, "clone"), sync.config)
        again.load_state_dict({"steps": steps, "updates": [], "first_kl": []})
        with pytest.raises(ValueError, match=r"reset_optimizer needs the optimizer"):
            again.step(policy, kl=0.0)


@pytest.mark.parametrize("make", [llama, lora], ids=["clone", "adapter"])
def test_the_kl_to_the_first_reference(make: Any) -> None:
    """Against a plain copy of the first policy; while the KL to a reference that follows at once is 0."""
    policy = make().eval()
    start = copy.deepcopy(policy)
    sync = ReferenceSync(build_reference(policy), SyncConfig(every=1, alpha=1.0, first_kl_every=2))
    found = []
    for number in range(1, 5):
        moved(policy, 0.05)
        metrics = sync.step(policy, batch=batch(), temperature=0.7)
        assert ("kl/first" in metrics) == (number % 2 == 0)
        if number % 2 == 0:
            with torch.no_grad():
                logp, first = (score_tokens(m, batch(), temperature=0.7).logp.double() for m in (policy, start))
            log_ratio = (logp - first)[batch().completion_mask]
            right = (torch.expm1(-log_ratio) + log_ratio).mean()
            assert metrics["kl/first"] == pytest.approx(right.item(), rel=1e-4)
            found.append({"step": number, "kl": metrics["kl/first"]})
        assert torch.equal(sync.reference.score(batch()).logp, scored(policy))
    assert sync.first_kl == found and found[1]["kl"] != found[0]["kl"]
    with pytest.raises(ValueError, match="needs tokens to measure on: pass batch="):
        sync.step(policy), sync.step(policy)


def test_its_state_goes_on(tmp_path: Path) -> None:
    config = SyncConfig(every=3, average="bema", warmup=1, first_kl_every=2)
    torch.manual_seed(3)
    policy = llama()
    start = copy.deepcopy(policy)
    whole = ReferenceSync(build_reference(policy, "clone"), config)
    for number in range(1, 11):
        torch.manual_seed(number)
        moved(policy, 0.05)
        whole.step(policy, batch=batch())
        if number == 5:
            whole.reference.save(tmp_path)
            state, then = whole.state_dict(), copy.deepcopy(policy)
    again = ReferenceSync(build_reference(start, "clone"), config)
    with pytest.raises(ValueError, match="after 1 syncs and this reference has seen 0"):
        again.load_state_dict(state)
    again.reference.load(tmp_path)
    again.load_state_dict(state)
    for number in range(6, 11):
        torch.manual_seed(number)
        moved(then, 0.05)
        again.step(then, batch=batch())
    assert again.updates == whole.updates and again.first_kl == whole.first_kl and len(again.updates) == 3
    assert again.reference.fingerprint() == whole.reference.fingerprint()


# in trainers


def plain_trainer(folder: Path, *callbacks: Any, model: nn.Module | None = None, **options: Any) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=6, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=0.01,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    data = [{"input_ids": [5, 6, 7 + n % 5], "labels": [5, 6, 7 + n % 5]} for n in range(64)]
    return Trainer(llama() if model is None else model, args, train_dataset=data, callbacks=list(callbacks))


def test_bema_is_its_authors(tmp_path: Path) -> None:
    """TRL has their code: the same weights at every step, to rounding."""
    policy = llama()
    reference = build_reference(policy, "clone")
    theirs = BEMACallback(update_freq=2)
    ours = SyncReferenceCallback(reference, SyncConfig(every=2, average="bema"))
    plain_trainer(tmp_path, theirs, ours, model=policy).train()
    assert len(ours.updates) == 3
    weights = dict(named_weights(reference.model))
    for name, right in named_weights(theirs.running_model):
        torch.testing.assert_close(weights[name], right, rtol=1e-5, atol=1e-6)


def test_steps_are_the_optimizers_in_any_trainer(tmp_path: Path) -> None:
    policy = llama()
    callback = SyncReferenceCallback(build_reference(policy), SyncConfig(every=2, alpha=1.0, warmup=1))
    plain_trainer(tmp_path, callback, model=policy, gradient_accumulation_steps=3).train()
    assert [u["step"] for u in callback.updates] == [3, 5]


def test_a_plain_trainer_is_asked_for_what_it_does_not_know(tmp_path: Path) -> None:
    policy = llama()
    reference = build_reference(policy)
    with pytest.raises(ValueError, match="Give SyncReferenceCallback kl="):
        SyncReferenceCallback(reference, SyncConfig(max_kl=1.0))
    with pytest.raises(ValueError, match="Give SyncReferenceCallback batch="):
        SyncReferenceCallback(reference, SyncConfig(first_kl_every=1))
    kls = iter([0.0, 0.0, 7.0, 0.0, 0.0, 0.0])
    config = SyncConfig(every=None, max_kl=1.0, first_kl_every=3, reset_optimizer=True)
    callback = SyncReferenceCallback(reference, config, kl=lambda: next(kls), batch=batch)
    plain_trainer(tmp_path, callback, model=policy).train()
    assert [u["step"] for u in callback.updates] == [3] and [m["step"] for m in callback.sync.first_kl] == [3, 6]


def test_dpo_resets_its_reference_at_a_kl(tmp_path: Path) -> None:
    """The KL that is logged is what the limit is compared with; in the step after a reset it starts from zero."""
    options = {"max_steps": 6}
    torch.manual_seed(0)
    free = dpo(KLDPOTrainer, llama(), tmp_path / "a", options)
    free.train()
    limit = logged(free, "kl")[1] * 0.99  # of the first step it is 0
    torch.manual_seed(0)
    sync = SyncConfig(every=None, max_kl=limit, reset_optimizer=True, first_kl_every=1)
    trainer = dpo(KLDPOTrainer, llama(), tmp_path / "b", options, sync=sync)
    trainer.train()
    found = logged(trainer, "kl")
    assert found[:2] == logged(free, "kl")[:2] and found[2] == 0.0
    assert trainer.sync.updates[0]["step"] == 2
    assert trainer.sync.updates[0]["kl"] == pytest.approx(found[1], rel=1e-4)
    first = logged(trainer, "kl/first")
    assert len(first) == 6 and first[2] > 0 and logged(trainer, "sync/updates")[:3] == [0.0, 1.0, 1.0]


def test_grpo_measures_the_kl_to_the_first_reference(tmp_path: Path) -> None:
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    sync = SyncConfig(every=1, alpha=1.0, first_kl_every=2)
    trainer = grpo(
        KLGRPOTrainer, policy, tmp_path, {"max_steps": 4, "temperature": 0.8}, kl=KLConfig(coef=0.1), sync=sync
    )
    trainer.train()
    assert trainer.reference.strategy == "swap" and trainer.reference.updates == 4
    found = logged(trainer, "kl/first")
    assert len(found) == 2 and found[1] > 0
    assert logged(trainer, "sync/updates") == [1.0, 2.0, 3.0, 4.0]
    tokens = trainer.kl_state.last_batch
    with torch.no_grad():
        ours = score_tokens(policy, tokens, temperature=0.8).logp
        with policy.disable_adapter():
            first = score_tokens(policy, tokens, temperature=0.8).logp
    right = kl.estimate(ours, first, "k3", mask=tokens.completion_mask).sum() / tokens.completion_mask.sum()
    assert found[1] == pytest.approx(right.item(), abs=1e-4)  # TRL rounds what it logs


def test_a_step_in_which_nothing_was_scored_resets_nothing(tmp_path: Path) -> None:
    """All completions cut off, and masked for it: there is no KL."""
    options = {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 2}
    sync = SyncConfig(every=None, max_kl=0.5)
    trainer = grpo(KLGRPOTrainer, llama(), tmp_path, options, kl=KLConfig(coef=0.1), sync=sync)
    trainer.train()
    assert trainer.sync.updates == [] and trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "sync.every counts optimizer steps"),
        ({"every": None}, "the reference would never move"),
        ({"every": None, "max_kl": 1.0, "alpha": 0.5}, "sync.alpha has no use without sync.every"),
        ({"every": None, "max_kl": 1.0, "average": "bema"}, "set sync.every"),
        ({"average": "bema", "alpha": 0.5}, "sync.alpha has no use with sync.average 'bema'"),
        ({"lag": 3}, "sync.lag has no use with sync.average 'ema'"),
        ({"average": "bema", "lag": -1}, "cannot be negative"),
        ({"alpha": 0.0}, r"sync.alpha must be in \(0, 1\]"),
        ({"warmup": -1}, "sync.warmup counts"),
        ({"max_kl": 0.0}, "sync.max_kl is in nats"),
        ({"reset_optimizer": True}, "sync.max_kl, which is not set"),
        ({"first_kl_every": 0}, "sync.first_kl_every counts"),
        ({"alpha": math.nan}, r"sync.alpha must be in \(0, 1\]"),
        ({"max_kl": math.nan}, "sync.max_kl is in nats"),
        *(
            ({"average": "bema", name: value}, "must be finite and cannot be negative")
            for name in ("lag", "ema_power", "bias_power")
            for value in (math.nan, math.inf, -1.0)
        ),
    ],
)
def test_nonsense_cannot_be_written_down(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SyncConfig(**options)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("every", [None, 1])
def test_a_kl_that_is_nan_ends_the_run(every: int | None, warmup: int) -> None:
    """NaN compares as not above any limit, so the reset would never come."""
    policy = llama()
    reference = build_reference(policy, "clone")
    sync = ReferenceSync(reference, SyncConfig(every=every, max_kl=0.5, warmup=warmup))
    for value in (math.nan, -math.inf):
        with pytest.raises(ValueError, match=rf"The KL of the step is {value}, and sync.max_kl 0.5 cannot be compar"):
            sync.step(policy, kl=value)
    assert reference.updates == 0 and not sync.updates
    if every is None and not warmup:
        sync.step(policy, kl=math.inf)
        assert reference.updates == 1  # above the limit, and a copy of the policy ends it


# on several processes


@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
@pytest.mark.slow
def test_an_update_of_shards_sends_no_weights(backend: str, tmp_path: Path) -> None:
    llama(attention_dropout=0.5).save_pretrained(tmp_path / "model")
    launch, flags = (backend, OWN_LOOP) if backend == "zero3" else ("multi", ())
    output = accelerate_launch(launch, "tests/scripts/sync_ranks.py", backend, str(tmp_path), flags=flags)
    for what in ("updates", "NaN", "the schedule", *(["averages"] if backend == "fsdp2" else [])):
        assert f"passed {what}\n" in output


@pytest.mark.parametrize(("options", "alpha", "lag"), [({}, 0.6, None), ({"average": "bema"}, None, 10.0)], ids=str)
def test_a_trainers_state_records_the_settled_sync(
    options: dict[str, Any], alpha: float | None, lag: float | None
) -> None:
    """As numbers, also where the configuration leaves them open; a SyncConfig of the record means the same."""
    config = SyncConfig(**options)
    recorded = SyncReferenceCallback(build_reference(llama(), "clone"), config).state()["args"]["config"]
    assert (recorded["alpha"], recorded["lag"]) == (alpha, lag)
    assert SyncConfig(**json.loads(json.dumps(recorded))).settled() == config.settled()
