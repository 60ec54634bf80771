"""What the trainers log of the KL: by which names, over which steps, and that it reaches trackers and run folders."""

from __future__ import annotations

import copy
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import gpt2, llama
from support.tables import rows
from support.train_inputs import write_config
from support.trl_runs import dpo, grpo, kto, logged, rloo
from torch import Tensor

from refkl import KLConfig, ReferenceConfig, SyncConfig, TokenBatch
from refkl.cli import main
from refkl.kl import Histogram
from refkl.trl import KLDPOTrainer, KLGRPOTrainer, KLKTOTrainer, KLRLOOTrainer

FOUR = [(grpo, KLGRPOTrainer), (rloo, KLRLOOTrainer), (dpo, KLDPOTrainer), (kto, KLKTOTrainer)]
TABLE = {re.findall(r"`([^`]*)`", row[0])[0] for row in rows("metrics", "## The keys")}
"""What docs/metrics.md lists."""


def plain(policy: Any, reference: Any, batch: TokenBatch, temperature: float) -> tuple[float, float]:
    """Exact KL and entropy, nats per token, from the logits in full, in fp64."""
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    logs = []
    for model in (policy, reference):
        with torch.no_grad():
            logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
        logs.append((logits.double() / temperature).log_softmax(-1)[:, :-1][batch.completion_mask[:, 1:]])
    p = logs[0].exp()
    return (p * (logs[0] - logs[1])).sum(-1).mean().item(), -(p * logs[0]).sum(-1).mean().item()


@pytest.mark.parametrize("make, cls", FOUR)
def test_each_trainer_measures_the_exact_kl_and_the_entropy(make: Any, cls: Any, tmp_path: Path) -> None:
    """Beside the estimate, on the tokens and at the temperature of the loss, with the policy of the loss."""
    policy = llama()
    start = copy.deepcopy(policy)
    temperature = 0.7 if make in (grpo, rloo) else 1.0
    options = {"temperature": temperature} if make in (grpo, rloo) else {}
    trainer = make(
        cls,
        policy,
        tmp_path,
        {**options, "max_steps": 4},
        kl=KLConfig(controller="dual", target=0.1, exact_every=2),
        sync=SyncConfig(every=100, first_kl_every=2),
    )
    measure, right = trainer._measure_exact, []

    def kept(model: Any, batch: TokenBatch) -> None:
        assert trainer.model.training
        right.append(plain(model, start, batch, temperature))
        measure(model, batch)
        assert trainer.model.training

    trainer._measure_exact = kept
    trainer.train()
    assert len(right) == 4  # of each step, and of KTO's own batch alone
    assert logged(trainer, "kl/exact") == pytest.approx([right[1][0], right[3][0]], rel=1e-4) and right[1][0] > 1e-4
    assert logged(trainer, "entropy") == pytest.approx([entropy for _, entropy in right], rel=1e-4)
    assert len(logged(trainer, "kl/first")) == 2 and logged(trainer, "kl/target") == [0.1] * 4
    assert logged(trainer, trainer.kl_metric) == logged(trainer, "kl/k3")
    # With all of it switched on, the trainer logs what the documentation lists: no more, no less.
    keys = {key for entry in trainer.state.log_history for key in entry}
    found = {key for key in keys if key.split("/")[0] in ("kl", "sync", "entropy")}
    assert found == (TABLE if make is kto else TABLE - {"kl/token"})


