"""On a GPU: fused heads give the numbers of fp64 on the CPU, from the very inputs that the GPU got; an offloaded
reference takes the memory of two units, and a quantised one gives the scores that it gives on a CPU."""

import copy
import math

import pytest
import torch
from support.models import batch, llama, shared_batch
from transformers.utils import is_flash_attn_2_available

from refkl import ReferenceConfig, build_reference, kl, score_pair, score_tokens
from refkl.reference.streamed.units import largest_pair, unit_bytes
from refkl.scoring import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, H, V = 70, 256, 5003


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    hidden = torch.randn(N, H).to(dtype)
    return {
        "hidden": hidden,
        "ref_hidden": (hidden + 0.05 * torch.randn(N, H)).to(dtype),
        "weight": (2 * torch.randn(V, H) / H**0.5).to(dtype),
        "targets": torch.randint(V, (N,)),
    }


def scores(x: dict[str, torch.Tensor], trained: bool, **options: object) -> list[torch.Tensor]:
    """Values and gradients."""
    hidden, weight = x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_(trained)
    found = kl.linear_logp(hidden, weight, x["targets"], entropy=True, **options)
    exact = kl.linear_divergence(hidden, weight, x["ref_hidden"], x["weight"], **options)
    (found.logp.sum() + 0.3 * found.entropy.sum() + exact.sum()).backward()
    return [found.logp, found.entropy, exact, hidden.grad, *([weight.grad] if trained else [])]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_numbers_of_fp64(dtype: torch.dtype, trained: bool, temperature: float) -> None:
    x = inputs(dtype)
    expected = scores(
        {k: v.double() if v.is_floating_point() else v for k, v in x.items()}, trained, temperature=temperature
    )
    found = scores({k: v.cuda() for k, v in x.items()}, trained, temperature=temperature)
    for value, wanted in zip(found[:3], expected[:3], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.cpu().double(), wanted, rtol=2e-3, atol=2e-5)
    for gradient, wanted in zip(found[3:], expected[3:], strict=True):
        error = (gradient.cpu().double() - wanted).abs().max() / wanted.abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 1e-2)


def test_autocast_rounds_the_operands_and_not_the_sums() -> None:
    x = inputs(torch.float32)
    rounded = {k: v.bfloat16().double() if v.is_floating_point() else v for k, v in x.items()}
    expected = scores(rounded, False)
    with torch.autocast("cuda", torch.bfloat16):
        found = scores({k: v.cuda() for k, v in x.items()}, False)
    torch.testing.assert_close(found[0].cpu().double(), expected[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_step_zero_is_zero(trained: bool) -> None:
    x = {k: v.cuda() for k, v in inputs(torch.bfloat16).items()}
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_(trained)
    value = kl.linear_divergence(hidden, weight, x["hidden"].detach(), x["weight"].detach().clone())
    value.sum().backward()
    assert torch.equal(value, torch.zeros_like(value)) and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_an_offloaded_reference_takes_two_units_of_device_memory() -> None:
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    policy = llama(**size).bfloat16().cuda()
    tokens = batch().to("cuda")
    plain = build_reference(policy, "clone")
    right = plain.score(tokens, entropy=True)
    exact = score_pair(policy, plain, tokens, divergence="reverse_kl").divergence
    del plain
    before = torch.cuda.memory_allocated()
    reference = build_reference(policy, ReferenceConfig(strategy="clone", offload=True))
    reference.score(tokens)  # finds the head
    torch.cuda.synchronize()
    weights = [*reference.model.parameters()]
    assert all(p.device.type == "cpu" and p.is_pinned() for p in weights)
    assert reference.memory().host == sum(p.numel() * p.element_size() for p in weights)
    units, rest = unit_bytes(policy, dtype=None, without=set())
    layer = max(units)
    assert torch.cuda.memory_allocated() - before < layer / 2 and rest == 0
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        found = reference.score(tokens, entropy=True)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - start
        assert largest_pair(units) <= peak < largest_pair(units) + layer / 2
        assert torch.equal(found.logp, right.logp) and torch.equal(found.entropy, right.entropy)
    assert torch.equal(score_pair(policy, reference, tokens, divergence="reverse_kl").divergence, exact)
    reference.update(policy, alpha=1.0)
    assert torch.equal(reference.score(tokens).logp, right.logp)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_quantised_reference_scores_as_on_the_cpu(kind: str) -> None:
    """Built beside a policy on the GPU, and built on the CPU and moved: the same numbers, floor and bytes."""
    config = ReferenceConfig(strategy="clone", quantize=kind, max_kl_floor=math.inf)
    policy = llama()
    host = build_reference(policy, config, calibration=batch())
    expected, held = host.score(batch()).logp, host.memory().total
    there = copy.deepcopy(policy).cuda()
    built = build_reference(there, config)
    policy.cuda()
    for reference in (built, host):
        torch.testing.assert_close(reference.score(batch().to("cuda")).logp.cpu(), expected, rtol=0, atol=1e-3)
        assert reference.memory().device == held and reference.memory().host == 0
    assert built.kl_floor is not None and host.kl_floor is not None
    assert built.kl_floor.mean == pytest.approx(host.kl_floor.mean, rel=1e-2)


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        ("sdpa", torch.float32),
        ("sdpa", torch.bfloat16),
        ("flex_attention", torch.bfloat16),
        ("flash_attention_2", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("left", [True, False])
def test_prompts_that_are_shared_give_the_scores_of_the_batch_as_it_is(
    attention: str, dtype: torch.dtype, left: bool
) -> None:
    """In one row, by torch's own choice of attention kernels: values and gradients of the padded batch, in fp32."""
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    right = llama().cuda()
    model = copy.deepcopy(right).to(dtype)
    model.set_attn_implementation(attention)
    found = {}
    for name, scored, prefix in (("plain", right, "off"), ("one row", model, "auto"), ("rounded", model, "off")):
        tokens = shared_batch(left=left, prefix=prefix).to("cuda")
        assert (prepare(scored, tokens).packed is not None) == (prefix == "auto")
        scored.zero_grad()
        logp = score_tokens(scored, tokens).logp
        logp.sum().backward()
        gradient = torch.cat([p.grad.flatten().float() for p in scored.parameters()])
        found[name] = logp.detach().float(), gradient
    for value, plain, rounded in zip(found["one row"], found["plain"], found["rounded"], strict=True):
        error = (value - plain).abs().max()
        if dtype == torch.float32:
            assert error <= 1e-4 * max(1.0, float(plain.abs().max()))
        else:  # no further from it than the batch as it is
            assert error <= 1.5 * (rounded - plain).abs().max() + 1e-3
