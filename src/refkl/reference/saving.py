"""Saving and loading of a held reference, including the tensors that it keeps for its moves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refkl.backend import Whole
from refkl.backend.adapters import LoraFactors, check_scalings, rank_dims
from refkl.reference.moving.mover import Mover
from refkl.reference.offers import Offers
from refkl.reference.weights.fingerprint import digests
from refkl.reference.weights.pairing import check_pairs
from refkl.reference.weights.record import Record
from refkl.reference.weights.saved import Saved, write_saved

if TYPE_CHECKING:
    from refkl.reference.held import HeldReference


class WriteHooks(Offers):
    """Methods that a strategy may write for moves, and for the load of a saved reference."""

    def lora_layers(self) -> list[LoraFactors]:
        """Return the LoRA layers that the reference can hold with another rank than the policy's. A strategy that
        returns any must implement `replace_weights`."""
        return []

    def replace_weights(self, weights: dict[str, Tensor]) -> None:
        """Replace weights by tensors of other shapes, which the reference owns from then on."""
        self._refuse("cannot hold weights of other shapes than the policy's")

    def before_writing(self) -> None:
        """Drop gathered copies that would hide new weights from the next forward."""

    def average_shapes(self) -> dict[str, torch.Size]:
        """Return the whole shape of each weight that may have an average beside it, by name."""
        return {weight.name: weight.layout.shape for weight in self.weights()}

    def check_saved(self, record: Record) -> None:
        """Raise ValueError if a saved reference must not be loaded here, for reasons besides its weights."""

    def after_load(self, record: Record) -> None:
        """Take over what a saved reference holds besides its weights. `check_saved` has not raised."""


def save_held(held: HeldReference, mover: Mover, folder: Path) -> None:
    """Write the files that `Reference.save` describes."""
    mover.check_whole()
    own = [weight for weight in held.weights() if held.owns(weight.name)]

    def record() -> dict[str, Any]:
        averages = digests(mover.averages.weights())
        scalings = {layer.b: layer.scaling for layer in held.lora_layers()}
        kept = {"averages": averages, "first": mover.initial_fingerprint, "scalings": scalings}
        return {**held.provenance(), "weights": held.digests, **kept}

    write_saved(folder, [*own, *mover.averages.weights()], record)


def load_held(held: HeldReference, mover: Mover, saved: Saved) -> None:
    """Load what `save_held` wrote. All checks run before anything is written into the reference."""
    held.follow_policy()
    with held.known.restored_on_error():
        _load_checked(held, mover, saved)


def _load_checked(held: HeldReference, mover: Mover, saved: Saved) -> None:
    held.check_saved(saved.record)
    held.fingerprint()
    layouts = {weight.name: weight.layout for weight in held.weights()}
    devices = {weight.name: weight.local.device for weight in held.weights()}
    shapes = {name: layout.shape for name, layout in layouts.items()}
    recorded = {name: saved.shapes.get(name, shapes.get(name, torch.Size())) for name in saved.digests}
    layers = [layer for layer in held.lora_layers() if layer.b in layouts]
    free = {name: dim for name, dim in rank_dims(layers).items() if not layouts[name].sharded}
    check_pairs(recorded, shapes, "the saved reference", free)
    other = {name for name, shape in saved.shapes.items() if shape != shapes[name]}
    check_scalings(layers, saved.record.scalings, other)
    _check_averages(saved, held.average_shapes(), free)
    layouts |= {name: Whole(saved.shapes[name]) for name in other}
    changed = saved.changed(held.digests, held.owns, layouts)
    averages = mover.averages.loaded(saved.averages(layouts), devices)
    held.before_writing()
    mover.half_moved = True
    if other:
        own = {weight.name: weight.local for weight in held.weights()}
        held.replace_weights({name: own[name].new_empty(saved.shapes[name]) for name in other})
    saved.copy_into(weight for weight in held.weights() if weight.name in changed)
    mover.averages = averages
    held.updates, held.last_update = saved.record.updates, None
    mover.initial_fingerprint = mover.recalled_initial(saved.record.first)
    held.known.forget()
    if held.fingerprint() != saved.record.fingerprint:
        raise ValueError(
            f"The files in {saved.folder} changed while they were loaded, so the reference holds a part of them and "
            "cannot be used. Load it again from a folder that no process writes into."
        )
    mover.half_moved = False
    held.after_load(saved.record)


def _check_averages(saved: Saved, shapes: dict[str, torch.Size], free: dict[str, int]) -> None:
    """Raise ValueError if a kept tensor belongs to no weight, or has another shape than its weight. A LoRA factor's may
    have another rank."""
    for full_name in saved.averaged:
        name = full_name.split(":", 1)[1]
        shape, own = saved.record.shapes[full_name], shapes.get(name)
        dim = free.get(name)
        if (
            own is None
            or len(shape) != len(own)
            or any(a != b for place, (a, b) in enumerate(zip(shape, own, strict=True)) if place != dim)
        ):
            raise ValueError(
                f"The reference saved in {saved.folder} keeps {full_name} with shape {list(shape)}; this reference "
                + ("has no such weight." if own is None else f"has the weight with shape {list(own)}.")
            )
