"""Base class of the trainers that switch off TRL's own reference: TRL reads arguments that refkl has settled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from refkl.config import SyncConfig
from refkl.hf.trainer_mixin import KLTrainerMixin


class TRLTrainer(KLTrainerMixin):
    """A TRL trainer whose KL and reference are refkl's."""

    trl_trainer: ClassVar[Any]
    """The TRL trainer that is extended."""

    def _as_it_is_made(self) -> AbstractContextManager[None]:
        return self._joining(self.trl_trainer, self._settled)

    def _settled(self, given: dict[str, Any]) -> AbstractContextManager[None]:
        """Return a context that switches off TRL's own reference. `given` are the arguments of TRL's `__init__`, which
        it may replace.

        Raises:
            ValueError: an argument that refkl does not support.
        """
        raise NotImplementedError

    @contextmanager
    def _joining(
        self, trainer: type, settle: Callable[[dict[str, Any]], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """Open `settle` around `trainer.__init__` while this trainer is made, with its arguments by name.

        The context may change the arguments. It is opened there and not in refkl's own __init__, because a user's class
        between the two may rename arguments or make some of them itself.
        """
        original = trainer.__init__  # type: ignore[misc]
        signature = inspect.signature(original)

        @functools.wraps(original)
        def settled(instance: Any, *args: Any, **kwargs: Any) -> None:
            if instance is not self:
                original(instance, *args, **kwargs)
                return
            given = signature.bind(instance, *args, **kwargs)
            given.apply_defaults()
            with settle(given.arguments):
                original(*given.args, **given.kwargs)

        trainer.__init__ = settled  # type: ignore[misc]
        try:
            yield
        finally:
            trainer.__init__ = original  # type: ignore[misc]


def settled_sync(args: Any, sync: SyncConfig | None) -> SyncConfig | None:
    """Return the sync config: refkl's, or one made from TRL's own setting (`sync_ref_model`).

    Raises:
        ValueError: both are given.
    """
    if args is None or not args.sync_ref_model:
        return sync
    if sync is not None:
        raise ValueError(
            "Both sync= and the trainer's sync_ref_model ask for a sync of the reference. Leave sync_ref_model False."
        )
    return SyncConfig(every=args.ref_model_sync_steps, alpha=args.ref_model_mixup_alpha)
