"""`reference.quantize`: scores against matrices restored here by hand, the floor under the KL against full logits."""

from __future__ import annotations

import copy
import json
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import MODELS, batch, byte_tokenizer, gpt2, llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DPOConfig

from refkl import (
    KLFloor,
    ReferenceConfig,
    SyncConfig,
    TokenBatch,
    build_reference,
    check_reference,
    freeze,
    score_pair,
    score_tokens,
)
from refkl.backend import canonical_name
from refkl.backend.linear_layers import linear_layers, matrix_shape
from refkl.reference import Reference
from refkl.reference.quantized.layers import FORMATS
from refkl.reference.strategies.frozen_copy import frozen_copy
from refkl.trl import KLDPOTrainer

KINDS = list(FORMATS)
FAMILIES = ["llama", "gpt2"]
# Information-theoretic quantiles of the normal distribution: appendix E of the QLoRA paper.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def config(kind: str, **options: Any) -> ReferenceConfig:
    """Of tiny models with wide weights, which rounding moves far."""
    return ReferenceConfig(**{"strategy": "clone", "quantize": kind, "max_kl_floor": math.inf, **options})


def restored(parts: dict[str, Tensor], shape: torch.Size, kind: str) -> Tensor:
    """[out, in] in fp64, number by number from what a file holds."""
    if kind == "nf4":
        pairs = parts["qdata"].flatten()
        levels = torch.tensor(NF4, dtype=torch.float64)[torch.stack([pairs >> 4, pairs & 15], -1).flatten().long()]
        return (levels * parts["absmax"].double().repeat_interleave(64)[: shape.numel()]).view(shape)
    if kind == "int8":
        return parts["qdata"].double() * parts["scale"].double()
    pairs = parts["qdata"]
    numbers = torch.zeros(shape, dtype=torch.float64)
    numbers[:, ::2], numbers[:, 1::2] = (pairs & 15).double(), (pairs >> 4).double()
    scale, zero = (
        parts[n].double().repeat_interleave(shape[1] // parts[n].shape[1], 1) for n in ("scale", "zero_point")
    )
    return (numbers - zero) * scale


def plain(policy: nn.Module, reference: Reference, kind: str, folder: Path) -> nn.Module:
    """The policy with each of its linear weights replaced by what the reference's file says."""
    reference.save(folder / "plain")
    held = load_file(folder / "plain" / "reference.safetensors")
    model = copy.deepcopy(policy)
    for name, layer in linear_layers(model):
        parts = {n.rsplit(".", 1)[1]: t for n, t in held.items() if n.startswith(f"{name}.weight.")}
        matrix = restored(parts, matrix_shape(layer), kind)
        layer.weight.data = (matrix.t() if "Conv1D" in type(layer).__name__ else matrix).to(layer.weight.dtype)
    return model.eval()


def kl_of(full: nn.Module, other: nn.Module, tokens: TokenBatch) -> Tensor:
    """[n] KL(full ‖ other) of the scored tokens by definition, in fp64."""
    p, q = (
        m(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits[:, :-1].double().log_softmax(-1)
        for m in (full, other)
    )
    return (p.exp() * (p - q)).sum(-1)[tokens.completion_mask[:, 1:]].detach()


# what is held


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_restored_matrices(kind: str, family: str, tmp_path: Path) -> None:
    policy = MODELS[family]()
    reference = build_reference(policy, config(kind))
    model = plain(policy, reference, kind, tmp_path)
    for tokens in (batch(), batch(padding="left", seed=3)):
        found, right = reference.score(tokens, entropy=True), score_tokens(model, tokens, entropy=True)
        torch.testing.assert_close(found.logp, right.logp, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.entropy, right.entropy, rtol=0, atol=2e-5)
        assert (found.logp - score_tokens(policy, tokens).logp).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_in_bf16(kind: str, tmp_path: Path) -> None:
    policy = llama().bfloat16()
    reference = build_reference(policy, config(kind))
    found = reference.score(batch()).logp
    right = score_tokens(plain(policy, reference, kind, tmp_path), batch()).logp
    torch.testing.assert_close(found, right, rtol=0, atol=2e-2)
    assert reference.model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_is_rounded_to_the_nearest(kind: str, tmp_path: Path) -> None:
    policy = llama()
    model = plain(policy, build_reference(policy, config(kind)), kind, tmp_path)
    for (name, layer), (_, rounded) in zip(linear_layers(policy), linear_layers(model), strict=True):
        weight, found = layer.weight.detach(), rounded.weight.detach()
        rows = weight.view(-1, 64 if kind == "nf4" else weight.shape[1] if kind == "int8" else min(64, weight.shape[1]))
        if kind == "nf4":
            levels = rows.abs().amax(1)[:, None, None] * torch.tensor(NF4).expand(1, 64, 16)
            expected = levels.gather(2, (rows[..., None] - levels).abs().argmin(2, keepdim=True))[..., 0]
            torch.testing.assert_close(found.view_as(rows), expected, rtol=1e-6, atol=1e-6, msg=name)
            continue
        span = 2 * rows.abs().amax(1) if kind == "int8" else rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
        step = span / (255 if kind == "int8" else 15)
        # Half a step; a whole one at the ends, where the zero point is rounded too.
        assert ((found.view_as(rows) - rows).abs() <= step[:, None] * (0.5001 if kind == "int8" else 1.0001)).all(), (
            name
        )
        assert (found.view_as(rows) - rows).abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_all_linear_layers_but_the_head(family: str, kind: str) -> None:
    policy = MODELS[family]()
    reference = build_reference(policy, config(kind))
    packed = {n.removesuffix(".weight.qdata") for n in reference.digests if n.endswith(".weight.qdata")}
    others = ("embed", "wte", "wpe", "norm", "ln_", "lm_head", "score")
    matrices = {n.removesuffix(".weight") for n, p in policy.named_parameters() if p.dim() == 2}
    assert packed == {n for n in matrices if not any(part in n for part in others)}
    assert not any(f"{name}.weight" in reference.digests for name in packed)
    head = policy.get_output_embeddings().weight
    assert torch.equal(reference.model.get_output_embeddings().weight, head)
    torch.testing.assert_close(
        reference.model.get_submodule(next(iter(packed))).weight.shape,
        matrix_shape(policy.get_submodule(next(iter(packed)))),
    )


class Live(TorchDispatchMode):
    """Bytes of the storages that operations make beside a model's: the most that are there at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else [result]:
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.seen:
                self._add(key, tensor.untyped_storage())
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("kind", KINDS)
def test_no_second_copy_in_full_precision_is_ever_made(kind: str) -> None:
    """Beside what the reference holds at the end there are some matrices of one layer, not all of them."""
    policy = llama(num_hidden_layers=12, hidden_size=64, intermediate_size=128)
    build_reference(policy, config(kind))  # imports and tables
    with Live(policy) as live:
        model, _ = frozen_copy(policy, share=True, quantize=kind)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    matrices = [4 * matrix_shape(layer).numel() for _, layer in linear_layers(policy)]
    assert held <= live.most < held + 6 * max(matrices) < sum(matrices)


def test_what_does_not_train_is_shared_and_not_rounded() -> None:
    policy = llama()
    freeze(policy, ["model.layers.0", "model.embed_tokens"])
    reference = build_reference(policy, config("int8"))
    own, theirs = reference.model.model.layers, policy.model.layers
    assert own[0].mlp.up_proj.weight.data_ptr() == theirs[0].mlp.up_proj.weight.data_ptr()
    assert "model.layers.1.mlp.up_proj.weight.qdata" in reference.digests
    freeze(policy)
    with pytest.raises(ValueError, match="no linear layer to quantise"):
        build_reference(policy, config("int8"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_never_reaches_what_is_packed(kind: str) -> None:
    """The policy goes to bf16 after the reference was built, as under DeepSpeed: the rest follows."""
    policy = llama()
    reference = build_reference(policy, config(kind), calibration=batch())
    packed = {n: d for n, d in reference.digests.items() if ".weight." in n}
    policy.bfloat16()
    reference.score(batch())
    assert {n: d for n, d in reference.digests.items() if ".weight." in n} == packed
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    assert reference.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    reference.model.half()
    reference.fingerprint()
    assert {n: d for n, d in reference.digests.items() if ".weight." in n} == packed


def test_dtype_and_device_are_of_the_rest() -> None:
    policy = llama()
    reference = build_reference(policy, config("int8", dtype="bfloat16", device="cpu"))
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    assert reference.model.model.layers[0].mlp.up_proj.scale.dtype == torch.float32
    assert reference.score(batch()).logp.isfinite().all() and reference.kl_floor is not None


# files and fingerprints


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_sees_any_changed_number_and_nothing_else(kind: str) -> None:
    policy = llama()
    reference = build_reference(policy, config(kind))
    first = reference.fingerprint()
    assert first == build_reference(copy.deepcopy(policy), config(kind)).fingerprint()
    assert first != build_reference(policy, "clone").fingerprint()
    for name, buffer in reference.model.named_buffers():
        if "proj" not in name:
            continue
        flat = buffer.view(torch.uint8).view(-1)
        flat[-1] ^= 1
        layer, part = name.rsplit(".", 1)
        with pytest.raises(ValueError, match=f"{layer}.weight.{part} has other values"):
            reference.verify()
        flat[-1] ^= 1
    assert reference.fingerprint() == first


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    policies = [llama(), llama()]
    first, second = (build_reference(policy, config(kind)) for policy in policies)
    right = first.score(batch()).logp
    first.save(tmp_path)
    assert not torch.equal(second.score(batch()).logp, right)
    second.load(tmp_path)
    assert torch.equal(second.score(batch()).logp, right)
    assert second.fingerprint() == first.fingerprint() and second.kl_floor == first.kl_floor
    record = json.loads((tmp_path / "reference.json").read_text())
    assert record["quantize"] == kind and KLFloor(**record["kl_floor"]) == first.kl_floor
    with pytest.raises(ValueError, match="it is a different model"):
        build_reference(llama(), "clone").load(tmp_path)
    weights = load_file(tmp_path / "reference.safetensors")
    weights["model.layers.0.mlp.up_proj.weight.qdata"].view(-1)[5] ^= 1
    save_file(weights, tmp_path / "reference.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight\.qdata was altered"):
        second.load(tmp_path)


def test_a_cache_tells_it_from_full_precision(tmp_path: Path) -> None:
    policy, tokens = llama(), batch()
    full = build_reference(policy, ReferenceConfig(strategy="clone", cache=str(tmp_path)))
    full.score(tokens)
    rounded = build_reference(policy, config("int8", cache=str(tmp_path)))
    fresh = rounded.score(tokens).logp
    assert rounded.cache is not None and (rounded.cache.stats.misses, rounded.cache.stats.hits) == (3, 0)
    assert not torch.equal(fresh, full.score(tokens).logp)
    rounded.free()
    assert rounded.memory().total == 0 and torch.equal(rounded.score(tokens).logp, fresh)
    again = build_reference(policy, config("int8", cache=str(tmp_path)))
    assert torch.equal(again.score(tokens).logp, fresh) and again.cache.stats.misses == 0


# the floor


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_is_the_exact_kl_of_what_is_scored_first(kind: str, family: str, tmp_path: Path) -> None:
    policy, tokens = MODELS[family](), batch(completion=(5, 3, 2))
    reference = build_reference(policy, config(kind))
    assert reference.kl_floor is None and reference.provenance()["kl_floor"] is None
    reference.score(tokens)
    expected = kl_of(policy, plain(policy, reference, kind, tmp_path), tokens)
    floor = reference.kl_floor
    assert floor is not None and floor.tokens == 10 == len(expected)
    assert floor.mean == pytest.approx(float(expected.mean()), rel=1e-3)
    assert floor.max == pytest.approx(float(expected.max()), rel=1e-3)
    if kind != "int8":  # of so little the two directions are the same
        backwards = float(kl_of(plain(policy, reference, kind, tmp_path), policy, tokens).mean())
        assert abs(floor.mean - float(expected.mean())) < 0.1 * abs(floor.mean - backwards)
    reference.score(batch(seed=9))
    assert reference.kl_floor == floor


def test_fewer_bits_have_a_higher_floor() -> None:
    policy = llama()
    floors = {kind: build_reference(policy, config(kind), calibration=batch()).kl_floor for kind in KINDS}
    assert 0 < 20 * floors["int8"].mean < min(floors["int4"].mean, floors["nf4"].mean)


def test_calibration_is_measured_at_once_and_over_all_of_it(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    policy, parts = llama(attention_dropout=0.5).train(), [batch(), batch((12, 5), 4, seed=1)]
    reference = build_reference(policy, config("int8"), calibration=iter(parts))
    assert policy.training
    policy.eval()
    model = plain(policy, reference, "int8", tmp_path)
    expected = torch.cat([kl_of(policy, model, tokens) for tokens in parts])
    floor = reference.kl_floor
    assert floor is not None and floor.tokens == 17
    assert floor.mean == pytest.approx(float(expected.mean()), rel=1e-3)
    said = [r.getMessage() for r in caplog.records if "is rounding" in r.getMessage()]
    assert said == [
        f"The reference is quantised to int8: a KL below {floor.mean:.2g} nats per token (at most {floor.max:.2g}, "
        "over 17 tokens) is rounding error."
    ]
    reference.score(batch(seed=4))
    assert reference.kl_floor == floor
    assert build_reference(policy, config("int8"), calibration=parts[0]).kl_floor.tokens == 9
    with pytest.raises(ValueError, match=r"reference\.quantize is not set"):
        build_reference(policy, "clone", calibration=parts[0])


def test_a_floor_above_the_limit_is_refused_and_nothing_is_scored() -> None:
    policy = llama()
    reference = build_reference(policy, config("nf4", max_kl_floor=1e-4))
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"quantised to nf4 is .*max_kl_floor is 0\.0001: .* Use reference.quantize 'int8', reference",
        ):
            reference.score(batch())
    with pytest.raises(ValueError, match="nats per token from full precision"), reference.logits(batch()):
        pass
    with pytest.raises(ValueError, match="nats per token from full precision"):
        build_reference(policy, config("int8", max_kl_floor=1e-9), calibration=batch())


def test_a_policy_that_trained_before_the_first_score_cannot_show_it() -> None:
    policy = llama()
    early = build_reference(policy, config("int8"), calibration=batch())
    late = build_reference(policy, config("int8"))
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(
        ValueError, match=r"up_proj\.weight has other values.* Score once before training.*calibration="
    ):
        late.score(batch())
    assert early.score(batch()).logp.isfinite().all()


def test_a_policy_that_was_only_cast_has_not_trained() -> None:
    policy = llama()
    reference = build_reference(policy, config("int8"))
    policy.bfloat16()
    reference.score(batch())
    assert reference.kl_floor is not None


def test_a_batch_without_a_scored_token_settles_nothing() -> None:
    policy = llama()
    reference = build_reference(policy, config("int8"))
    reference.score(batch(completion=0))
    assert reference.kl_floor is None
    reference.score(batch())
    assert reference.kl_floor is not None


def test_a_folder_is_compared_with_what_is_in_it(tmp_path: Path) -> None:
    first, policy = llama(), llama()
    first.save_pretrained(tmp_path / "first")
    source = config("int8", source=str(tmp_path / "first"))
    reference = build_reference(policy, source)
    loaded = sum(t.numel() * t.element_size() for t in (*first.parameters(), *first.buffers()))
    before = reference.memory().total
    with torch.no_grad():
        policy.lm_head.weight += 1.0  # the policy has nothing to do with it
    reference.score(batch())
    assert before - reference.memory().total == pytest.approx(loaded, rel=0.01)
    expected = kl_of(first, plain(first, reference, "int8", tmp_path), batch())
    assert reference.kl_floor is not None and reference.kl_floor.mean == pytest.approx(float(expected.mean()), rel=1e-3)
    peft = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    other = build_reference(peft, config("int4", source=str(tmp_path / "first")), calibration=batch())
    assert other.score(batch()).logp.isfinite().all()


def test_under_autocast_both_sides_are_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(PartialState, "_shared_state", {})
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    policy = llama()
    plainly = build_reference(policy, config("int8"), calibration=batch()).kl_floor
    reference = build_reference(policy, config("int8"), accelerator)
    accelerator.prepare(policy)
    reference.score(batch())
    assert plainly is not None and reference.kl_floor is not None
    assert plainly.mean < reference.kl_floor.mean < 10 * plainly.mean


# beside the rest


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_divergence_from_it(kind: str, tmp_path: Path) -> None:
    policy, tokens = llama(), batch()
    reference = build_reference(policy, config(kind))
    model = plain(policy, reference, kind, tmp_path)
    with torch.no_grad():
        reference.score(tokens)
        policy.model.layers[0].mlp.up_proj.weight += 0.05
    pair = score_pair(policy, reference, tokens, divergence="reverse_kl")
    found = pair.divergence[tokens.completion_mask]
    torch.testing.assert_close(found.detach().double(), kl_of(policy, model, tokens), rtol=1e-3, atol=1e-6)
    found.sum().backward()
    assert policy.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_the_check_knows_the_floor() -> None:
    policy = llama()
    reference = build_reference(policy, config("int8"))
    findings = {f.check: f for f in check_reference(policy, reference, batch(), vocabulary=258)}
    zero = findings["the KL is 0 before the first step"]
    assert zero.verdict == "note" and "reference.quantize is 'int8'" in zero.advice
    assert f"{reference.kl_floor.mean:.3g} (at most {reference.kl_floor.max:.3g})" in zero.found
    assert not [f for f in findings.values() if f.verdict == "fault"], findings
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight += 0.1
    findings = {f.check: f for f in check_reference(policy, reference, batch())}
    assert findings["the KL is 0 before the first step"].verdict == "fault"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_update_rounds_anew(kind: str) -> None:
    policy = llama()
    reference = build_reference(policy, config(kind))
    reference.score(batch())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    reference.update(policy)
    anew = build_reference(policy, config(kind))
    assert reference.fingerprint() == anew.fingerprint()
    assert torch.equal(reference.score(batch()).logp, anew.score(batch()).logp)


def test_a_moving_average_of_a_rounded_reference_does_not_stand_still() -> None:
    """Rounded to 8 bits a step of 0.001 is nothing; the average beside it takes it, and the numbers follow."""
    policy = llama()
    reference = build_reference(policy, config("int8"))
    layer = reference.model.model.layers[0].mlp.up_proj
    first = layer.weight.clone()
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight.add_(1.0)
    for _ in range(500):
        reference.update(policy, alpha=0.001)
    right = first + (1 - 0.999**500) * (policy.model.layers[0].mlp.up_proj.weight - first)
    step = right.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - right).abs() <= 0.51 * step).all()


def _refused() -> Iterator[tuple[str, nn.Module, dict[str, Any], str]]:
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    yield "a PEFT policy", get_peft_model(llama(), lora), {}, "shares with it: a quantised copy would only add memory"
    yield "adapter", get_peft_model(llama(), lora), {"strategy": "adapter"}, r"reference\.quantize cannot be set"
    yield "swap", llama(), {"strategy": "swap"}, r"reference\.quantize cannot be set\. Use 'clone' instead"
    yield "no groups", llama(intermediate_size=40), {"quantize": "int4"}, "40 inputs of .*down_proj are not a multiple"


REFUSED = {name: rest for name, *rest in _refused()}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    policy, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build_reference(
            policy, config(**{"kind": "int8", **{"kind" if k == "quantize" else k: v for k, v in options.items()}})
        )


@pytest.mark.parametrize(("kind", "package"), [(kind, FORMATS[kind].package) for kind in KINDS])
def test_a_missing_package_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs {package}, which is not installed: pip install 'refkl\[quantize\]'"):
        build_reference(llama(), config(kind))
    assert build_reference(llama(), "clone").strategy == "clone"


def test_auto_takes_the_strategy_that_can() -> None:
    reference = build_reference(llama(), config("int4", strategy="auto"))
    assert reference.strategy == "clone" and "linear layers in int4" in reference.reason


def test_config() -> None:
    with pytest.raises(ValueError, match=r"Unknown reference\.quantize 'int5'\. Did you mean 'int[48]'\? Known"):
        ReferenceConfig(quantize="int5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_kl_floor must be positive, got 0"):
        ReferenceConfig(quantize="int8", max_kl_floor=0.0)
    with pytest.raises(ValueError, match="limits the KL floor of a quantised reference"):
        ReferenceConfig(max_kl_floor=0.1)


# in a trainer


def _trainer(policy: nn.Module, folder: Path, steps: int, **options: Any) -> KLDPOTrainer:
    rows = Dataset.from_dict({"prompt": ["hello"] * 8, "chosen": [" good"] * 8, "rejected": [" bad"] * 8})
    quiet = {"report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "learning_rate": 0.01}
    args = DPOConfig(output_dir=str(folder), max_steps=steps, save_steps=1, **quiet)
    return KLDPOTrainer(
        policy, args=args, train_dataset=rows, processing_class=byte_tokenizer(), reference=config("int8"), **options
    )


def test_a_resumed_run_keeps_the_floor(tmp_path: Path) -> None:
    """The policy of the checkpoint has trained: the floor cannot be measured by it."""
    policy = llama()
    start = copy.deepcopy(policy)
    first = _trainer(policy, tmp_path, 2)
    first.train()
    again = _trainer(copy.deepcopy(start), tmp_path, 3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert first.reference.kl_floor is not None and again.reference.kl_floor == first.reference.kl_floor
    other = _trainer(llama(), tmp_path, 3)
    with pytest.raises(ValueError, match="trained against a reference with fingerprint"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_it_is_synced_in_a_trainer(tmp_path: Path) -> None:
    policy = llama()
    trainer = _trainer(policy, tmp_path, 2, sync=SyncConfig(every=1, alpha=1.0))
    trainer.train()
    assert trainer.reference.fingerprint() == build_reference(policy, config("int8")).fingerprint()


def test_gpt2s_layers_are_held_as_they_multiply() -> None:
    """Conv1D's weight is [in, out]; a scale is for an output."""
    policy = gpt2()
    reference = build_reference(policy, config("int8"))
    layer = reference.model.transformer.h[0].mlp.c_fc
    assert policy.transformer.h[0].mlp.c_fc.weight.shape == (32, 128)
    assert layer.qdata.shape == (128, 32) and layer.scale.shape == (128, 1)
    assert canonical_name("transformer.h.0.mlp.c_fc.weight.qdata") in reference.digests


def test_the_floor_is_measured_of_what_a_cache_knows_too(tmp_path: Path) -> None:
    policy = llama()
    build_reference(policy, config("int8", cache=str(tmp_path))).fill([batch()])
    again = build_reference(policy, config("int8", cache=str(tmp_path)))
    again.score(batch())
    assert again.cache is not None and again.cache.stats.misses == 0
    assert again.kl_floor is not None and again.kl_floor.mean > 0
    with pytest.raises(ValueError, match="max_kl_floor is 1e-09"):
        build_reference(policy, config("int8", cache=str(tmp_path), max_kl_floor=1e-9)).score(batch())