def test_measuring_changes_nothing_else(tmp_path: Path) -> None:
    """With dropout, which the measurement switches off, and draws no random numbers for."""
    runs = []
    for every in (None, 1):
        torch.manual_seed(0)
        policy = gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
        options = {"disable_dropout": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        trainer = dpo(KLDPOTrainer, policy, tmp_path, options, kl=KLConfig(coef=0.2, exact_every=every))
        add, calls = trainer.penalty.add_exact, []

        def counted(divergence: Tensor, mask: Tensor, add: Any = add, calls: Any = calls) -> None:
            calls.append(mask.sum())
            add(divergence, mask)

        trainer.penalty.add_exact = counted
        trainer.train()
        runs.append([logged(trainer, key) for key in ("loss", "kl", "grad_norm", "kl/log_ratio/p50")])
    assert runs[0] == runs[1] and len(calls) == 3  # the first of two micro-batches
    exact = logged(trainer, "kl/exact")
    assert exact[0] == 0.0 and runs[1][1][0] > 1e-3 and exact[2] > 1e-3


@pytest.mark.parametrize("make, cls", [(dpo, KLDPOTrainer), (grpo, KLGRPOTrainer)])
def test_a_cached_reference_cannot_be_measured_exactly(make: Any, cls: Any, tmp_path: Path) -> None:
    cached = ReferenceConfig(cache=str(tmp_path / "scores"))
    with pytest.raises(ValueError, match=r"exact divergence needs the reference's hidden states.*reference.cache"):
        make(cls, llama(), tmp_path, kl=KLConfig(exact_every=10), reference=cached)


def test_a_log_of_several_steps(tmp_path: Path) -> None:
    """Means are of the steps; the largest and the quantiles of all their tokens together."""
    found = {}
    for steps in (1, 2):
        torch.manual_seed(0)
        trainer = dpo(KLDPOTrainer, llama(), tmp_path, {"max_steps": 4, "logging_steps": steps})
        spread: list[Histogram] = []
        log = trainer.log

        def kept(logs: Any, *args: Any, log: Any = log, spread: Any = spread, trainer: Any = trainer) -> None:
            log(logs, *args)
            if "loss" in logs:
                spread.append(trainer.kl_state.histogram)

        trainer.log = kept
        trainer.train()
        found[steps] = trainer, spread
    single, double = found[1], found[2]
    assert [h.tokens > 20 for h in single[1]] == [True] * 4 and single[1][0].trimmed()["edges"] == [0.0, 0.0]
    assert double[1] == [single[1][0] + single[1][1], single[1][2] + single[1][3]]
    for key, value in (
        ("kl/max", [h.largest for h in double[1]]),
        ("kl/p99", [h.quantile(0.99, magnitude=True) for h in double[1]]),
        ("kl/log_ratio/p01", [h.quantile(0.01) for h in double[1]]),
        ("kl/k3", [sum(logged(single[0], "kl/k3")[i : i + 2]) / 2 for i in (0, 2)]),
    ):
        assert logged(double[0], key) == pytest.approx(value), key
    assert logged(double[0], "kl/max") == [max(logged(single[0], "kl/max")[i : i + 2]) for i in (0, 2)]


def test_the_run_folder_has_the_histogram(tmp_path: Path) -> None:
    config = write_config(tmp_path, "dpo", trainer={"logging_steps": 2}, kl={"coef": 0.1, "exact_every": 2})
    assert main(["train", str(config)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4] and all(line["kl/exact"] > 0 for line in steps)
    for line in steps:
        spread = line["kl/log_ratio"]
        assert len(spread["edges"]) == len(spread["counts"]) + 1 and spread["counts"][0] and spread["counts"][-1]
        at = Histogram.edges.index(spread["edges"][0])
        counts = [0] * at + spread["counts"]
        counts += [0] * (len(Histogram.edges) - 1 - len(counts))
        assert Histogram(tuple(counts), line["kl/max"]).quantile(0.99) == pytest.approx(line["kl/log_ratio/p99"])
    zeros = steps[0]["kl/log_ratio"]
    assert zeros["counts"][zeros["edges"].index(0.0)] >= sum(zeros["counts"]) / 3  # of the first step, all are 0
    assert not any("kl/log_ratio" in line for line in lines if "loss" not in line)


# trackers


@pytest.fixture
def logged_histograms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Histogram]]:
    """(step, histogram) of each log, as the callback sends them."""
    from refkl.hf import trackers

    sent: list[tuple[int, Histogram]] = []
    for kind, send in trackers._TRACKERS.items():

        def kept(callback: Any, histogram: Histogram, step: int, send: Any = send) -> None:
            sent.append((step, histogram))
            send(callback, histogram, step)

        monkeypatch.setitem(trackers._TRACKERS, kind, kept)
    return sent


