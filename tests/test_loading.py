"""A model from a folder is the folder's own, class, weights and vocabulary, or it is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import models as support
from support.families import tiny
from support.models import VOCABULARY, batch, byte_tokenizer, gpt2, gpt_neox, llama
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from refkl import ReferenceConfig, build_reference, score_pair, score_tokens
from refkl.cli.export import export
from refkl.cli.inputs import load_model
from refkl.compare import load_checkpoint
from refkl.config import ModelConfig
from refkl.kl import divergence
from refkl.loading import token_maps_differ

BATCH = batch()


def qwen2(**overrides: Any) -> PreTrainedModel:
    """With biases that are not 0: a Llama with the other weights computes something else."""
    model = support.qwen2(**overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def logp(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return score_tokens(model, BATCH).logp


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def reference_of(policy: nn.Module, source: str, **options: Any) -> Any:
    return build_reference(policy, ReferenceConfig(source=source, **options))


def rewritten(folder: str, change: Callable[[dict[str, Tensor]], None]) -> str:
    """The folder with its weights changed."""
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def described(folder: str, **fields: Any) -> str:
    """The folder with these fields in its config.json."""
    file = Path(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of which a model was loaded with memory of its own since the test began."""
    found: list[str] = []
    original = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **options: Any) -> Any:
        if options.get("device_map") != "meta":
            found.append(cls.__name__)
        return original(cls, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    return found


# --- the class that the folder names


@pytest.mark.parametrize(
    ("policy", "other"),
    [(llama, qwen2), (qwen2, llama), (llama, gpt2), (gpt2, gpt_neox), (gpt_neox, llama), (llama, llama)],
)
def test_a_folder_is_loaded_as_its_own_class(policy: Any, other: Any, tmp_path: Path) -> None:
    folder = saved(other(), tmp_path / "other")
    alone = AutoModelForCausalLM.from_pretrained(folder)
    reference = reference_of(policy(), folder)
    assert reference.strategy == "clone" and type(reference.model) is type(alone)
    assert torch.equal(reference.score(BATCH).logp, logp(alone))


def test_under_an_adapter_the_bases_class_does_not_matter(tmp_path: Path) -> None:
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    alone = qwen2()
    reference = reference_of(policy, saved(alone, tmp_path / "other"))
    assert torch.equal(reference.score(BATCH).logp, logp(alone))


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("other", [qwen2, gpt_neox])
def test_the_exact_divergence_to_another_architecture(other: Any, kind: str, tmp_path: Path) -> None:
    policy, alone = llama(), other()
    reference = reference_of(policy, saved(alone, tmp_path / "other"))
    found = score_pair(policy, reference, BATCH, divergence=kind)
    rows = {"input_ids": BATCH.input_ids, "attention_mask": BATCH.attention_mask}
    with torch.no_grad():
        logits, ref_logits = (model(**rows).logits[:, :-1] for model in (policy, alone))
    exact = divergence(logits, ref_logits, kind) * BATCH.completion_mask[:, 1:]
    torch.testing.assert_close(found.divergence[:, 1:], exact, rtol=1e-4, atol=1e-5)
    assert found.divergence.requires_grad and exact.max() > 0.5


@pytest.mark.parametrize(("other", "said"), [(qwen2, "has no weight 'model.*bias'"), (gpt2, "has no weight 'transf")])
def test_a_sync_onto_another_architecture_is_refused_by_name(other: Any, said: str, tmp_path: Path) -> None:
    policy = llama()
    reference = reference_of(policy, saved(other(), tmp_path / "other"))
    before = reference.fingerprint()
    for ask in (reference.check_movable, reference.update):
        with pytest.raises(ValueError, match=said):
            ask(policy)
    assert reference.fingerprint() == before and reference.updates == 0


@pytest.mark.parametrize("other", [qwen2, gpt2])
def test_weights_that_the_policy_lacks_follow_its_dtype_too(other: Any, tmp_path: Path) -> None:
    policy, alone = llama(), other()
    reference = reference_of(policy, saved(alone, tmp_path / "other"))
    policy.to(torch.float64)
    assert torch.equal(reference.score(BATCH).logp, logp(alone.to(torch.float64)))
    assert {p.dtype for p in reference.model.parameters()} == {torch.float64}


def test_options_hold_for_another_architecture(tmp_path: Path) -> None:
    policy, alone = llama(), qwen2()
    folder = saved(alone, tmp_path / "other")
    assert torch.equal(reference_of(policy, folder, offload=True).score(BATCH).logp, logp(alone))
    half = reference_of(policy, folder, dtype="bfloat16")
    assert torch.equal(half.score(BATCH).logp, logp(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)))
    coarse = build_reference(
        policy, ReferenceConfig(strategy="clone", source=folder, quantize="int8"), calibration=BATCH
    )
    assert 0 < coarse.kl_floor.mean < 0.05


