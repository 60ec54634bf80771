"""`refkl plan`: its arithmetic by hand, its bytes against storages counted in a process, its choice against auto's."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.launching import accelerate_launch
from support.models import MODELS, batch, llama
from support.storages import SIZES, counting
from torch import nn
from transformers import BltConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, ViTConfig

import refkl
from refkl import ReferenceConfig, build_reference
from refkl.backend import Backend
from refkl.cli import main
from refkl.config import Quantization
from refkl.planner import Plan, PlanConfig, Row, make_plans, memory_bytes, recommend
from refkl.reference import BuildRequest, Step

LLAMA_8B: dict[str, Any] = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 128256},
}
# By hand: embedding and head, 32 layers of four projections, three of the MLP and two norms, the last norm.
EMBEDDING = 128256 * 4096
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
N = 2 * EMBEDDING + 32 * LAYER + 4096
# Rotary frequencies and the ones they started from: 64 of fp32 each, on every rank.
ROTARY = 2 * 64 * 4
# A factor of [16, in] and one of [out, 16] for each of a layer's seven projections.
LORA = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


def plan(method: str = "full", backend: str = "plain", ranks: int = 1, **options: Any) -> Plan:
    model = options.pop("model", None) or LlamaConfig(**LLAMA_8B)
    return make_plans(PlanConfig(model=model, method=method, backend=backend, world_size=ranks, **options))[0]  # type: ignore[arg-type]


def row(found: Plan, strategy: str, option: str = "") -> Row:
    return next(r for r in found.rows if (r.strategy, r.option) == (strategy, option))


def as_asked(found: Row) -> ReferenceConfig:
    key, _, value = found.option.partition("=")
    options: dict[str, Any] = {key: value == "true" or value} if key else {}
    if key == "quantize":
        options["max_kl_floor"] = math.inf  # tiny models with wide weights
    return ReferenceConfig(strategy=found.strategy, **options)


def test_full_fine_tuning_on_one_device_by_hand() -> None:
    found = plan(seq_len=2048, batch_size=2)
    assert found.parameters == found.trained == N == 8_030_261_248
    block = 2 * 2048 * 4096
    expected = {
        "policy": 2 * N + ROTARY,
        "gradients": 2 * N,
        "optimizer": 12 * N,
        "activations": (32 * 2 + 34) * block,
    }
    assert {t.name: t.bytes for t in found.terms} == expected
    clone = row(found, "clone")
    assert clone.auto and clone.cost.device == 2 * N + ROTARY and clone.cost.host == clone.cost.moved == 0
    assert clone.device == sum(expected.values()) + clone.cost.device
    # Twice the weights that multiply (not the embedding, not the 65 norms), and causal attention.
    weights = N - EMBEDDING - 65 * 4096
    assert clone.cost.flops == 2 * 4096 * weights + 2 * 4096 * 32 * 2048 * 4096
    without = plan(seq_len=2048, batch_size=2, gradient_checkpointing=False)
    assert without.terms[-1].bytes == 32 * 34 * block


def test_options_by_hand() -> None:
    found = plan(seq_len=1024)
    assert row(found, "clone", "dtype=float32").cost.device == 4 * N + ROTARY
    assert row(found, "clone", "dtype=float16").cost.device == 2 * (N + ROTARY // 4)
    host = row(found, "clone", "device=cpu").cost
    assert (host.device, host.host, host.flops) == (0, 2 * N + ROTARY, 0) and host.host_flops > 0
    assert host.moved == 1024 * (8 + 8 + 1 + 4)
    # Matrices of the layers in few bits, embedding, head and norms as they are.
    matrices = 32 * (LAYER - 2 * 4096)
    rows = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)  # outputs of each
    rest = 2 * (N - matrices) + ROTARY
    assert row(found, "clone", "quantize=int8").cost.device == rest + matrices + 4 * rows
    assert row(found, "clone", "quantize=int4").cost.device == rest + matrices // 2 + 5 * (matrices // 64)
    assert row(found, "clone", "quantize=nf4").cost.device == rest + matrices // 2 + 4 * (matrices // 64)
    assert row(found, "clone", "quantize=nf4").cost.scoring == 4 * 4096 * 14336
    swapped = row(found, "swap", "device=cpu").cost
    # Through the bus four times: in and out, there and back. The largest tensor is on the device for a moment.
    assert (swapped.device, swapped.host, swapped.moved) == (0, 2 * N, 8 * N)
    assert swapped.scoring == 2 * EMBEDDING
    # More than a tenth of 80 GiB is kept there anyway; of a larger device it is beside the policy.
    assert row(found, "swap").cost == swapped
    beside = row(plan(seq_len=1024, memory=200 * 2**30), "swap").cost
    assert (beside.device, beside.host, beside.moved, beside.scoring) == (2 * N, 0, 0, 0)
    assert row(found, "swap", "offload=true").cost == swapped
    streamed = row(found, "clone", "offload=true").cost
    # The embedding and the first layer are the largest neighbours; the rotary frequencies stay on the device.
    assert (streamed.device, streamed.host, streamed.scoring) == (ROTARY, 2 * N, 2 * (EMBEDDING + LAYER))
    assert (streamed.moved, streamed.flops) == (2 * N, row(found, "clone").cost.flops)
    tied = plan(model=LlamaConfig(**LLAMA_8B, tie_word_embeddings=True))
    streamed = row(tied, "clone", "offload=true").cost
    assert (streamed.host, streamed.moved) == (2 * (N - EMBEDDING), 2 * N)  # held once, fetched twice


def test_lora_by_hand() -> None:
    found = plan("lora")
    assert (found.parameters, found.trained) == (N + LORA, LORA)
    # PEFT makes the adapter in fp32.
    assert [t.bytes for t in found.terms[:3]] == [2 * N + ROTARY + 4 * LORA, 4 * LORA, 8 * LORA]
    assert row(found, "adapter").auto and row(found, "adapter").cost.total == 0
    assert row(found, "swap").cost.device == 4 * LORA
    assert row(found, "clone").cost.device == 4 * LORA + ROTARY
    assert row(found, "clone", "device=cpu").cost.host == 2 * N + 4 * LORA + ROTARY


@pytest.mark.parametrize(
    ("backend", "weights", "gradients", "optimizer"),
    [("ddp", 1, 1, 1), ("zero1", 1, 1, 8), ("zero2", 1, 8, 8), ("zero3", 8, 8, 8), ("fsdp2", 8, 8, 8)],
)
def test_each_backend_divides_what_it_shards(backend: str, weights: int, gradients: int, optimizer: int) -> None:
    found = plan(backend=backend, ranks=8)
    rotary = ROTARY // 2 if backend.startswith("zero") else ROTARY  # DeepSpeed casts buffers too
    expected = [2 * N // weights + rotary, 2 * N // gradients, 12 * N // optimizer]
    assert [t.bytes for t in found.terms[:3]] == expected
    whole = 2 * N + rotary
    auto = {"zero3": ("zero3", 2 * N // 8 + rotary), "fsdp2": ("fsdp2", 2 * N // 8 + rotary)}
    assert (found.auto.strategy, found.auto.cost.device) == auto.get(backend, ("clone", whole))
    if backend in auto:
        host = row(found, backend, "offload=true").cost
        assert (host.device, host.host, host.scoring) == (rotary, 2 * N // 8, 2 * EMBEDDING // 8)
        assert host.moved == 2 * N  # an eighth from the host, the rest from other ranks
    # A forward through sharded weights receives what this rank lacks.
    assert found.auto.cost.moved == (0 if weights == 1 else 2 * N * 7 // 8)


def test_rows_are_not_split_between_ranks() -> None:
    """FSDP2 shards by rows: of a LoRA factor of 4 rows, each of 8 ranks has one or none."""
    model = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=8)
    found = plan("lora", "fsdp2", 8, model=model, lora_rank=4, lora_target=["q_proj"])
    assert row(found, "swap").cost.device == 4 * (64 + 64 // 8 * 4)
    assert row(plan("lora", "ddp", 8, model=model, lora_rank=4, lora_target=["q_proj"]), "swap").cost.device == 2048


def test_a_policy_in_memory_costs_what_its_plan_says() -> None:
    """Before it is sharded too: the backend says over how many ranks."""
    policy = llama()
    planned = plan(model=policy.config, backend="fsdp2", ranks=4, dtype="float32")
    for strategy in ("fsdp2", "swap"):
        request = BuildRequest(policy, ReferenceConfig(), Backend("fsdp2", 4), None, Step(1, 1024, 2, 32))
        assert row(planned, strategy).cost == refkl.STRATEGIES[strategy].cost(request)


def test_auto_in_a_run_takes_what_the_plan_says() -> None:
    for policy, method in ((llama(), "full"), (lora(llama()), "lora")):
        reference = build_reference(policy)
        found = plan(method, model=policy.config, dtype="float32")
        assert (reference.strategy, reference.reason) == (found.auto.strategy, found.reason)


def test_a_strategy_of_ones_own_is_planned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refkl.reference.registry.STRATEGIES", strategies := dict(refkl.STRATEGIES))
    monkeypatch.setattr("refkl.planner.STRATEGIES", strategies)

    class Free(refkl.reference.CloneReference):
        strategy = "free"

        @classmethod
        def cost(cls, request: BuildRequest) -> refkl.reference.Cost:
            return refkl.reference.Cost(device=1)

        @classmethod
        def auto(cls, request: BuildRequest) -> bool:
            return True

    refkl.register_strategy("free", Free)
    assert plan().auto.strategy == "free"


# The 5 %: predicted from the configuration, measured by counting.


def lora(policy: Any) -> nn.Module:
    return get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))


def test_frozen_lower_layers_by_hand() -> None:
    """Half of the layers and the embedding do not train: they are shared, and in shared_trunk run once."""
    below = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(16))]
    found = plan(seq_len=1024, freeze=below, memory=200 * 2**30)
    trained = N - EMBEDDING - 16 * LAYER
    assert (found.parameters, found.trained) == (N, trained)
    assert [t.bytes for t in found.terms[1:3]] == [2 * trained, 12 * trained]
    trunk, clone, swap = (row(found, name).cost for name in ("shared_trunk", "clone", "swap"))
    assert trunk.device == clone.device == 2 * trained + ROTARY and swap.device == 2 * trained
    norms = 16 * 2 * 4096
    assert clone.flops - trunk.flops == 2 * 1024 * (16 * LAYER - norms) + 2 * 1024 * 16 * 1024 * 4096
    assert found.auto.strategy == "swap" and "shared_trunk" in plan(seq_len=1024).refused
    with pytest.raises(ValueError, match="matches no parameter"):
        plan(freeze=["model.layer.0"])
    with pytest.raises(ValueError, match="--freeze is for full fine-tuning"):
        plan("lora", freeze=below)


@pytest.mark.parametrize(("size", "dtype"), [("small", "float32"), ("large", "bfloat16")])
@pytest.mark.parametrize("family", SIZES)
def test_predicted_bytes_over_frozen_layers_are_what_is_counted(family: str, size: str, dtype: Any) -> None:
    below = {"llama": ["model.embed_tokens", "model.layers.0"], "gpt2": ["transformer.wte", "transformer.wpe",
             "transformer.h.0"]}[family]  # fmt: skip
    policy: nn.Module = MODELS[family](**SIZES[family][size])
    kept = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    policy.to(getattr(torch, dtype))
    for name, buffer in policy.named_buffers():
        buffer.data = kept[name]
    del kept
    refkl.freeze(policy, below)
    found = plan(model=policy.config, dtype=dtype, freeze=below)
    build_reference(warm := llama(), "clone").score(batch())
    del warm
    with counting(policy) as count:
        for strategy in ("shared_trunk", "clone", "swap"):
            predicted = row(found, strategy).cost
            reference = build_reference(policy, strategy)
            refkl.score_pair(policy, reference, batch())
            counted = count()
            assert predicted.total == pytest.approx(counted, rel=0.05)
            assert reference.memory().total == pytest.approx(counted, rel=0.05)
            del reference
            assert count() == 0


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("size", "dtype"), [("small", "float32"), ("large", "bfloat16")])
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_predicted_bytes_are_what_is_counted(method: str, family: str, size: str, dtype: Any) -> None:
    """Every row of the plan, on its own beside the policy."""
    policy: nn.Module = MODELS[family](**SIZES[family][size])
    kept = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    policy.to(getattr(torch, dtype))
    for name, buffer in policy.named_buffers():  # as from_pretrained leaves rotary frequencies
        buffer.data = kept[name]
    del kept
    found = plan(method, model=policy.config, dtype=dtype)
    policy = lora(policy) if method == "lora" else policy
    for kind in (None, *get_args(Quantization)):  # the keys of fingerprints and the like are made once a process
        warm = llama()
        limit = {"quantize": kind, "max_kl_floor": math.inf} if kind else {}
        build_reference(warm, ReferenceConfig(strategy="clone", **limit)).score(batch())
        del warm
    seen = set()
    with counting(policy) as count:
        for predicted in found.rows:
            reference = build_reference(policy, as_asked(predicted))
            reference.score(batch())
            counted, held = count(), reference.memory()
            print(
                f"{family} {size} {method} {predicted.strategy} {predicted.option}: {predicted.cost}, {counted} counted"
            )
            assert predicted.cost.total == pytest.approx(counted, rel=0.05)
            assert held.total == pytest.approx(counted, rel=0.05)
            if predicted.strategy == "swap" or predicted.option == "offload=true":
                assert (predicted.cost.host, predicted.cost.device) == (held.host, held.device)
            seen.add(f"{predicted.strategy} {predicted.option}".strip())
            del reference
            assert count() == 0
    options = ("", "device=cpu", "offload=true")
    assert {f"{strategy} {option}".strip() for strategy in ("clone", "swap") for option in options} <= seen
    assert {s.split("=")[1] for s in seen if "quantize" in s} == (
        set() if method == "lora" else {"int8", "int4", "nf4"}
    )
    assert ("adapter" in seen) == (method == "lora")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_predicted_bytes_are_what_is_counted_on_two_ranks(backend: str) -> None:
    launch = "zero3" if backend == "zero3" else "multi"
    flags = ("--gradient_accumulation_steps", "1", "--gradient_clipping", "1.0") if backend == "zero3" else ()
    output = accelerate_launch(launch, "tests/scripts/planned_bytes.py", backend, flags=flags)
    print(output)
    found = re.findall(r"(\w+) (\w+) (\w+) ([\w ]+): (\d+) predicted, (\d+) counted", output)
    kinds = {("llama", "small"), ("llama", "large"), ("gpt2", "small"), ("gpt2", "large")}
    for strategy in (backend, f"{backend} offload", "swap"):
        assert {(family, size) for family, size, _, name, *_ in found if name == strategy} == kinds
    for *_, predicted, counted in found:
        assert int(predicted) == pytest.approx(int(counted), rel=0.05)


# Which way to take.


def advice(model: PreTrainedConfig, **options: Any) -> tuple[Plan | None, str]:
    config = PlanConfig(model=model, **options)
    return recommend(config, make_plans(config))


def qwen_32b() -> PreTrainedConfig:
    sizes = {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "vocab_size": 152064}
    return Qwen2Config(num_attention_heads=40, num_key_value_heads=8, **sizes)


def test_memory_for_two_copies_is_full_fine_tuning_with_a_clone() -> None:
    taken, why = advice(LlamaConfig(**LLAMA_8B), world_size=8)
    assert taken is not None and (taken.method, taken.backend.name) == ("full", "zero2")
    assert taken.best is not None and taken.best.strategy == "clone"
    assert "two copies" in why and "16.1 GB policy" in why and "16.1 GB reference = " in why


def test_too_little_memory_is_lora() -> None:
    taken, why = advice(LlamaConfig(**LLAMA_8B))
    assert taken is not None and taken.method == "lora" and taken.best is not None
    assert taken.best.strategy == "adapter"
    assert "does not fit" in why and "96.4 GB optimizer" in why and "0 bytes reference" in why


@pytest.mark.slow
def test_over_20_billion_parameters_are_partitioned_however_much_memory_there_is() -> None:
    for memory in ("80GiB", "2TiB"):
        taken, why = advice(qwen_32b(), world_size=8, memory=memory_bytes(memory))
        assert taken is not None and (taken.method, taken.backend.name) == ("full", "zero3")
        assert "Over 20 billion" in why and taken.best is not None and taken.best.strategy == "zero3"


def test_what_does_not_fit_beside_the_policy_goes_to_the_host() -> None:
    """Auto's clone is too much; streamed from the host it moves least of those that compute on the device."""
    model = LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": 4})
    found = plan(model=model)
    clone, host = found.auto, row(found, "clone", "offload=true")
    assert host.device < clone.device
    limit = int((host.device + clone.device) / 2 / 0.9)
    taken, _ = advice(model, memory=limit, backend="plain", method="full")
    assert taken is not None and taken.best is not None
    assert (taken.best.strategy, taken.best.option) == ("clone", "offload=true")


