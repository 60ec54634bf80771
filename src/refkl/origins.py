"""Check of the model that scored each side of a penalty: swapped, mixed and stale scores are refused.

`Reference.score` adds the reference's fingerprint to its scores. After an update, until the fingerprint is computed
again, it adds the last fingerprint and the number of updates since. Scores of a policy have no fingerprint, and scores
that a caller made are accepted as they are.
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
"""Number of characters of a fingerprint that a message shows."""


class ScoreOrigins:
    """The fingerprints that one penalty has seen, for each position in its list of references.

    Args:
        references: the references that the scores are of, in their order; empty if they are not known.
    """

    def __init__(self, references: Sequence[Reference] = ()) -> None:
        self.references = tuple(references)
        self._in_step: dict[int, str] = {}
        """Fingerprint in the open optimizer step, by position."""
        self._latest: dict[int, str] = {}
        """Fingerprint that was seen last, in any step, by position."""
        self._replaced: dict[int, set[str]] = {}
        """Fingerprints that a later one has replaced, by position."""

    def check(self, references: Sequence[TokenScores], *, counted: bool) -> None:
        """Raise ValueError for scores of mixed references, or of a reference as it was before an update.

        Args:
            references: one for each position.
            counted: True if the optimizer step counts them. Scores that are not counted may be of any reference, as in
                an evaluation, except at a position whose reference is known.
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
        """Forget all scores, as a resumed run does."""
        self._in_step, self._latest, self._replaced = {}, {}, {}

    def _check_order(self, place: int, references: Sequence[TokenScores]) -> None:
        found, expected = references[place].fingerprint, self._latest.get(place)
        for other, scores in enumerate(references):
            if found != expected and found == self._latest.get(other) and scores.fingerprint == expected is not None:
                raise ValueError(
                    f"ref_scores {place} and {other} have changed places since the last call (fingerprints "
                    f"{_short(found)} and {_short(expected)}), so each would get the weight of the other. Pass the "
                    "references in the same order in each call."
                )

    def _check_step(self, place: int, found: str) -> None:
        if (expected := self._in_step.get(place, found)) != found:
            raise ValueError(
                f"One optimizer step mixes two references: ref_scores{self._at(place)} have fingerprint "
                f"{_short(found)}, and {_short(expected)} in an earlier call of this step. Score all micro-batches of "
                "a step with one reference, update it only after the step, and call penalty.step() once per step. For "
                "scores that are only measured, pass count=False; for a second reference, pass a list of scores or use "
                "a second KLPenalty."
            )

    def _check_stale(self, place: int, found: str) -> None:
        if found in self._replaced.get(place, ()):
            raise ValueError(
                f"ref_scores{self._at(place)} are stale: they have fingerprint {_short(found)}, and the reference has "
                f"had {_short(self._latest[place])} in a later step, after an update. Score the batch again, or use "
                "one KLPenalty per reference."
            )

    def _at(self, place: int) -> str:
        return f" {place}" if place or len(self._latest) > 1 else ""


def check_sides(
    policy: TokenScores, references: Sequence[TokenScores], *, in_loss: bool, measured_only: bool = False
) -> None:
    """Raise ValueError unless one side can be the policy's and the other its references'.

    Args:
        policy: the scores that were passed as the policy's.
        references: the scores that were passed as the references'.
        in_loss: True if the penalty goes into the loss, so that the policy's scores should carry grad.
        measured_only: True if the call penalises nothing.
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
        # In the reward, scores of the policy may have no grad, so only the two sides together show a swap.
        turned = scores.logp.requires_grad and not policy.logp.requires_grad
        if turned or (stamp is not None and scores.fingerprint is None):
            what = "ref_scores carry grad" if turned else f"policy_scores carry the fingerprint {_short(stamp)}"
            raise ValueError(
                f"policy_scores and ref_scores seem to be swapped: {what}, and the other side does not. Call "
                "penalty(policy_scores, ref_scores, mask)."
            )
    if stamp is not None and in_loss and not measured_only and torch.is_grad_enabled():
        raise ValueError(
            f"policy_scores are of a reference (fingerprint {_short(stamp)}) and carry no grad, so this penalty would "
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
            f"{is_now}. Score the batch with the reference that KLPenalty was made with."
        )
    last = reference.last_update
    how = "" if last is None else f" with alpha {last.alpha:g}"
    raise ValueError(
        f"ref_scores are stale: they have fingerprint {_short(found)}, and the reference has been moved by update "
        f"{updates}{how} and {is_now}. Score the batch again after an update."
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return True for two tensors that read the same numbers from the same memory."""
    if one is other:
        return True
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and one.numel() > 0 and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def _short(fingerprint: str | None) -> str:
    return str(fingerprint)[:_SHOWN]
