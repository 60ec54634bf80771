"""refkl references for a user's own subclasses of TRL trainers."""

from __future__ import annotations

from typing import TypeVar

from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

from refkl import hf
from refkl.hf.trainer_mixin import KLTrainerMixin, joined
from refkl.trl.dpo import KLDPOTrainer
from refkl.trl.grpo import KLGRPOTrainer
from refkl.trl.kto import KLKTOTrainer
from refkl.trl.rloo import KLRLOOTrainer
from refkl.trl.sft import KLSFTTrainer

_TRAINERS: dict[type, type[KLTrainerMixin]] = {
    GRPOTrainer: KLGRPOTrainer,
    RLOOTrainer: KLRLOOTrainer,
    DPOTrainer: KLDPOTrainer,
    KTOTrainer: KLKTOTrainer,
    SFTTrainer: KLSFTTrainer,
}

_Trainer = TypeVar("_Trainer")


def with_reference(trainer: type[_Trainer]) -> type[_Trainer]:
    """Return the trainer class with `reference=`, `kl=` and `sync=`, as in KLGRPOTrainer.

        MyKLTrainer = with_reference(MyTrainer)  # class MyTrainer(GRPOTrainer)

    The overrides of the subclass stay in force. refkl adds its penalty to the subclass's loss, and calls the subclass's
    own scoring of the policy with refkl's scorer in place of the model.

    Args:
        trainer: trl's GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer or SFTTrainer, or a subclass of one; or a
            trainer that is not TRL's, as for refkl.hf.with_reference.

    Raises:
        ValueError: any other class.
    """
    if not isinstance(trainer, type):
        raise ValueError(f"with_reference takes a trainer's class, but was given {trainer!r}.")
    if issubclass(trainer, KLTrainerMixin):
        return trainer
    for known, ours in _TRAINERS.items():
        if trainer is known:
            return ours  # type: ignore[return-value]
        if issubclass(trainer, known):
            return joined(ours, trainer)
    if issubclass(trainer, Trainer) and not any(cls.__module__.split(".")[0] == "trl" for cls in trainer.__mro__):
        return hf.with_reference(trainer)
    names = ", ".join(known.__name__ for known in _TRAINERS)
    raise ValueError(f"with_reference is for {names} of trl and their subclasses, and {trainer.__name__} is not one.")