def test_the_policys_attention_is_taken_where_the_folders_class_has_it(tmp_path: Path) -> None:
    reference = reference_of(llama(attn_implementation="eager"), saved(qwen2(), tmp_path / "other"))
    assert reference.model.config._attn_implementation == "eager"
    alone = tiny("CodeGenForCausalLM")
    policy = llama(attn_implementation="sdpa")
    assert policy.config._attn_implementation == "sdpa" and not type(alone)._supports_sdpa
    reference = reference_of(policy, saved(alone, tmp_path / "without"))
    assert reference.model.config._attn_implementation == "eager"
    assert torch.equal(reference.score(BATCH).logp, logp(alone))


def llava(**overrides: Any) -> LlavaForConditionalGeneration:
    text = llama(**overrides).config
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1)
    ).eval()


def test_an_image_text_policy(tmp_path: Path) -> None:
    policy, other = llava(), llava()
    reference = reference_of(policy, saved(other, tmp_path / "other"))
    assert type(reference.model) is LlavaForConditionalGeneration
    assert torch.equal(reference.score(BATCH).logp, logp(other))
    with pytest.raises(ValueError, match=r"holds a LlamaForCausalLM, and an image-text model is needed"):
        reference_of(policy, saved(llama(), tmp_path / "text"))
    with pytest.raises(ValueError, match=r"holds a LlavaForConditionalGeneration, and a causal language model"):
        reference_of(llama(), str(tmp_path / "other"))


# --- refused by its configuration


def reward_model(folder: Path) -> str:
    config = llama(tie_word_embeddings=True).config
    return saved(LlamaForSequenceClassification(config), folder)


def masked(folder: Path) -> str:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return saved(BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **size)), folder)


def translator(folder: Path) -> str:
    size = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    return saved(T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **size)), folder)


def without_config(folder: Path) -> str:
    (Path(saved(llama(), folder)) / "config.json").unlink()
    return str(folder)


def adapter(folder: Path) -> str:
    get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    return str(folder)


REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "a wider Qwen2": (lambda f: saved(qwen2(vocab_size=300), f), "has 300 tokens and the policy's 258"),
    "a narrower GPT-2": (lambda f: saved(gpt2(vocab_size=64), f), "has 64 tokens and the policy's 258"),
    "a wider Llama": (lambda f: saved(llama(vocab_size=300), f), "has 300 tokens and the policy's 258"),
    "a reward model": (reward_model, "holds a LlamaForSequenceClassification, and a causal language model is needed"),
    "a masked language model": (masked, "holds a BertForMaskedLM, and a causal language model is needed"),
    "a translator": (translator, "holds a T5ForConditionalGeneration, and a causal language model is needed"),
    "no configuration": (without_config, r"holds no config\.json\."),
    "an adapter": (adapter, r"holds no config\.json, only an adapter"),
    "a model type that nobody knows": (
        lambda f: described(saved(llama(), f), model_type="lama", architectures=["LamaForCausalLM"]),
        "names the model type 'lama', which transformers",
    ),
    "no model type": (
        lambda f: described(saved(llama(), f), model_type=None, architectures=None),
        "names the model type None, which transformers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_memory_is_taken(case: str, tmp_path: Path, allocated: list[str]) -> None:
    make, said = REFUSED[case]
    folder = make(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"The reference cannot be loaded from .*other': .*{said}"):
        reference_of(llama(), folder)
    assert not allocated


def test_a_misspelt_source_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded from 'pretraind': .* Did you mean 'pretrained'"):
        reference_of(llama(), "pretraind", strategy="clone")


def test_a_policy_that_transformers_did_not_make(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the policy is a Linear, and only a transformers model"):
        reference_of(nn.Linear(2, 2), saved(llama(), tmp_path / "other"), strategy="clone")


# --- nothing missing and nothing left over


def drop(weights: dict[str, Tensor]) -> None:
    for name in [n for n in weights if "mlp" in n][:2]:
        del weights[name]


def add(weights: dict[str, Tensor]) -> None:
    weights["v_head.summary.weight"] = torch.zeros(1, 32)


def cut(weights: dict[str, Tensor]) -> None:
    name = next(n for n in weights if "norm" in n or "ln_f" in n)
    weights[name] = weights[name][:8].clone()


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (drop, r"lacks 2 weights that \w+ has, such as \S+mlp\S+: they would be drawn at random"),
    "left over": (add, r"holds 1 weights that \w+ does not have, such as v_head\.summary\.weight"),
    "another shape": (cut, r"1 of its weights have another shape than \w+ needs, such as \S+: \[8\] instead of \[32\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("other", [llama, qwen2, gpt2])
def test_a_reference_that_is_not_whole(other: Any, fault: str, tmp_path: Path, allocated: list[str]) -> None:
    change, said = FAULTS[fault]
    folder = rewritten(saved(other(), tmp_path / "other"), change)
    with pytest.raises(ValueError, match=rf"The reference cannot be loaded from .*{said}.*Set reference\.source"):
        reference_of(llama(), folder)
    assert not allocated


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [llama, gpt2])
def test_a_pretrained_reference_whose_folder_was_changed(kind: Any, fault: str, tmp_path: Path) -> None:
    change, said = FAULTS[fault]
    folder = saved(kind(), tmp_path / "model")
    policy = type(kind()).from_pretrained(folder)
    rewritten(folder, change)
    with pytest.raises(ValueError, match=rf"The reference cannot be loaded from .*{said}"):
        reference_of(policy, "pretrained", strategy="clone")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [qwen2, gpt2])
def test_compare_and_train_refuse_it_too(kind: Any, fault: str, tmp_path: Path, allocated: list[str]) -> None:
    change, said = FAULTS[fault]
    folder = rewritten(saved(kind(), tmp_path / "model"), change)
    with pytest.raises(ValueError, match=rf"The model '.*' cannot be loaded: .*{said}"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match=rf"model\.path '.*' cannot be loaded: .*{said}"):
        load_model(ModelConfig(path=folder))
    assert not allocated


def run_folder(folder: Path, adapted: bool, kind: Any) -> Path:
    """As `refkl train` leaves it."""
    base = kind()
    base_folder = saved(base, folder / "base")
    model = get_peft_model(
        type(base).from_pretrained(base_folder), LoraConfig(r=4, target_modules=["q_proj"])
    ) if adapted else base  # fmt: skip
    model.save_pretrained(folder / "run" / "model")
    byte_tokenizer().save_pretrained(folder / "run" / "model")
    (folder / "run" / "config.yaml").write_text(json.dumps({"model": {"dtype": "float32", "init_kwargs": {}}}))
    return folder / "run"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [llama, qwen2])
def test_export_refuses_a_trained_policy_that_is_not_whole(kind: Any, fault: str, tmp_path: Path) -> None:
    change, said = FAULTS[fault]
    run = run_folder(tmp_path / "plain", False, kind)
    assert export(run, tmp_path / "good") == 0.0
    rewritten(str(run / "model"), change)
    with pytest.raises(ValueError, match=rf"The trained policy .* cannot be loaded: .*{said}"):
        export(run, tmp_path / "bad")
    run = run_folder(tmp_path / "adapted", True, kind)
    rewritten(str(tmp_path / "adapted" / "base"), change)
    with pytest.raises(ValueError, match=rf"The adapter's base model .* cannot be loaded: .*{said}"):
        export(run, tmp_path / "bad", merge=True)
    assert not (tmp_path / "bad").exists()


def old_rotary(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)


def old_mask(weights: dict[str, Tensor]) -> None:
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128).tril()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (lambda: llama(tie_word_embeddings=True), None),
        (gpt2, None),
        (llama, old_rotary),
        (qwen2, old_rotary),
        (gpt2, old_mask),
    ],
    ids=["tied Llama", "tied GPT-2", "old Llama", "old Qwen2", "old GPT-2"],
)
def test_what_is_left_out_on_purpose_is_no_fault(kind: Any, change: Any, tmp_path: Path) -> None:
    model = kind()
    folder = saved(model, tmp_path / "model")
    if change is not None:
        rewritten(folder, change)
    right = logp(model)
    assert torch.equal(reference_of(llama(), folder).score(BATCH).logp, right)
    assert torch.equal(logp(load_checkpoint(folder).model), right)
    assert torch.equal(logp(load_model(ModelConfig(path=folder))), right)
    policy = type(model).from_pretrained(folder)
    assert torch.equal(reference_of(policy, "pretrained", strategy="clone").score(BATCH).logp, right)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "model")
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    for load in (lambda: reference_of(llama(), folder), lambda: load_model(ModelConfig(path=folder))):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load()


