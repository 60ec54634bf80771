"""Who is measured, and how each is called. A peer gets a case and its inputs, and gives back a loss to call
backward() on and the value to check: per-token losses [N] (0.0 where not scored), their sum, or None.

Imports are inside the functions: a peer that is not installed is listed as absent, and a process that measures the
memory of one peer loads no other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kernel_cases import DETACHED, ENTROPY, KL, LOGP, OPS, Case, Inputs, losses_from_logits, objective

IGNORED = -100


class Outcome(NamedTuple):
    loss: torch.Tensor
    value: torch.Tensor | None


@dataclass(frozen=True)
class Peer:
    name: str
    ops: tuple[str, ...]
    called: str
    """How: printed below the tables."""
    run: Callable[[Case, Inputs], Outcome]
    package: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    masked_only: bool = False
    """Differs from another peer only where some tokens are not scored."""
    compiled: bool = False
    """Uses torch.compile on every device."""

    def absent(self, device: str) -> str | None:
        """Why it cannot run here, if it cannot."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.package == "refkl" and find_spec("refkl.kl.linear") is None:
            return "this refkl has no fused heads"
        if self.name.startswith("torch") and "linear_cross_entropy" not in dir(F):
            return f"torch {torch.__version__} has no linear_cross_entropy"
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)} alone"
        return None

    def takes(self, case: Case) -> bool:
        return case.op in self.ops and (case.masked > 0 or not self.masked_only)

    @property
    def installed(self) -> str:
        name = {"liger_kernel": "liger-kernel"}.get(self.package, self.package)
        return f"{name} {version(name)}"


def _total(losses: torch.Tensor) -> Outcome:
    return Outcome(losses.sum(), losses.detach())


# --- refkl -------------------------------------------------------------------------------------------------------


def _refkl(case: Case, inputs: Inputs, token_loss: Callable | None = None) -> torch.Tensor | NamedTuple:
    from refkl.kl.linear import linear_divergence, linear_logp

    more = {"mask": None if inputs.all_scored else inputs.mask, "token_loss": token_loss}
    if case.op == KL:
        return linear_divergence(inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight, **more)
    entropy = {LOGP: False, ENTROPY: True, DETACHED: "detached"}[case.op]
    return linear_logp(inputs.hidden, inputs.weight, inputs.targets, entropy=entropy, **more)


def _refkl_scores(case: Case, inputs: Inputs) -> Outcome:
    scores = _refkl(case, inputs)
    return _total(scores if case.op == KL else objective(case.op, scores.logp, scores.entropy))


def _refkl_token_loss(case: Case, inputs: Inputs) -> Outcome:
    def token_loss(scores: NamedTuple) -> torch.Tensor:
        if case.op == KL:
            return scores.divergence
        return objective(case.op, scores.logp, None if case.op == LOGP else scores.entropy)

    return _total(_refkl(case, inputs, token_loss))


# --- plain torch -------------------------------------------------------------------------------------------------


def _logits_in_full(case: Case, inputs: Inputs, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    # Upcast before the softmax, as trainers do: in bf16 a softmax sums to 1.01.
    logits = F.linear(inputs.hidden[rows], inputs.weight).float()
    ref_logits = None
    if case.op == KL:
        with torch.no_grad():
            ref_logits = F.linear(inputs.ref_hidden[rows], inputs.ref_weight).float()
    return losses_from_logits(case.op, logits, inputs.targets[rows], ref_logits)


def _full(case: Case, inputs: Inputs) -> Outcome:
    losses = _logits_in_full(case, inputs)
    return _total(losses if inputs.all_scored else losses.masked_fill(~inputs.mask, 0.0))


def _full_compacted(case: Case, inputs: Inputs) -> Outcome:
    losses = _logits_in_full(case, inputs, inputs.mask)
    return _total(losses.new_zeros(inputs.mask.shape).masked_scatter(inputs.mask, losses))


def _torch_fused(reduction: str, chunked: bool) -> Callable[[Case, Inputs], Outcome]:
    def run(case: Case, inputs: Inputs) -> Outcome:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        targets = inputs.targets if inputs.all_scored else inputs.targets.masked_fill(~inputs.mask, IGNORED)
        losses = F.linear_cross_entropy(inputs.hidden, inputs.weight, targets, reduction=reduction, options=options)
        return Outcome(losses.sum(), losses.detach())

    return run


# --- TRL ---------------------------------------------------------------------------------------------------------


def _trl(case: Case, inputs: Inputs) -> Outcome:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    # TRL's trainers drop unscored tokens where Triton runs, and score all of them elsewhere.
    compact = _use_triton(inputs.hidden.device) and not inputs.all_scored
    rows = inputs.mask if compact else slice(None)
    hidden, ref_hidden = inputs.hidden[rows], inputs.ref_hidden[rows]
    if case.op == KL:
        # beta=1: the reverse KL(student ‖ teacher)
        losses, _ = ChunkedDivergenceFunction.apply(
            hidden, inputs.weight, None, ref_hidden, inputs.ref_weight, None, 1.0, 1.0, 1.0, None, 1.0, None
        )
    else:
        outputs = ("log_probs",) if case.op == LOGP else ("log_probs", "entropy")
        logp, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, inputs.weight, None, inputs.targets[rows], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        )
        losses = objective(case.op, logp, entropy)
    if compact:
        losses = losses.new_zeros(inputs.mask.shape).masked_scatter(inputs.mask, losses)
    elif not inputs.all_scored:
        losses = losses.masked_fill(~inputs.mask, 0.0)
    return _total(losses)


