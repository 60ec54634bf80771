"""What is measured: one case, its inputs, and the numbers every kernel must reproduce.

N tokens, H hidden size, V vocabulary; u = 2·N·V·H flops, one product of hidden states and head. All kernels minimise
the same loss, Σ over scored tokens of one of

    logp                    -log p(target)
    logp_entropy            -log p(target) - ENTROPY_WEIGHT · entropy
    logp_entropy_detached   the same, no gradient through the entropy: a metric, as GRPO's trainers log it
    reverse_kl              KL(policy ‖ reference), exact, over the whole vocabulary

and are compared with the same loss in float64, from the very inputs that they got (so bf16 inputs are no error).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

LOGP, ENTROPY, DETACHED, KL = OPS = ("logp", "logp_entropy", "logp_entropy_detached", "reverse_kl")
HEADS = ("frozen", "trained")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Large enough that a wrong entropy gradient shows in the error column.
ENTROPY_WEIGHT = 0.5
# Beyond these a row is marked OFF. In fp32 that is a bug; in bf16 it can be rounding alone: logits kept in bf16 (a
# logit of 10 is rounded by up to 0.03), or a sum over tokens handed back in bf16.
BOUNDS = {"fp32": {"value": 1e-3, "gradient": 1e-3}, "bf16": {"value": 0.15, "gradient": 0.05}}

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    op: str
    head: str
    dtype: str
    masked: int
    """Percent of the tokens that are not scored (prompts, padding)."""
    shape: Shape
    device: str
    seed: int

    @property
    def title(self) -> str:
        n, h, v = self.shape
        masked = f", {self.masked} % masked" if self.masked else ""
        return f"{self.op}, {self.head} head, {self.dtype}{masked}, N={n} H={h} V={v}, {self.device}"

    @property
    def gradient_bytes(self) -> int:
        """What the gradients themselves take: the part of the extra memory that no kernel can do without."""
        n, h, v = self.shape
        return DTYPES[self.dtype].itemsize * h * (n + (v if self.head == "trained" else 0))


@dataclass
class Inputs:
    hidden: torch.Tensor
    """[N, H], requires grad."""
    weight: torch.Tensor
    """[V, H], requires grad where the head is trained."""
    targets: torch.Tensor
    """[N] int64."""
    mask: torch.Tensor
    """[N] bool, True = scored."""
    ref_hidden: torch.Tensor
    """[N, H]; the reference's hidden states, near the policy's."""
    ref_weight: torch.Tensor
    """[V, H]; the policy's own head where that is frozen, as with LoRA."""

    @cached_property
    def all_scored(self) -> bool:
        # Read once, before anything is timed: on CUDA it waits for the device.
        return bool(self.mask.all())

    def clear_gradients(self) -> None:
        self.hidden.grad = None
        self.weight.grad = None


def make_inputs(case: Case) -> Inputs:
    n, h, v = case.shape
    dtype = DTYPES[case.dtype]
    generator = torch.Generator(case.device).manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=case.device).mul_(scale).to(dtype)

    trained = case.head == "trained"
    # Logits of standard deviation 2: a spread that trained models have, with a few tokens that hold most of the mass.
    weight = normal(v, h, scale=2 / h**0.5)
    hidden = normal(n, h)
    mask = torch.ones(n, dtype=torch.bool, device=case.device)
    # Scattered, as packed prompts and padding are; the count is exact, so that every seed does the same work.
    unscored = torch.randperm(n, generator=generator, device=case.device)[: n * case.masked // 100]
    mask[unscored] = False
    inputs = Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(trained),
        targets=torch.randint(v, (n,), generator=generator, device=case.device),
        mask=mask,
        ref_hidden=hidden.detach() + normal(n, h, scale=0.1),
        ref_weight=weight.detach() + normal(v, h, scale=0.1 / h**0.5) if trained else weight,
    )
    assert inputs.all_scored == (case.masked == 0 or n * case.masked < 100)
    return inputs


@dataclass(frozen=True)
class Truth:
    """The float64 numbers. losses [N], 0.0 where not scored; gradients of their sum."""

    losses: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor | None


def objective(op: str, logp: torch.Tensor, entropy: torch.Tensor | None) -> torch.Tensor:
    """Per-token losses from per-token scores: what every peer that returns scores puts on top of them."""
    if entropy is None:
        return -logp
    return -logp - ENTROPY_WEIGHT * (entropy.detach() if op == DETACHED else entropy)


def losses_from_logits(op: str, logits: torch.Tensor, targets: torch.Tensor, ref_logits: torch.Tensor | None):
    """[n, V] -> [n]: the definition of each op, used in float64 for the truth and in float32 by the plain peer."""
    log_p = logits.log_softmax(-1)
    if op == KL:
        return (log_p.exp() * (log_p - ref_logits.log_softmax(-1))).sum(-1)
    logp = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if op == LOGP:
        return objective(op, logp, None)
    with torch.set_grad_enabled(op == ENTROPY):
        entropy = -(log_p.exp() * log_p).sum(-1)
    return objective(op, logp, entropy)


def float64_truth(case: Case, inputs: Inputs, rows: int = 256) -> Truth:
    """By chunks of `rows` tokens, so that float64 logits of a large vocabulary fit."""
    weight = inputs.weight.detach().double().requires_grad_(case.head == "trained")
    ref_weight = inputs.ref_weight.detach().double() if case.op == KL else None
    losses, gradients = [], []
    for start in range(0, case.shape[0], rows):
        part = slice(start, start + rows)
        hidden = inputs.hidden.detach()[part].double().requires_grad_()
        ref_logits = None if ref_weight is None else inputs.ref_hidden[part].double() @ ref_weight.T
        loss = losses_from_logits(case.op, hidden @ weight.T, inputs.targets[part], ref_logits) * inputs.mask[part]
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(hidden.grad)
    return Truth(torch.cat(losses), torch.cat(gradients), weight.grad)


@dataclass(frozen=True)
class Errors:
    """value: nats, the largest over tokens (over the mean, where a kernel gives the sum alone); None where it gives no
    value of the loss at all. Gradients: the largest difference over the largest entry; None where there is none."""

    value: float | None
    hidden: float | None
    weight: float | None

    def off(self, dtype: str) -> bool:
        bounds = BOUNDS[dtype]
        pairs = ((self.value, "value"), (self.hidden, "gradient"), (self.weight, "gradient"))
        # `not <=` rather than `>`: NaN must count as off.
        return any(error is not None and not error <= bounds[kind] for error, kind in pairs)


def compare(truth: Truth, inputs: Inputs, value: torch.Tensor | None) -> Errors:
    """`value`: per-token losses [N], or their sum, or None. Gradients are read off the inputs."""

    def relative(gradient: torch.Tensor | None, true: torch.Tensor | None) -> float | None:
        if true is None:
            return None
        if gradient is None:
            return float("nan")
        return ((gradient.double() - true).abs().max() / true.abs().max()).item()

    error = None
    if value is not None and value.ndim == 1:
        error = (value.double() - truth.losses).abs().max().item()
    elif value is not None:
        error = ((value.double() - truth.losses.sum()).abs() / inputs.mask.sum()).item()
    return Errors(error, relative(inputs.hidden.grad, truth.hidden), relative(inputs.weight.grad, truth.weight))
