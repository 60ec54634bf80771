"""The output head: found in every causal language model of transformers, and redirected inside the model's forward."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.families import VOCABULARY, classes, tiny
from support.launching import accelerate_launch
from support.models import gpt2, llama
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from refkl import TokenBatch
from refkl.scoring import Head, HeadError, find_head, score_tokens
from refkl.scoring.head.redirect import redirected

# What these do to their logits: logit_scale, softcap, vocabulary.
SPECIAL = {
    "BeamForCausalLM": (1.0, 3.0, VOCABULARY),
    "Cohere2ForCausalLM": (0.37, None, VOCABULARY),
    "CohereForCausalLM": (0.37, None, VOCABULARY),
    "FalconH1ForCausalLM": (0.3, None, VOCABULARY),
    "Gemma2ForCausalLM": (1.0, 3.0, VOCABULARY),
    "Gemma3ForCausalLM": (1.0, 3.0, VOCABULARY),
    "GraniteForCausalLM": (1 / 2.7, None, VOCABULARY),
    "HyperCLOVAXForCausalLM": (2.7, None, VOCABULARY),
    "Inkling2ForCausalLM": (1.0, 3.0, 200),
    "InklingForCausalLM": (1.0, None, 200),
    "NanoChatForCausalLM": (1.0, 3.0, VOCABULARY),
    "RecurrentGemmaForCausalLM": (1.0, 3.0, VOCABULARY),
}
PLAIN = [
    "BloomForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "GPTNeoXForCausalLM",
    "Glm4ForCausalLM",
    "LlamaForCausalLM",
    "MiniCPM3ForCausalLM",
    "MistralForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "StableLmForCausalLM",
]
REFUSED = {
    "MusicgenForCausalLM": "a ModuleList",
    "MusicgenMelodyForCausalLM": "a ModuleList",
    "ProphetNetForCausalLM": "not one row of logits per token",
}
NOT_BUILT = {
    "Gemma3nForConditionalGeneration": "needs timm",
    "Gemma4AssistantForCausalLM": "drafts for another model, whose keys and values it needs",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another model, whose keys and values it needs",
    "Zamba2ForCausalLM": "does not run at this size",
    "xLSTMForCausalLM": "does not run at this size",
}
IDS = torch.arange(2, 16).view(2, 7)


def run(model: nn.Module, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    """The model's own logits, and what entered its head."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    hook.remove()
    return logits, seen[0]


@torch.no_grad()
def error(head: Head, hidden: Tensor, logits: Tensor) -> float:
    return float((head.logits(hidden).float() - logits.float()).abs().max() / logits.abs().max())


def check_logits(name: str) -> Head:
    model = tiny(name)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    head = find_head(model)
    with torch.no_grad():
        logits, hidden = run(model)
    assert error(head, hidden, logits) < 1e-5
    scale, cap, vocabulary = SPECIAL.get(name, (head.logit_scale, head.softcap, VOCABULARY))
    assert head.logit_scale == pytest.approx(scale, rel=1e-6) and head.vocabulary == vocabulary == logits.shape[-1]
    assert head.softcap == (None if cap is None else pytest.approx(cap, rel=1e-6))
    # What was found matters here: without it the logits are others.
    if head.logit_scale != 1.0:
        assert error(replace(head, logit_scale=1.0), hidden, logits) > 1e-2
    if head.softcap is not None:
        assert error(replace(head, softcap=None), hidden, logits) > 1e-2
    return head


# finding


@pytest.mark.parametrize("name", [*SPECIAL, *PLAIN])
def test_logits_are_those_of_the_head_that_was_found(name: str) -> None:
    check_logits(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in classes() if n not in {*SPECIAL, *PLAIN}])
def test_logits_are_those_of_the_head_in_every_class(name: str) -> None:
    if name in NOT_BUILT:
        pytest.skip(NOT_BUILT[name])
    if name in REFUSED:
        with pytest.raises(HeadError, match=REFUSED[name]):
            find_head(tiny(name))
    else:
        check_logits(name)


