"""The tensors that flow between the parts of refkl, with their shapes, units and mask polarity.

Notation: B sequences, T tokens each (padding included), H hidden width. Log-probabilities are in nats. A mask is True
(or 1) where a token counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor


def require_shape(name: str, tensor: Tensor, shape: torch.Size, like: str) -> None:
    """Raise ValueError unless `tensor` has `shape`, the shape of the tensor called `like`."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} but {like} has shape {list(shape)}; they must be the same."
        )


_PASSED_BY_REFKL = {"input_ids", "attention_mask", "position_ids", "labels", "use_cache", "logits_to_keep"}


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Token sequences, and a mask of the tokens that are scored.

    Raises ValueError if the tensors do not share one shape [B, T] with at least one element, if a mask holds anything
    but 0 and 1 (or False and True), or if a scored token is padding.
    """

    input_ids: Tensor
    """[B, T] integer token ids."""
    attention_mask: Tensor
    """[B, T], 1 or True = a real token, 0 or False = padding; no other values. Padding may be on either side."""
    completion_mask: Tensor
    """[B, T], True = scored token; stored as bool.

    A sequence's first token has nothing before it that could predict it, so it is never scored: it becomes False here.
    Code that counts tokens should count this mask.
    """
    position_ids: Tensor | None = None
    """[B, T] or None: positions are then counted from the attention mask, for models that take them."""
    model_inputs: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments for the model's forward, passed on untouched (pixel_values, …)."""
    prefix: Literal["auto", "off"] = "auto"
    """Prefix sharing and padding, the same for policy and reference because the batch carries it.

    "auto": compute a prompt that several rows share once, and skip padding, where that is exact and costs less. "off":
    give the model the batch as it is.
    """

    def __post_init__(self) -> None:
        if self.input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, T], got shape {list(self.input_ids.shape)}.")
        if self.input_ids.is_floating_point() or self.input_ids.dtype == torch.bool:
            raise ValueError(f"input_ids must hold integer token ids, got dtype {self.input_ids.dtype}.")
        if not self.input_ids.numel():
            raise ValueError(
                f"input_ids has shape {list(self.input_ids.shape)}, so the batch holds no token and there is nothing "
                "to score. Leave this batch out; with sharded weights, give every rank at least one row (its "
                "completion_mask may be all False)."
            )
        if self.prefix not in ("auto", "off"):
            raise ValueError(f"Unknown prefix {self.prefix!r}. Known: auto, off.")
        require_shape("attention_mask", self.attention_mask, self.input_ids.shape, "input_ids")
        require_shape("completion_mask", self.completion_mask, self.input_ids.shape, "input_ids")
        if self.position_ids is not None:
            require_shape("position_ids", self.position_ids, self.input_ids.shape, "input_ids")
        if clash := _PASSED_BY_REFKL & set(self.model_inputs):
            raise ValueError(f"model_inputs may not hold {sorted(clash)}: refkl passes these to the model itself.")

        real, scored = self.attention_mask.bool(), self.completion_mask.bool()
        wrong = scored & ~real
        for mask, flags in ((self.attention_mask, real), (self.completion_mask, scored)):
            if mask.dtype != torch.bool:
                wrong = wrong | (mask != flags)
        if bool(wrong.any()):  # one wait for the device, for all three checks
            self._explain(real, scored)
        follows_real = torch.zeros_like(real)
        follows_real[:, 1:] = real[:, :-1]
        object.__setattr__(self, "completion_mask", scored & follows_real)

    def _explain(self, real: Tensor, scored: Tensor) -> NoReturn:
        """Raise the ValueError for a mask with other values than 0 and 1, or for a scored token that is padding."""
        for name, mask, flags in (
            ("attention_mask", self.attention_mask, real),
            ("completion_mask", self.completion_mask, scored),
        ):
            if (places := (mask != flags).nonzero()).numel():
                row, column = places[0].tolist()
                raise ValueError(
                    f"{name} must hold 0 and 1 (or False and True), but row {row}, column {column} is "
                    f"{mask[row, column].item()}. If the values number sequences that are packed into one row, give "
                    "each sequence its own row; if they are weights of tokens, pass (mask > 0) and multiply the loss."
                )
        row, column = (scored & ~real).nonzero()[0].tolist()
        raise ValueError(
            f"completion_mask scores padding: row {row}, column {column} has attention_mask 0. "
            "Pass completion_mask & attention_mask if padding was meant to be left out."
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return the same batch with its tensors on `device`; the batch itself if they are there already."""
        if self.input_ids.device == torch.device(device):
            return self
        extra = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.model_inputs.items()}
        position_ids = None if self.position_ids is None else self.position_ids.to(device)
        masks = self.attention_mask.to(device), self.completion_mask.to(device)
        return TokenBatch(self.input_ids.to(device), *masks, position_ids, extra, self.prefix)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One model's scores of the tokens of a batch."""

    logp: Tensor
    """[B, T] fp32 (fp64 for an fp64 model), nats: log p(input_ids[b, t] | input_ids[b, :t]); 0.0 where not scored."""
    entropy: Tensor | None = None
    """[B, T], nats: entropy of the distribution that predicts token t; 0.0 where not scored."""
    hidden: Tensor | None = None
    """[B, T, H]: the output head's input that predicts token t; 0.0 where not scored."""
    temperature: float = 1.0
    """The divisor of the logits."""
    fingerprint: str | None = None
    """Fingerprint of the reference that gave these scores; None for a policy. KLPenalty uses it to refuse scores that
    are mixed up or stale."""

    def to(self, device: torch.device | str) -> TokenScores:
        """Return the same scores with their tensors on `device`."""
        moved = (None if t is None else t.to(device) for t in (self.logp, self.entropy, self.hidden))
        logp, entropy, hidden = moved
        assert logp is not None
        return replace(self, logp=logp, entropy=entropy, hidden=hidden)


@dataclass(frozen=True, eq=False)
class PairScores:
    """Scores of policy and reference on the same tokens."""

    policy: TokenScores
    """The policy's scores, with grad."""
    reference: TokenScores
    """The reference's scores, without grad."""
    divergence: Tensor | None = None
    """[B, T], nats: exact divergence per scored token, with grad to the policy; 0.0 where not scored."""


@dataclass(frozen=True, eq=False)
class KLOutput:
    """A penalty: a scalar to add to the loss or a reward, the KL per token, and metrics."""

    loss: Tensor | None
    """Scalar, with grad to the policy: coef times the aggregated KL; None when the penalty is in the reward."""
    reward: Tensor | None
    """[B, T], detached: -coef times the KL, to add to the rewards; None when the penalty is in the loss."""
    per_token: Tensor
    """[B, T], nats: the KL estimate of each token; 0.0 where the mask is False."""
    metrics: dict[str, float]
    """Metrics over this call's tokens on this rank; `KLPenalty.step` returns them over all ranks."""


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that a reference adds on this rank, counted over unique storages that the policy does not hold."""

    device: int
    """Bytes on the device that models run on."""
    host: int
    """Bytes in host memory."""

    @property
    def total(self) -> int:
        """Bytes on device and host together."""
        return self.device + self.host


@dataclass(frozen=True)
class KLFloor:
    """Shift of a reference by quantisation: exact KL(full precision ‖ quantised) over the scored tokens, in nats.

    It is measured at temperature 1, over the tokens of all ranks. A KL to the reference that is below the mean says
    nothing about the policy.
    """

    mean: float
    """Nats per token."""
    max: float
    """The largest KL of a token, in nats."""
    tokens: int
    """The number of tokens measured."""