def as_drawn(histogram: Histogram) -> tuple[list[float], list[int]]:
    """Edges and counts, with the bin of 0 a little wide."""
    trimmed = histogram.trimmed()
    edges = list(trimmed["edges"])
    at = edges.index(0.0)
    edges[at : at + 2] = [-5e-6, 5e-6]
    return edges, trimmed["counts"]  # type: ignore[return-value]


def test_tensorboard_and_wandb_get_the_numbers_and_the_histogram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged_histograms: list[tuple[int, Histogram]]
) -> None:
    """In the files that they write, TensorBoard's its own and Weights & Biases' offline ones."""
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    import wandb

    options = {"report_to": ["tensorboard", "wandb"], "max_steps": 4, "logging_steps": 2}
    trainer = dpo(KLDPOTrainer, llama(), tmp_path, options, kl=KLConfig(coef=0.1, exact_every=2))
    try:
        trainer.train()
    finally:
        wandb.finish()
    sent = dict(logged_histograms)
    assert sorted(step for step, _ in logged_histograms) == [2, 2, 4, 4]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"histograms": 0, "scalars": 0})
    board.Reload()
    found = board.Histograms("train/kl/log_ratio")
    assert [event.step for event in found] == [2, 4]
    for event in found:
        edges, counts = as_drawn(sent[event.step])
        assert event.histogram_value.bucket_limit == edges and event.histogram_value.bucket == [0, *counts]
        assert event.histogram_value.num == sum(counts)
    for key in ("kl", "kl/exact", "kl/p99", "kl/log_ratio/p50", "entropy"):
        assert [x.value for x in board.Scalars(f"train/{key}")] == pytest.approx(logged(trainer, key)), key

    history = wandb_history(next((tmp_path / "wandb").glob("offline-run-*/*.wandb")))
    drawn = [line for line in history if "train/kl/log_ratio/_type" in line]
    assert [line["train/global_step"] for line in drawn] == [2, 4]
    for line in drawn:
        edges, counts = as_drawn(sent[line["train/global_step"]])
        assert line["train/kl/log_ratio/_type"] == "histogram"
        assert line["train/kl/log_ratio/bins"] == edges and line["train/kl/log_ratio/values"] == counts
    assert [line["train/kl/exact"] for line in history if "train/kl/exact" in line] == logged(trainer, "kl/exact")


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """What a run file of Weights & Biases has logged, one entry for each call, nested keys joined by "/"."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, lines = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


def test_trackio_gets_the_histogram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged_histograms: list[tuple[int, Histogram]]
) -> None:
    """Where it is installed: its pins rule out others of the development environment's."""
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):  # where its variable was read when TRL imported it
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path)
    options = {"report_to": ["trackio"], "max_steps": 4, "logging_steps": 2, "project": "mine"}
    dpo(KLDPOTrainer, llama(), tmp_path, options).train()
    with sqlite3.connect(tmp_path / "mine.db") as base:
        lines = [json.loads(line) for (line,) in base.execute("select metrics from metrics order by id")]
    drawn = [line for line in lines if "train/kl/log_ratio" in line]
    assert [line["train/global_step"] for line in drawn] == [2, 4] == [step for step, _ in logged_histograms]
    for line, (_, histogram) in zip(drawn, logged_histograms, strict=True):
        edges, counts = as_drawn(histogram)
        found = line["train/kl/log_ratio"]
        assert (found["_type"], found["bins"], found["values"]) == ("trackio.histogram", edges, counts)