@pytest.mark.parametrize("name", ["CohereForCausalLM", "Gemma2ForCausalLM", "FalconH1ForCausalLM", "LlamaForCausalLM"])
def test_scale_and_cap_of_a_bf16_model_are_not_rounded(name: str) -> None:
    head, exact = (find_head(tiny(name).to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert (head.logit_scale, head.softcap) == (exact.logit_scale, exact.softcap)


@pytest.mark.parametrize(
    ("scale", "cap"), [(0.0078125, 50.0), (1 / 96, None), (16.0, None), (1.0, 1000.0), (0.02, 0.5)]
)
def test_scales_and_caps_far_from_one(scale: float, cap: float | None) -> None:
    head = find_head(processed(lambda x: x * scale if cap is None else cap * torch.tanh(x * scale / cap)))
    assert head.logit_scale == pytest.approx(scale, rel=2e-6)
    assert head.softcap == (None if cap is None else pytest.approx(cap, rel=1e-5))


def test_the_bias_is_scaled_with_the_logits() -> None:
    model = processed(lambda x: x * 0.25)
    model.lm_head = nn.Linear(32, VOCABULARY, bias=True)
    head = find_head(model)
    logits, hidden = run(model)
    assert error(head, hidden, logits) < 1e-6
    torch.testing.assert_close(head.bias, 0.25 * model.lm_head.bias)


def test_finding_leaves_no_trace() -> None:
    model = gpt2(resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    head = find_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(head.module) and not head.module._forward_hooks


def test_the_model_is_run_once_for_a_head_that_is_known() -> None:
    model = llama()
    calls = []
    model.model.register_forward_pre_hook(lambda module, args: calls.append("body"))
    model.register_forward_pre_hook(lambda module, args: calls.append("the user's own"))
    assert find_head(model).module is find_head(model).module is model.lm_head
    assert calls == ["body"]
    model.resize_token_embeddings(300)
    assert find_head(model).vocabulary == 300 and calls == ["body", "body"]


def test_nothing_keeps_the_model_alive() -> None:
    model = llama()
    find_head(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# refusing


def processed(after: Callable[[Tensor], Tensor], **overrides: object) -> LlamaForCausalLM:
    """A Llama that does `after` to its logits."""

    class Processed(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = after(outputs.logits)
            return outputs

    return Processed(llama(**overrides).config).eval()


def masked(logits: Tensor) -> Tensor:
    logits[..., 250:] = float("-inf")
    return logits


@pytest.mark.parametrize(
    "after",
    [
        lambda x: x + 0.01,
        lambda x: x + torch.eye(VOCABULARY)[VOCABULARY - 1, : x.shape[-1]],
        lambda x: x.clamp(-100, 100),
        lambda x: x.log_softmax(-1),
        lambda x: x.abs(),
        lambda x: -x,
        lambda x: x * 0.0,
        lambda x: 30 * torch.tanh(x / 30) + 0.5 * x,
        lambda x: (x * 0.3).bfloat16(),
        masked,
    ],
    ids=["offset", "offset-one", "clamp", "log_softmax", "abs", "minus", "zero", "leaky", "rounded", "masked"],
)
def test_other_treatment_of_the_logits_is_refused(after: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(HeadError, match=r"in a way that refkl does not know\. Given 258 numbers"):
        find_head(processed(after))


def test_a_cast_of_the_logits_is_taken() -> None:
    head = find_head(processed(lambda x: x.bfloat16()))
    assert (head.logit_scale, head.softcap) == (1.0, None)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_a_head_that_peft_adapts_is_refused(adapter: dict[str, list[str]]) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, **adapter))
    with pytest.raises(HeadError, match=r"output head is a \w+: PEFT adapts it.*target_modules"):
        find_head(model)


def test_trained_rows_of_a_tied_head_are_refused() -> None:
    model = get_peft_model(
        llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    )
    with pytest.raises(HeadError, match="PEFT adapts it"):
        find_head(model)


def test_adapters_elsewhere_are_taken() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    assert find_head(model).module is model.get_base_model().lm_head


def quantised(module: nn.Linear) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {nn.Linear}, dtype=torch.qint8)[0]


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()) * 2


class Packed(Tensor):
    """As torchao holds quantised weights: a subclass of Tensor that looks like a matrix."""


def head_of(change: Callable[[nn.Linear], nn.Module]) -> LlamaForCausalLM:
    model = llama()
    model.lm_head = change(model.lm_head)
    return model


def weight_of(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Linear], nn.Module]:
    def apply(module: nn.Linear) -> nn.Module:
        module.weight = nn.Parameter(change(module.weight.detach()), requires_grad=False)
        return module

    return apply


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (quantised, "not a torch.nn.Linear with its own forward"),
        (lambda m: Own(32, VOCABULARY), "output head is an Own, and not a torch.nn.Linear"),
        (lambda m: None, "output head is missing"),
        (weight_of(lambda w: w.as_subclass(Packed)), "weight is a Packed"),
        (weight_of(lambda w: w.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
        (weight_of(lambda w: w.to("meta")), "meta device"),
    ],
    ids=["quantised", "own-forward", "none", "subclass", "float8", "meta"],
)
def test_a_head_that_is_not_a_plain_product_is_refused(change: Callable[[nn.Linear], nn.Module], match: str) -> None:
    with pytest.raises(HeadError, match=match):
        find_head(head_of(change))


def test_a_sharded_weight_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = llama()
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), DeviceMesh("cpu", [0])))
        with pytest.raises(HeadError, match="DTensor: FSDP2"):
            find_head(model)
    finally:
        torch.distributed.destroy_process_group()


