"""A cache in front of a reference of any strategy: a row that was scored once is looked up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from refkl.backend import Weight
from refkl.reference.cached.score_cache import CacheStats, ScoreCache, each
from refkl.reference.contract import Reference
from refkl.reference.cost import Cost
from refkl.reference.request import BuildRequest
from refkl.types import KLFloor, MemoryReport, TokenBatch, TokenScores

logger = logging.get_logger(__name__)

_WITHOUT_CACHE = "Build the reference without cache, or score log-probabilities."


class _NotByRow(Exception):
    """The rows of a batch must be scored together. Raised before one is scored."""


class CachedReference(Reference):
    """A reference with a cache in front of it. `build_reference` returns it if `reference.cache` names a folder.

    Its attributes are those of the reference behind it (`uncached`), such as `strategy`, `reason` and `updates`.
    """

    def __init__(self, uncached: Reference, folder: str | Path) -> None:
        """
        Raises:
            ValueError: the folder cannot be made or written to.
        """
        self._uncached = uncached
        self._cache = ScoreCache(folder)
        self._freed = False

    def __getattr__(self, name: str) -> Any:
        if name == "_uncached":  # copy and pickle ask for it before it is set
            raise AttributeError(name)
        return getattr(self._uncached, name)

    # The cache.

    @property
    def uncached(self) -> Reference:
        return self._uncached

    @property
    def cache(self) -> ScoreCache:
        return self._cache

    @property
    def freed(self) -> bool:
        return self._freed

    def score(
        self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False, hidden: bool = False
    ) -> TokenScores:
        """Return scores as `Reference.score` does. The uncached reference scores the rows that are not in the cache.

        Raises:
            ValueError: hidden states are asked for; the weights were freed and a row is not in the cache.
        """
        if hidden:
            raise ValueError("hidden states are not kept by reference.cache. " + _WITHOUT_CACHE)
        return self._score(batch, temperature, entropy)

    def _score(self, batch: TokenBatch, temperature: float, entropy: bool, *, filling: bool = False) -> TokenScores:
        """Return scores as `score` does. With `filling`, raise ValueError for rows that no cache may keep."""

        def run(part: TokenBatch) -> TokenScores:
            if (why_not := self._uncached.why_not_by_row(batch)) is not None:
                raise _NotByRow(why_not)
            return self._uncached.score(part, temperature=temperature, entropy=entropy)

        if not self._freed:
            self._uncached.before_scoring(batch)  # also for rows in the cache
        conditions = self._uncached.score_conditions(batch)
        together = self._uncached.collective
        options: dict[str, Any] = {"temperature": temperature, "entropy": entropy, "together": together}
        try:
            scores = self._cache.score(batch, conditions, None if self._freed else run, **options)
        except _NotByRow as found:
            if filling:
                raise ValueError(
                    f"The scores of these rows cannot come from a cache, since {found}. Leave free out of fill, or "
                    "precompute_ref_log_probs of a TRL trainer False, and score them as they come."
                ) from None
            logger.warning_once(f"reference.cache is not used for a batch that must be scored together: {found}.")
            return self._uncached.score(batch, temperature=temperature, entropy=entropy)
        return replace(scores, fingerprint=self._uncached.scored_as)

    def fill(
        self, batches: Iterable[TokenBatch], *, temperature: float = 1.0, entropy: bool = False, free: bool = False
    ) -> CacheStats:
        if not self._freed:
            self._uncached.follow_policy()  # afterwards it is known if the reference is sharded
        for batch in each(batches, together=self._uncached.collective):
            self._score(batch, temperature, entropy, filling=free)
        self._cache.write()
        if dist.is_initialized():
            dist.barrier()  # scores of other ranks are on disk then, and may be asked for here
        if free:
            self.free()
        return self._cache.stats

    def free(self) -> None:
        if self._freed:
            return
        if self._uncached.updates:
            raise ValueError(
                "A reference that has been moved cannot be freed: a resumed run needs its weights. Leave free out."
            )
        self._uncached.follow_policy()
        self._cache.write()
        self._freed = self._uncached.free_weights()

    def _held(self, what: str) -> Reference:
        """Return the uncached reference; raise ValueError if its weights were freed, so that it cannot `what`."""
        if self._freed:
            raise ValueError(
                f"The reference's weights were freed once its cache was filled, so it cannot {what}. Build it again "
                "and do not free the weights."
            )
        return self._uncached

    # Methods that the cache cannot answer.

    def logits(self, batch: TokenBatch) -> NoReturn:
        self.check_exact()

    def check_exact(self) -> NoReturn:
        raise ValueError(
            "an exact divergence needs the reference's hidden states or logits, but reference.cache keeps only "
            "log-probabilities. " + _WITHOUT_CACHE
        )

    def keep_active(self) -> AbstractContextManager[None]:
        """Do nothing: the cache may have all scores, so no weights are moved in advance."""
        return nullcontext()

    # Methods that the uncached reference answers.

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        return "wraps another reference and holds no weights itself."

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        return Cost()

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        return "its scores are kept in a folder"

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> NoReturn:
        raise ValueError(f"A cache {cls.supports(request)} Set reference.cache.")

    def identity(self) -> dict[str, Any]:
        return self._uncached.identity()

    def fingerprint(self) -> str:
        if self._freed:
            recorded = self.recorded_fingerprint
            assert recorded is not None, "free() took it"
            return recorded
        return self._uncached.fingerprint()

    @property
    def recorded_fingerprint(self) -> str | None:
        return self._uncached.recorded_fingerprint

    @property
    def scored_as(self) -> str:
        return self._uncached.scored_as

    @property
    def digests(self) -> dict[str, str]:
        return self._uncached.digests

    def verify(self, count: int | None = None) -> None:
        if not self._freed:
            self._uncached.verify(count)

    def provenance(self) -> dict[str, Any]:
        return self._uncached.provenance()

    def memory(self) -> MemoryReport:
        return self._uncached.memory()

    def follow_policy(self) -> None:
        if not self._freed:
            self._uncached.follow_policy()

    def before_scoring(self, batch: TokenBatch) -> None:
        self._uncached.before_scoring(batch)

    def weights(self) -> Iterator[Weight]:
        return self._uncached.weights()

    def owns(self, name: str) -> bool:
        return self._uncached.owns(name)

    def score_conditions(self, batch: TokenBatch) -> dict[str, Any]:
        return self._uncached.score_conditions(batch)

    @property
    def collective(self) -> bool:
        return self._uncached.collective

    def why_not_by_row(self, batch: TokenBatch) -> str | None:
        return self._uncached.why_not_by_row(batch)

    @property
    def one_sweep(self) -> bool:
        return self._uncached.one_sweep

    def sharing_work_with(self, policy: nn.Module, batch: TokenBatch) -> AbstractContextManager[None]:
        return nullcontext() if self._freed else self._uncached.sharing_work_with(policy, batch)

    def check_movable(self, policy: nn.Module, alpha: float = 1.0, **how: Any) -> None:
        self._held("be moved").check_movable(policy, alpha, **how)

    def update(self, policy: nn.Module, alpha: float = 1.0, **how: Any) -> None:
        self._held("be moved").update(policy, alpha, **how)

    def keep_first(self) -> None:
        self._held("keep its first state").keep_first()

    def first(self) -> AbstractContextManager[None]:
        return self._held("show its first state").first()

    def save(self, folder: str | Path) -> None:
        self._held("be saved").save(folder)

    def load(self, folder: str | Path) -> None:
        self._held("be loaded into").load(folder)

    @property
    def kl_floor(self) -> KLFloor | None:
        return self._uncached.kl_floor

    def recall_floor(self, found: dict[str, Any]) -> None:
        self._uncached.recall_floor(found)

    def free_weights(self) -> bool:
        return self._uncached.free_weights()
