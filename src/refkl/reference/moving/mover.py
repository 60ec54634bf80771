"""Moves of a reference in this process, and the tensors that are kept for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from refkl.backend import Weight
from refkl.reference.moving.average import Averages, Move, Probe, same_bits
from refkl.reference.moving.lora_update import LastUpdate, planned
from refkl.reference.weights.finite import first_not_finite
from refkl.reference.weights.pairing import Pair

if TYPE_CHECKING:
    from refkl.reference.held import HeldReference


class Mover:
    """Moves a reference's weights towards the policy's, and can restore their state before the first move."""

    def __init__(self, held: HeldReference, *, on_host: bool) -> None:
        self.averages = Averages(on_host=on_host)
        """The averages that are kept beside the weights."""
        self.initial_fingerprint: str | None = None
        """The fingerprint before the first move, if that state was kept."""
        self.half_moved = False
        """True while weights are written, and after an error during that."""
        self._held = held
        self._showing_initial = False

    def check(self, policy: nn.Module, step: Move) -> None:
        """Raise ValueError if this move cannot be made. Changes nothing."""
        planned(step, self._held.pairs(policy), self._held.lora_layers())

    def check_whole(self) -> None:
        """Raise ValueError if an error ended the last move half-way."""
        if self.half_moved:
            raise ValueError(
                "An error ended the reference's last update half-way: some of its weights were moved and some were "
                "not. Load it from a checkpoint (reference.load), copy the policy (alpha 1), or build it again."
            )

    def check_closed(self, what: str) -> None:
        """Raise ValueError while `initial` is open."""
        if self._showing_initial:
            raise ValueError(
                f"reference.first() is open, so the reference is in its state before the first move and cannot {what}. "
                "Leave that context first."
            )

    def update(self, policy: nn.Module, step: Move) -> LastUpdate:
        """Make a move whose arguments were checked."""
        held = self._held
        held.follow_policy()
        self.averages.follow(held.weights())
        with torch.no_grad():
            plan = planned(step, held.pairs(policy), held.lora_layers())
            _check_values([*plan.pairs, *(pair for layer in plan.replaced for pair in (layer.a, layer.b))], step)
            new, distance = plan.new(self.averages), plan.distance(self.averages)
            self.averages.prepare(plan.pairs, step)
            held.before_writing()
            self.half_moved = True
            if new.weights:
                held.replace_weights(new.weights)
                new.keep(self.averages)
            probes = {pair.own.name: self.averages.move(pair, step) for pair in plan.pairs}
            self.half_moved = False
        held.updates += 1
        held.last_update = LastUpdate(step.alpha, step.lora, distance, plan.rank(new), new.cut)
        held.known.forget()
        self._check_moved(probes | {name: Probe(0, tensor.reshape(-1)[0]) for name, tensor in new.weights.items()})
        return held.last_update

    def _check_moved(self, probes: dict[str, Probe | None]) -> None:
        """Read each changed weight again: a write into a gathered copy or a placeholder would be lost."""
        self._held.before_writing()
        for name, local, _ in self._held.weights():
            probe = probes.get(name)
            if probe is not None and not same_bits(local.reshape(-1)[probe.place], probe.number):
                raise RuntimeError(
                    f"The reference was moved, but {name} did not change: the forward reads other tensors than the "
                    "ones that were written. Was a module replaced after the reference was built? Build it after that."
                )

    def keep_initial(self) -> None:
        """Keep a copy of the weights before the first move, for `initial`.

        Raises:
            ValueError: the reference has moved already.
        """
        held = self._held
        if held.updates and not self.averages.first:
            raise ValueError(
                "The reference has moved already, and its first state was not kept. Call reference.keep_first() before "
                "the first update."
            )
        held.follow_policy()
        if self.initial_fingerprint is None:
            self.initial_fingerprint = held.recorded_fingerprint or held.fingerprint()
            self.averages.keep_first(weight for weight in held.weights() if held.owns(weight.name))

    @contextmanager
    def initial(self) -> Iterator[None]:
        """Restore the reference's state before its first move, while this is open.

        Raises:
            ValueError: `keep_initial` was not called before the first move; `initial` is open already.
        """
        self.check_closed("show its first state")
        if self.initial_fingerprint is None:
            raise ValueError(
                "The reference's first state was not kept. Call reference.keep_first() before the first update."
            )
        held = self._held
        self.check_whole()
        held.follow_policy()
        self.averages.follow(held.weights())
        self.exchange_initial()
        self._showing_initial = True
        try:
            with held.known.replaced_by(self.initial_fingerprint):
                yield
        finally:
            self._showing_initial = False
            self.exchange_initial()

    @torch.no_grad()
    def exchange_initial(self) -> None:
        """Exchange the weights with the kept initial ones."""
        held = self._held
        self.half_moved = True
        held.before_writing()
        replaced = {}
        for name, local, _ in held.weights():
            if (kept := self.averages.first.get(name)) is None:
                continue
            present = local.clone()
            if kept.shape == local.shape:
                local.copy_(kept)
                kept.copy_(present)
            else:
                replaced[name], self.averages.first[name] = kept, self.averages.place(present)
        if replaced:
            held.replace_weights(replaced)
        self.half_moved = False

    def recalled_initial(self, fingerprint: str | None) -> str | None:
        """Return the fingerprint of a loaded initial state if `initial` can restore that state here, else None."""
        return fingerprint if self.averages.first else None


def _check_values(pairs: list[Pair], step: Move) -> None:
    """Raise ValueError, on every rank, if the policy holds values that no reference can take over.

    An infinite value can be copied, as in a bias that excludes a token, but an average of it would be NaN.
    """
    theirs = (Weight(pair.own.name, pair.source, pair.own.layout) for pair in pairs)
    name = first_not_finite(theirs, infinite=not step.copies)
    if name is not None:
        what = "NaN" if step.copies else "NaN or infinite values"
        raise ValueError(
            f"The reference was to be updated from the policy, but {name} holds {what} in the policy, so every later "
            "KL would be NaN. The reference is unchanged. Look for the step at which the loss became NaN, and resume "
            "from a checkpoint before it."
        )