def test_nothing_fits() -> None:
    taken, why = advice(qwen_32b(), memory=memory_bytes("24GiB"))
    assert taken is None and why.startswith("Nothing fits. The smallest plan is LoRA on plain on 1 process")


# The command.


@pytest.fixture
def folder(tmp_path: Path) -> str:
    LlamaConfig(**LLAMA_8B).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_the_command_prints_the_table(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--world-size", "8", "--seq-len", "2048", "--memory", "80GiB"]
    assert main(["plan", "--model", folder, "--backend", "zero3", "--dtype", "bf16", *sizes]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert re.search(r"policy +2\.0 GB = 8\.03 B x 2 bytes / 8 ranks", printed)
    assert re.search(r"zero3 \(auto\) +2\.0 GB +0 +0 +31\.8 T +14\.1 GB +18\.9 GB +yes", printed)
    assert "auto: zero3: it is partitioned" in printed and "auto: adapter:" in printed
    assert "not clone: under ZeRO-3" in printed
    assert printed.splitlines()[-1].startswith("take: Full fine-tuning on zero3 on 8 processes")
    assert main(["plan", "--model", f"{folder}/config.json", *sizes]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"full +ddp .* clone +16\.1 GB +145\.4 GB +no", printed) and "…" not in printed


def test_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", folder, "--world-size", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] == {"method": "full", "backend": "zero2", "strategy": "clone", "option": ""}
    zero3 = next(p for p in found["plans"] if p["backend"]["name"] == "zero3" and p["method"] == "full")
    assert zero3["auto"] == "zero3" and zero3["rows"][0]["cost"]["device"] == N // 4 + ROTARY // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--memory 80", "--memory must be a number with a unit, such as 80GiB, 80GB or 512MiB; got '80'."),
        ("--memory lots", "got 'lots'"),
        ("--backend zero4", "Unknown --backend 'zero4'. Did you mean 'zero3'?"),
        ("--method qlora", "Unknown --method 'qlora'. Did you mean 'lora'? Known: full, lora."),
        ("--dtype bf17", "Unknown --dtype 'bf17'."),
        ("--world-size 0", "--world-size must be at least 1, got 0."),
        ("--world-size two", "key \"world_size\": Expected a <class 'int'>. Got value: two"),
        ("--world-size 2 --backend plain", "--backend plain is one process, and --world-size is 2. Use ddp."),
        ("--backend fsdp1", "FSDP1 flattens parameters"),
        ("--wold-size 2", "no option --wold-size. Did you mean '--world-size'?"),
        ("--method lora --lora-target nowhere", "{'nowhere'} not found in the base model"),
        ("--lora-target nowhere", "Set --lora-target, or --method full to leave LoRA out."),
        ("--model /nowhere", "--model '/nowhere' is neither a model folder nor a config.json"),
    ],
)
def test_wrong_input_says_what_to_do(
    folder: str, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", folder, *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_that_is_no_causal_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BltConfig().save_pretrained(tmp_path / "blt")
    ViTConfig().save_pretrained(tmp_path / "vit")
    for name, message in (("blt", "num_hidden_layers"), ("vit", "is not a causal language model")):
        assert main(["plan", "--model", str(tmp_path / name), "--method", "full"]) == 2
        assert message in capsys.readouterr().err


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "needs a model's configuration: --model" in capsys.readouterr().err


def test_zero_is_planned_where_deepspeed_is_not_installed(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a laptop, for a cluster."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert main(["plan", "--model", folder, "--world-size", "8", "--backend", "zero3", "--method", "full"]) == 0
    assert "auto: zero3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("0.5tib", 2**39), ("512MB", 512 * 10**6), ("1kib", 1024)],
)
def test_memory_sizes(text: str, expected: int) -> None:
    assert memory_bytes(text) == expected