# --- Liger -------------------------------------------------------------------------------------------------------


def _can_compile(inputs: Inputs) -> bool:
    """torch.compile writes Triton on CUDA, and C++ on a CPU."""
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return inputs.hidden.is_cuda or any(name and shutil.which(name) for name in compilers)


def _liger_grpo(case: Case, inputs: Inputs) -> Outcome:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    n, h, _ = case.shape
    length = 1024 if n % 1024 == 0 else n
    batch = n // length
    # Compiled is Liger's default; what is compiled here is the loss of [B, T] alone. On a CPU it takes the same time.
    loss_function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=inputs.hidden.is_cuda)
    # With advantages of 1 and on-policy, the gradient of GRPO's loss is that of Σ -logp; its value is -(token count).
    loss, _ = loss_function(
        inputs.hidden.view(batch, length, h),
        inputs.weight,
        inputs.targets.view(batch, length),
        inputs.mask.view(batch, length).float(),
        torch.ones(batch, device=inputs.hidden.device),
        num_items_in_batch=1,
    )
    return Outcome(loss, None)


def _liger_jsd(case: Case, inputs: Inputs) -> Outcome:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = inputs.targets.masked_fill(~inputs.mask, IGNORED)
    # beta=1: the reverse KL(student ‖ teacher)
    loss_function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=_can_compile(inputs)
    )
    mean = loss_function(inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight.detach(), labels)
    loss = mean * inputs.mask.sum()
    return Outcome(loss, loss.detach())


def _liger_triton(case: Case, inputs: Inputs) -> Outcome:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    labels = inputs.targets.masked_fill(~inputs.mask, IGNORED)
    if case.op == KL:
        mean = LigerFusedLinearJSD(jsd_beta=1.0)(
            inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight.detach(), labels
        )
        loss = mean * inputs.mask.sum()
    else:
        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")(inputs.weight, inputs.hidden, labels)
    return Outcome(loss, loss.detach())


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("refkl", OPS, "linear_logp, linear_divergence; any loss on top", _refkl_scores, "refkl"),
        Peer(
            "refkl token_loss",
            OPS,
            "the same with token_loss=: the per-token loss is known to the kernel, gradients are formed in forward",
            _refkl_token_loss,
            "refkl",
        ),
        Peer("full logits", OPS, "F.linear, float32 log_softmax, gather or Σ p (log p - log q)", _full),
        Peer(
            "full logits, scored only",
            OPS,
            "the same on hidden[mask]",
            _full_compacted,
            masked_only=True,
        ),
        Peer("torch", (LOGP,), "F.linear_cross_entropy(reduction='none'), its defaults", _torch_fused("none", False)),
        Peer(
            "torch chunked",
            (LOGP,),
            "F.linear_cross_entropy(reduction='none', options=LinearCrossEntropyOptions()); any loss on top",
            _torch_fused("none", True),
        ),
        Peer(
            "torch chunked, sum",
            (LOGP,),
            "F.linear_cross_entropy(reduction='sum', options=LinearCrossEntropyOptions()): the sum of -logp alone",
            _torch_fused("sum", True),
        ),
        Peer(
            "TRL",
            OPS,
            "ChunkedLogProbFunction (outputs: log_probs, and entropy where asked for; its trainers always ask for "
            "both) and ChunkedDivergenceFunction (beta=1), chunk sizes and masking as its trainers have them",
            _trl,
            "trl",
        ),
        Peer(
            "Liger GRPO",
            (LOGP,),
            "LigerFusedLinearGRPOLoss(beta=0), advantages 1, sequences of 1024 tokens, one a chunk; its loss has no "
            "logp in its value: gradient checked alone; compiled on CUDA, not on CPU (no quicker there)",
            _liger_grpo,
            "liger_kernel",
        ),
        Peer(
            "Liger JSD",
            (KL,),
            "LigerFusedLinearJSDLoss(beta=1, hard loss off), the sum over tokens alone; compiled (1.7 times "
            "as fast on a CPU as not); forms the head's gradient even where the head is frozen",
            _liger_jsd,
            "liger_kernel",
            compiled=True,
        ),
        Peer(
            "Liger Triton",
            (LOGP, KL),
            "LigerFusedLinearCrossEntropyLoss(reduction='sum'), LigerFusedLinearJSD(jsd_beta=1): the sum alone",
            _liger_triton,
            "liger_kernel",
            devices=("cuda",),
        ),
    )
}