# --- options of from_pretrained


def test_options_reach_the_model(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "model")
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    options = {"rope_parameters": scaled, "attn_implementation": "eager"}
    right = LlamaForCausalLM.from_pretrained(folder, **options)
    found = load_model(ModelConfig(path=folder, init_kwargs=options))
    assert found.config._attn_implementation == "eager" and found.config.rope_parameters["factor"] == 4.0
    assert torch.equal(logp(found), logp(right))
    assert not torch.allclose(logp(found), logp(LlamaForCausalLM.from_pretrained(folder)), atol=1e-3)
    wider = load_model(ModelConfig(path=folder, init_kwargs={"vocab_size": 300, "ignore_mismatched_sizes": True}))
    assert wider.lm_head.weight.shape == (300, 32)  # asked for by name


def as_stored(model: nn.Module) -> Tensor:
    """Log-probabilities as `logp`. In eval mode, on processors with AVX-512 BF16, 4-bit layers rewrite their weight."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
    return logp(model)


@pytest.mark.parametrize("kind", [llama, qwen2])
def test_quantised_models(kind: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, four = saved(kind(), tmp_path / "model"), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    right = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**four))
    found = load_model(ModelConfig(path=folder, init_kwargs={"quantization_config": BitsAndBytesConfig(**four)}))
    assert torch.equal(as_stored(found), as_stored(right))
    packed = saved(found, tmp_path / "packed")
    again = load_checkpoint(packed).model
    assert torch.equal(as_stored(again), as_stored(right))
    reference = reference_of(found, "pretrained", strategy="clone")
    assert torch.equal(reference.score(BATCH).logp, as_stored(right))
    plain = reference_of(get_peft_model(found, LoraConfig(r=2, target_modules=["q_proj"])), folder)
    assert torch.equal(plain.score(BATCH).logp, as_stored(AutoModelForCausalLM.from_pretrained(folder)))
    rewritten(folder, drop)
    with pytest.raises(ValueError, match="lacks 2 weights"):
        load_model(ModelConfig(path=folder, init_kwargs={"quantization_config": BitsAndBytesConfig(**four)}))


# --- revisions


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, PreTrainedModel]:
    """Two commits of "me/model" in a hub cache; the branch main is the second."""
    root = tmp_path / "hub" / "models--me--model"
    commits = {"a" * 40: llama(), "b" * 40: llama()}
    for commit, model in commits.items():
        model.save_pretrained(root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("b" * 40)
    (root / "refs" / "v1").write_text("a" * 40)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(root.parent), raising=False)
    return commits


@pytest.mark.parametrize("revision", ["v1", "a" * 40])
def test_pretrained_is_the_revision_that_the_policy_was_loaded_from(
    hub: dict[str, PreTrainedModel], revision: str
) -> None:
    first, second = (logp(model) for model in hub.values())
    policy = load_model(ModelConfig(path="me/model", init_kwargs={"revision": revision}))
    assert torch.equal(logp(policy), first)
    found = reference_of(policy, "pretrained", strategy="clone").score(BATCH).logp
    assert torch.equal(found, first) and not torch.equal(found, second)
    main = load_model(ModelConfig(path="me/model"))
    assert torch.equal(reference_of(main, "pretrained", strategy="clone").score(BATCH).logp, second)


def test_a_commit_that_transformers_kept_is_used(hub: dict[str, PreTrainedModel]) -> None:
    policy = LlamaForCausalLM.from_pretrained("me/model", revision="v1")
    policy.config._commit_hash = "a" * 40  # as versions before 5.23 do
    found = reference_of(policy, "pretrained", strategy="clone").score(BATCH).logp
    assert torch.equal(found, logp(hub["a" * 40]))


# --- code from a folder


class Doubled(LlamaForCausalLM):
    """A class of the user's own."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = 2 * output.logits
        return output


def test_a_class_of_the_users_own_is_the_folders_if_it_says_so(tmp_path: Path) -> None:
    policy, other = Doubled(llama().config).eval(), Doubled(llama().config).eval()
    reference = reference_of(policy, saved(other, tmp_path / "own"))
    assert type(reference.model) is Doubled
    rows = {"input_ids": BATCH.input_ids, "attention_mask": BATCH.attention_mask}
    with torch.no_grad():
        right = other(**rows).logits.log_softmax(-1)[:, :-1].gather(-1, BATCH.input_ids[:, 1:, None])[..., 0]
    mask = BATCH.completion_mask[:, 1:]
    torch.testing.assert_close(reference.score(BATCH).logp[:, 1:][mask], right[mask], rtol=1e-4, atol=1e-4)
    plain = saved(llama(), tmp_path / "plain")
    assert type(reference_of(policy, plain).model) is LlamaForCausalLM