def test_wrappers_that_the_head_cannot_be_redirected_in_are_refused_and_scored_all_the_same(tmp_path: Path) -> None:
    model, ones = llama(), torch.ones_like(IDS)
    batch = TokenBatch(IDS, ones, ones)
    expected = score_tokens(model, batch).logp
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for wrapped, match in (
            (nn.DataParallel(copy.deepcopy(model)), "in DataParallel, whose replicas"),
            (
                FullyShardedDataParallel(model, device_id=torch.device("cpu")),
                "FullyShardedDataParallel, which",
            ),
        ):
            with pytest.raises(HeadError, match=match):
                find_head(wrapped)
            torch.testing.assert_close(score_tokens(wrapped, batch).logp, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_does_not_call_its_head_is_refused() -> None:
    """As Liger and TRL patch it."""
    model = llama()
    inner = model.model

    def forward(input_ids: Tensor, attention_mask: Tensor) -> object:
        outputs = inner(input_ids=input_ids, attention_mask=attention_mask)
        outputs.logits = outputs.last_hidden_state @ model.lm_head.weight.T
        return outputs

    model.forward = forward  # type: ignore[method-assign]
    with pytest.raises(HeadError, match="never called the model's output head"):
        find_head(model)


def test_a_replaced_forward_of_the_head_is_refused() -> None:
    model = llama()
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x) * 2  # type: ignore[method-assign]
    with pytest.raises(HeadError, match="forward was replaced"):
        find_head(model)


def test_a_hook_that_changes_the_logits_is_refused() -> None:
    model = llama()
    hook = model.lm_head.register_forward_hook(lambda module, args, result: result * 2)
    with pytest.raises(HeadError, match="forward hook on the output head changes"):
        find_head(model)
    hook.remove()
    head = find_head(model)
    model.lm_head.register_forward_hook(lambda module, args, result: result.mul_(2))
    with pytest.raises(HeadError, match="forward hook"), torch.no_grad(), redirected(head, logp(head)):
        model(input_ids=IDS)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(HeadError, match="Linear is not a transformers model"):
        find_head(nn.Linear(2, 2))


# redirecting


def logp(head: Head) -> Callable[[Tensor], Tensor]:
    """hidden [B, T, H] -> [B, T - 1, 2]: log p of each next token, and the entropy."""

    def fused(hidden: Tensor) -> Tensor:
        log_p = head.logits(hidden[:, :-1]).float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return torch.stack([log_p.gather(-1, IDS[:, 1:, None])[..., 0], entropy], -1)

    return fused


def through_logits(model: nn.Module) -> Tensor:
    log_p = model(input_ids=IDS).logits[:, :-1].float().log_softmax(-1)
    return torch.stack([log_p.gather(-1, IDS[:, 1:, None])[..., 0], -(log_p.exp() * log_p).sum(-1)], -1)


def through_head(model: nn.Module) -> Tensor:
    head = find_head(model)
    with redirected(head, logp(head)) as redirect:
        outputs = model(input_ids=IDS)
    return redirect.stats(outputs)


