"""The reference's scores of a rollout: taken once when TRL samples, kept with the micro-batches, and renewed after an
update of the reference."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from refkl.trl.base import TRLTrainer
from refkl.trl.scored_model import ScoredModel
from refkl.types import TokenBatch, TokenScores

_SEQUENCES = ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")
_TEXT = ("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size")
_ROW = "refkl_row"
"""A completion's index in its rollout before TRL shuffled it; completions of one prompt are neighbours there."""
_PER_BATCH = -1
"""In place of the number of updates: scores that depend on the other rows of a batch. Each loss scores its own."""
_FLAGS = ("compute_entropy", "compute_aux_loss")


class RolloutScoring(TRLTrainer):
    """A trainer whose rollouts include the reference's log-probabilities of the completions."""

    # Attributes of TRL's trainers:
    args: Any
    temperature: float
    reward_func_names: list[str]
    _buffered_inputs: Any
    _step: int

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Make TRL's rollouts, and score them with the reference."""
        rollout = self._with_reference(super()._generate_and_score_completions(inputs))  # type: ignore[misc]
        return rollout | {_ROW: torch.arange(len(rollout["prompt_ids"]))}

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Return TRL's rewards [N, functions] of the completions of all ranks, NaN where a function returned None.

        Raises:
            ValueError: while training, no completion has a reward, or one is infinite.
        """
        rewards = super()._calculate_rewards(  # type: ignore[misc]
            inputs, prompts, completions, completion_ids_list
        )
        if self.model.training:
            check_rewards(rewards, self.reward_func_names)
        return rewards

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Undo TRL's shuffling of a rollout within each optimizer step, so that completions of a prompt are together
        again."""
        known = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        found = self._buffered_inputs
        if not self.model.training or found is known or not found or self.scoring.prefix == "off":
            return inputs
        if any(_ROW not in part for part in found):
            return inputs  # a subclass makes its own rollouts
        if getattr(self, "loss_type", None) == "bnpo":
            return inputs  # the loss is a mean over each micro-batch's own tokens, so its rows must not change
        window = self.args.gradient_accumulation_steps
        if len(found) % window or any(x is not None for x in self._media(found[0]).values()):
            return inputs
        steps = [found[start : start + window] for start in range(0, len(found), window)]
        self._buffered_inputs = [part for step in steps for part in in_order(step)]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _with_reference(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """Return a rollout with the reference's scores.

        For an exact divergence the reference is scored with the policy at each loss, and here only if it scores in one
        sweep.
        """
        if not self._measures or (self._exact and not self.reference.one_sweep):
            return rollout
        training = self.model.training
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        return rollout | self._reference_scores(rollout, size)

    def _reference_scores(self, rollout: dict[str, Any], batch_size: int | None = None) -> dict[str, Tensor]:
        """Return the reference's log-probabilities [B, C] of the completions, under their names in a rollout.

        Also return [B] the number of updates of the reference and, for an exact divergence, [B, C, H] its hidden
        states.
        """
        input_ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        attention_mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
        keep = rollout["completion_ids"].shape[1]
        hidden: list[Tensor] = []

        def score(batch: TokenBatch) -> TokenScores:
            scores = self.reference.score(batch, temperature=self.temperature, hidden=self._exact)
            if scores.hidden is not None:
                hidden.append(scores.hidden[:, -keep:])
            return scores

        media = self._media(rollout)
        text = all(x is None for x in media.values())
        alone = TokenBatch(input_ids, attention_mask, completions(rollout))
        as_in_loss = text and self.reference.why_not_by_row(alone) is not None
        limited = text and self.reference.config.max_tokens is not None
        if (self.reference.one_sweep or limited) and not as_in_loss:
            batch_size = None  # the reference splits the rollout itself, by tokens
        stand_in = ScoredModel(score, prefix=self.scoring.prefix)
        with torch.no_grad(), self.reference.keep_active():
            logp, _, _ = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                stand_in, input_ids, attention_mask, keep, batch_size, **media
            )
        updates = _PER_BATCH if as_in_loss else self.reference.updates
        found = {"ref_per_token_logps": logp, "reference_updates": torch.full((len(logp),), updates)}
        return found | ({"reference_hidden": torch.cat(hidden)} if hidden else {})

    def _media(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """Return the model's inputs in a rollout that are not text: the parameters of TRL's scoring method name
        them."""
        names = inspect.signature(self.trl_trainer._get_per_token_logps_and_entropies).parameters
        return {name: rollout.get(name) for name in names if name not in (*_TEXT, *_FLAGS)}

    def _present(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a micro-batch with the reference's scores. They are renewed if the reference was updated, because TRL
        keeps rollouts over several steps."""
        if bool((inputs["reference_updates"] == self.reference.updates).all()):
            return inputs
        kept = self._buffered_inputs or []
        own = [part for part in kept if part["prompt_ids"] is inputs["prompt_ids"]]
        per_batch = bool((inputs["reference_updates"] == _PER_BATCH).any())
        media = any(x is not None for x in self._media(inputs).values())
        if per_batch or media or not own or not self.reference.one_sweep:
            scores = self._reference_scores(inputs)
            for part in own:
                part.update(scores)
            return {**inputs, **scores}
        scores = self._reference_scores({name: torch.cat([part[name] for part in kept]) for name in _SEQUENCES})
        start = 0
        for part in kept:
            rows = slice(start, start + len(part["prompt_ids"]))
            part.update({name: value[rows] for name, value in scores.items()})
            start = rows.stop
        return {**inputs, **{name: own[0][name] for name in scores}}


def check_rewards(rewards: Tensor, names: list[str]) -> None:
    """Raise ValueError if the rewards [N, functions] of a rollout cannot train: TRL would go on, on the KL only or to
    NaN weights.

    NaN is a function that does not apply to a completion. TRL leaves a completion without any reward out of its
    group's mean and gives it no advantage, so that one such completion does no harm.
    """
    if rewards.isnan().all():
        raise ValueError(
            f"None of the {len(rewards)} completions of this rollout has a reward: {', '.join(names)} returned None "
            "(or NaN) for each, so there is nothing to learn from. Return a number from at least one reward function, "
            "or leave prompts to which none applies out of the data."
        )
    if rewards.isinf().any():
        row, column = rewards.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"The reward function {names[column]} returned {rewards[row, column].item()} for completion {row} of this "
            "rollout, which would make the weights NaN. Return a finite number, or None if it does not apply."
        )


def completions(rollout: dict[str, Any]) -> Tensor:
    """Return the mask [B, T] of the completions' tokens."""
    return torch.cat([torch.zeros_like(rollout["prompt_mask"]), rollout["completion_mask"]], dim=1)


def in_order(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return an optimizer step's micro-batches with the rows in the order in which they were sampled."""
    size, order = len(parts[0][_ROW]), torch.cat([part[_ROW] for part in parts]).argsort()
    whole = {name: _ordered([part[name] for part in parts], order) for name in parts[0]}
    rows = [slice(start, start + size) for start in range(0, len(order), size)]
    return [{name: x[some] if _has_rows(x) else x for name, x in whole.items()} for some in rows]


def _ordered(values: list[Any], order: Tensor) -> Any:
    if not _has_rows(values[0]):
        return values[0]
    if isinstance(values[0], Tensor):
        return torch.cat(values)[order.to(values[0].device)]
    joined = [x for value in values for x in value]
    return [joined[row] for row in order.tolist()]


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