@pytest.mark.parametrize("model_type", ["llama", "strange"])
def test_no_code_from_a_folder_is_run(model_type: str, tmp_path: Path) -> None:
    model = llama()
    folder = saved(model, tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import *\n"
    for name in ("configuration_own", "modeling_own"):
        (Path(folder) / f"{name}.py").write_text(code + "class Own(LlamaConfig): ...\n")
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    described(folder, model_type=model_type, auto_map=auto)
    loads = (
        lambda: reference_of(llama(), folder).model,
        lambda: load_checkpoint(folder).model,
        lambda: load_model(ModelConfig(path=folder)),
    )
    for load in loads:
        if model_type == "llama":  # transformers has the class itself
            assert torch.equal(logp(load()), logp(model))
        else:
            with pytest.raises(ValueError, match="needs code from that folder, and refkl runs none"):
                load()
    assert not (tmp_path / "ran").exists()


def test_code_that_was_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = saved(llama(), tmp_path / "model")
    (Path(folder) / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'strange'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    described(folder, model_type="strange", auto_map=auto, architectures=["OwnForCausalLM"])
    policy = load_model(ModelConfig(path=folder, init_kwargs={"trust_remote_code": True}))
    assert type(policy).__name__ == "OwnForCausalLM" and type(policy).__module__.startswith("transformers_modules")
    for source in ("pretrained", folder):  # the policy's class is loaded already
        reference = reference_of(policy, source, strategy="clone")
        assert type(reference.model) is type(policy)
        assert torch.equal(reference.score(BATCH).logp, logp(policy))
    rewritten(folder, add)
    with pytest.raises(ValueError, match="holds 1 weights that OwnForCausalLM does not have"):
        load_model(ModelConfig(path=folder, init_kwargs={"trust_remote_code": True}))


# --- token maps


def permuted(folder: str) -> str:
    """The folder with a tokenizer in which A and B are exchanged."""
    tokenizer = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    changed = Tokenizer.from_str(json.dumps(tokenizer))
    PreTrainedTokenizerFast(tokenizer_object=changed, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("other", [llama, qwen2])
def test_a_permuted_vocabulary_is_refused(other: Any, tmp_path: Path, allocated: list[str]) -> None:
    start = saved(llama(), tmp_path / "start")
    byte_tokenizer().save_pretrained(start)
    policy = LlamaForCausalLM.from_pretrained(start)
    folder = permuted(saved(other(), tmp_path / "other"))
    allocated.clear()
    said = (
        rf"the tokenizers of {folder} and of the policy \({start}\) differ in 2 of 25[89] tokens: 'A' is number 35 in"
    )
    with pytest.raises(ValueError, match=said):
        reference_of(policy, folder)
    assert not allocated
    byte_tokenizer().save_pretrained(folder)
    right = logp(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(reference_of(policy, folder).score(BATCH).logp, right)
    for file in Path(folder).glob("tokenizer*"):
        file.unlink()
    assert torch.equal(reference_of(policy, folder).score(BATCH).logp, right)
    shutil.copytree(start, tmp_path / "copy")
    assert torch.equal(reference_of(policy, str(tmp_path / "copy")).score(BATCH).logp, logp(policy))


def renumbered(change: Callable[[dict[str, int]], None]) -> PreTrainedTokenizerFast:
    tokenizer = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    change(tokenizer["model"]["vocab"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer)), pad_token="<pad>")


def test_token_maps_differ_where_a_number_or_a_token_stands_for_two() -> None:
    own = byte_tokenizer()
    assert token_maps_differ(own, byte_tokenizer()) is None
    for one, two in ((own, renumbered(lambda v: v.update(new=258))), (renumbered(lambda v: v.update(new=258)), own)):
        assert token_maps_differ(one, two) is None  # the other leaves the number unused
    moved = token_maps_differ(own, renumbered(lambda v: v.update(A=258)))
    assert moved == "differ in 1 of 258 tokens: 'A' is number 34 in the first and number 258 in the second."
    renamed = token_maps_differ(own, renumbered(lambda v: v.update(new=v.pop("A"))))
    assert renamed == "differ in 1 of 258 tokens: 'A' is number 34 in the first and missing in the second."