def gradients(model: nn.Module, stats: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (stats * torch.linspace(-1, 2, stats.numel()).view_as(stats)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_redirect(model: nn.Module, tolerance: float = 1e-4) -> None:
    expected, found = through_logits(model), through_head(model)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    wanted, slopes = gradients(model, expected), gradients(model, found)
    assert slopes.keys() == wanted.keys()
    for name, slope in wanted.items():
        torch.testing.assert_close(slopes[name], slope, rtol=tolerance, atol=tolerance * float(slope.abs().max()))


NAMES = "CohereForCausalLM Gemma2ForCausalLM GPT2LMHeadModel GraniteForCausalLM FalconH1ForCausalLM Inkling2ForCausalLM"


@pytest.mark.parametrize("name", NAMES.split())
def test_values_and_gradients_are_those_through_the_logits(name: str) -> None:
    model: PreTrainedModel = tiny(name)
    check_redirect(model)


@pytest.mark.parametrize("training", [False, True])
def test_lora_with_a_frozen_head(training: bool) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    check_redirect(model.train(training))


def test_a_model_that_works_on_its_logits_in_place() -> None:
    check_redirect(processed(lambda x: x.mul_(0.5)))


def test_what_the_head_gives_stays_fp32_in_a_bf16_model() -> None:
    model = llama().to(torch.bfloat16)
    found = through_head(model)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, through_logits(model), rtol=0, atol=0.05)
    assert (found != found.bfloat16().float()).any()
    assert all(g.dtype == torch.bfloat16 for g in gradients(model, found).values())


def test_the_gradient_is_scaled_as_that_of_the_outputs_is() -> None:
    """DeepSpeed divides the gradient of what its engine returns by the number of accumulation steps."""
    model = llama()
    expected = gradients(model, through_head(model))

    def hooked(module: nn.Module, args: object, outputs: object) -> None:
        outputs.logits.register_hook(lambda grad: grad / 4)  # type: ignore[attr-defined]

    find_head(model)
    model.register_forward_hook(hooked)
    found = gradients(model, through_head(model))
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope / 4)


def test_no_grad() -> None:
    model = llama()
    with torch.no_grad():
        found = through_head(model)
        assert not found.requires_grad and torch.allclose(found, through_logits(model), atol=1e-5)


def test_outputs_that_are_cut_off_are_refused() -> None:
    with pytest.raises(HeadError, match="have no gradient"):
        through_head(processed(lambda x: x.detach()))


def test_a_treatment_that_was_changed_since_is_found() -> None:
    model = tiny("Gemma2ForCausalLM")
    through_head(model)
    model.config.final_logit_softcapping = 5.0
    with pytest.raises(HeadError, match="has changed since"):
        through_head(model)
    check_redirect(model)
    assert find_head(model).softcap == pytest.approx(5.0)


def test_the_head_is_as_before_whatever_happens() -> None:
    model = llama()
    head = find_head(model)
    expected = through_logits(model)

    def broken(hidden: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), redirected(head, broken):
        model(input_ids=IDS)
    with pytest.raises(HeadError, match="more than once"), redirected(head, logp(head)):
        model(input_ids=IDS)
        model(input_ids=IDS)
    with pytest.raises(HeadError, match="never called"), redirected(head, logp(head)) as redirect:
        redirect.stats(None)
    with (
        pytest.raises(HeadError, match=r"replaced by .*still open"),
        redirected(head, logp(head)),
        redirected(head, logp(head)),
    ):
        pass
    assert "forward" not in vars(head.module) and not head.module._forward_hooks
    assert torch.equal(through_logits(model), expected)


@pytest.mark.slow
def test_a_compiled_model() -> None:
    model = llama()
    compiled = torch.compile(model, backend="eager")
    expected = through_logits(compiled)
    torch.testing.assert_close(through_head(compiled), expected, rtol=0, atol=1e-5)
    assert torch.equal(through_logits(compiled), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch",
    ["multi", "multi find_unused_parameters", "zero3", pytest.param("multi static_graph", marks=pytest.mark.slow)],
)
def test_two_processes_have_the_gradients_of_one(launch: str, tmp_path: Path) -> None:
    config, *options = launch.split()
    for name in ("tied", "untied"):
        llama(tie_word_embeddings=name == "tied").save_pretrained(tmp_path / name)
    flags = ("--gradient_accumulation_steps", "2", "--gradient_clipping", "1e9") if config == "zero3" else ()
    output = accelerate_launch(config, "tests/scripts/redirected_head.py", str(tmp_path), *options, flags=flags)
    backwards = ("plain", "accelerator") if config == "zero3" else ("accelerator",)
    for name in ("tied", "untied"):
        for backward in backwards:
            assert f"passed {name} {backward}" in output
