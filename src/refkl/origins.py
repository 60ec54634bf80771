"""Which model each side of a penalty was scored by: refuses swapped, mixed and stale scores.

`Reference.score` stamps scores with the reference's fingerprint; after an update, until that is taken again, with the
last one and the number of updates since. Scores of a policy have none, and scores made by hand are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refkl.types import TokenScores

if TYPE_CHECKING:
    from refkl.reference import Reference

_SHOWN = 12
"""Characters of a fingerprint that a message shows."""


class ScoreOrigins:
    """The fingerprints that one penalty has seen, for each position in its list of references.

    Args:
        references: the references that the scores are of, in their order; empty if they are not known.
    """

    def __init__(self, references: Sequence[Reference] = ()) -> None:
        self.references = tuple(references)
        self._in_step: dict[int, str] = {}
        """By position: the fingerprint in the open optimizer step."""
        self._latest: dict[int, str] = {}
        """By position: the fingerprint that was seen last, in any step."""
        self._replaced: dict[int, set[str]] = {}
        """By position: the fingerprints that another one has followed."""

    def check(self, references: Sequence[TokenScores], *, counted: bool) -> None:
        """Raise ValueError for scores of mixed references, or of a reference as it was before an update.

        Args:
            references: one for each position.
            counted: whether the optimizer step counts them. Otherwise they may be of any reference, as in an
                evaluation, but for a position whose reference is known.
        """
        if self.references and len(references) != len(self.references):
            raise ValueError(
                f"This KLPenalty was made for {len(self.references)} references and got the scores of "
                f"{len(references)}. Pass one TokenScores per reference, in the same order."
            )
        for place, scores in enumerate(references):
            if scores.fingerprint is None:
                continue
            known = self.references[place] if self.references else None
            if known is not None:
                _check_present(known, scores.fingerprint)
            if counted:
                self._check_order(place, references)
                self._check_step(place, scores.fingerprint)
                if known is None:
                    self._check_stale(place, scores.fingerprint)

    def note(self, references: Sequence[TokenScores]) -> None:
        """Remember scores that the open optimizer step counts."""
        for place, scores in enumerate(references):
            if (found := scores.fingerprint) is None:
                continue
            replaced = self._replaced.setdefault(place, set())
            if self._latest.get(place, found) != found:
                replaced.add(self._latest[place])
            replaced.discard(found)
            self._latest[place] = self._in_step[place] = found

    def close_step(self) -> None:
        """End the optimizer step: the references may be updated now."""
        self._in_step.clear()

    def forget(self) -> None:
        """Start anew, as a run that is resumed does."""
        self._in_step, self._latest, self._replaced = {}, {}, {}

    def _check_order(self, place: int, references: Sequence[TokenScores]) -> None:
        found, expected = references[place].fingerprint, self._latest.get(place)
        for other, scores in enumerate(references):
            if found != expected and found == self._latest.get(other) and scores.fingerprint == expected is not None:
                raise ValueError(
                    f"ref_scores {place} and {other} have changed places since the last call (fingerprints "
                    f"{_short(found)} and {_short(expected)}), so each would get the other's weight. Pass references "
                    "in the same order in each call."
                )

    def _check_step(self, place: int, found: str) -> None:
        if (expected := self._in_step.get(place, found)) != found:
            raise ValueError(
                f"One optimizer step mixes two references: ref_scores{self._at(place)} have fingerprint "
                f"{_short(found)}, and {_short(expected)} in an earlier call of this step. Score all micro-batches of "
                "a step by one reference, update it only after the step, and call penalty.step() once per step. Scores "
                "that are only measured take count=False; a second reference takes a list, or a KLPenalty of its own."
            )

    def _check_stale(self, place: int, found: str) -> None:
        if found in self._replaced.get(place, ()):
            raise ValueError(
                f"ref_scores{self._at(place)} are stale: they have fingerprint {_short(found)}, and the reference has "
                f"had {_short(self._latest[place])} in a later step, after an update. Score the batch again, or give "
                "each reference a KLPenalty of its own."
            )

    def _at(self, place: int) -> str:
        return f" {place}" if place or len(self._latest) > 1 else ""


def check_sides(
    policy: TokenScores, references: Sequence[TokenScores], *, in_loss: bool, measured_only: bool = False
) -> None:
    """Raise ValueError unless one side can be the policy's and the other its references'.

    Args:
        policy: given as the policy's scores.
        references: given as the references'.
        in_loss: the penalty goes into the loss, so that the policy's scores should carry grad.
        measured_only: the call penalises nothing.
    """
    stamp = policy.fingerprint
    for scores in references:
        if scores is policy or _is_same(scores.logp, policy.logp):
            raise ValueError(
                "ref_scores are the policy's own: both sides are the same tensor, so the KL would be 0 whatever the "
                "policy does. Pass reference.score(batch), or score_pair(...).reference."
            )
        if stamp is not None and scores.fingerprint == stamp:
            raise ValueError(
                f"policy_scores and ref_scores are of one reference, {_short(stamp)}, so this is not a KL of the "
                "policy. Pass score_tokens(policy, batch), or score_pair(...).policy, first."
            )
        # Without grad, scores of a policy that sampled are well known in the reward: only the pair tells.
        turned = scores.logp.requires_grad and not policy.logp.requires_grad
        if turned or (stamp is not None and scores.fingerprint is None):
            what = "ref_scores carry grad" if turned else f"policy_scores carry the fingerprint {_short(stamp)}"
            raise ValueError(
                f"policy_scores and ref_scores seem to be swapped: {what}, and the other side does not. Call "
                "penalty(policy_scores, ref_scores, mask)."
            )
    if stamp is not None and in_loss and not measured_only and torch.is_grad_enabled():
        raise ValueError(
            f"policy_scores are a reference's (fingerprint {_short(stamp)}) and carry no grad, so this penalty would "
            "train nothing. Pass score_tokens(policy, batch), or score_pair(...).policy; to measure the KL between two "
            "references, pass count=False."
        )


def _check_present(reference: Reference, found: str) -> None:
    """Raise ValueError unless scores with this fingerprint are of the reference as it is now."""
    now, updates = reference.scored_as, reference.updates
    if found == now:
        return
    is_now = "has not been fingerprinted since" if "+" in now else f"has {_short(now)} now"
    if not updates:
        raise ValueError(
            f"ref_scores are of another reference: they have fingerprint {_short(found)}, and this penalty's reference "
            f"{is_now}. Score the batch by the reference that KLPenalty was made with."
        )
    last = reference.last_update
    how = "" if last is None else f" with alpha {last.alpha:g}"
    raise ValueError(
        f"ref_scores are stale: they have fingerprint {_short(found)}, and the reference has been moved by update "
        f"{updates}{how} and {is_now}. Score the batch again after an update."
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """True for two tensors that read the same numbers of the same memory."""
    if one is other:
        return True
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and one.numel() > 0 and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def _short(fingerprint: str | None) -> str:
    return str(fingerprint)[:_SHOWN]
