"""Saving and loading of a held reference, including the tensors that it keeps for its moves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refkl.backend import Whole
from refkl.backend.adapters import check_scalings, rank_dims
from refkl.reference.moving.mover import Mover
from refkl.reference.weights.fingerprint import digests
from refkl.reference.weights.pairing import check_pairs
from refkl.reference.weights.saved import Saved, write_saved

if TYPE_CHECKING:
    from refkl.reference.held import HeldReference


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
    held.fingerprint()
    layouts = {weight.name: weight.layout for weight in held.weights()}
    devices = {weight.name: weight.local.device for weight in held.weights()}
    shapes = {name: layout.shape for name, layout in layouts.items()}
    recorded = {name: saved.shapes.get(name, shapes.get(name, torch.Size())) for name in saved.digests}
    layers = [layer for layer in held.lora_layers() if layer.b in layouts]
    free = {name: dim for name, dim in rank_dims(layers).items() if not layouts[name].sharded}
    check_pairs(recorded, shapes, "the saved reference", free)
    other = {name for name, shape in saved.shapes.items() if shape != shapes[name]}
    check_scalings(layers, saved.provenance.get("scalings", {}), other)
    layouts |= {name: Whole(saved.shapes[name]) for name in other}
    changed = saved.changed(held.digests, held.owns, layouts)
    held.before_writing()
    mover.half_moved = True
    if other:
        own = {weight.name: weight.local for weight in held.weights()}
        held.replace_weights({name: own[name].new_empty(saved.shapes[name]) for name in other})
    saved.copy_into(weight for weight in held.weights() if weight.name in changed)
    mover.averages.load(saved.averages(layouts), devices)
    held.updates, held.last_update = int(saved.provenance["updates"]), None
    mover.initial_fingerprint = mover.recalled_initial(saved.provenance.get("first"))
    mover.half_moved = False
    held.known.forget()
    loaded = held.fingerprint()
    assert loaded == saved.provenance["fingerprint"], "every weight was compared before it was written"
