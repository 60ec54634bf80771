"""The optional methods of a reference. Each has a default until the author of a strategy writes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from torch import nn

from refkl.backend import Weight
from refkl.scoring import Head, ScoredLogits
from refkl.types import KLFloor, MemoryReport, TokenBatch

if TYPE_CHECKING:
    from refkl.reference.cached.score_cache import CacheStats, ScoreCache


class Offers:
    """The optional part of the contract. Each default is for a reference without the feature: it returns an empty
    result where that is correct, and otherwise raises a ValueError that names the strategy."""

    strategy: str

    def memory(self) -> MemoryReport:
        """Return the bytes that the reference adds on this rank, averages included."""
        return MemoryReport(device=0, host=0)

    def follow_policy(self) -> None:
        """Follow the policy to its present device and dtype. Each score does this first."""

    def before_scoring(self, batch: TokenBatch) -> None:
        """Raise ValueError if the reference must not score yet. `follow_policy` has already run."""

    def weights(self) -> Iterator[Weight]:
        """Yield every weight of the reference, as far as this rank holds it, in a fixed order; tied ones once."""
        return iter(())

    def owns(self, name: str) -> bool:
        """Return True if the weight belongs to the reference only, and is not shared with the policy."""
        return True

    @property
    def collective(self) -> bool:
        """True if a score needs all ranks, because no rank holds all weights."""
        return False

    @property
    def one_sweep(self) -> bool:
        """True if each score moves all weights to the device once, for any number of sequences. Give it whole rollout
        batches, not micro-batches."""
        return False

    def keep_active(self) -> AbstractContextManager[None]:
        """Keep the reference active over consecutive scores with nothing between them: its weights move only once."""
        return nullcontext()

    def why_not_by_row(self, batch: TokenBatch) -> str | None:
        """Return why the rows of this batch must be scored together, so that no cache may keep their scores.

        None, the default, says that the scores of a row depend on nothing but its own tokens. Every rank must call if
        weights are sharded.
        """
        return None

    def sharing_work_with(self, policy: nn.Module, batch: TokenBatch) -> AbstractContextManager[None]:
        """Share work between a score of the policy and one of the reference on the same batch, while this is open."""
        return nullcontext()

    def logits(self, batch: TokenBatch) -> AbstractContextManager[ScoredLogits]:
        """Yield the reference's logits for the scored tokens, in full, with the reference active while this is open.

        Raises:
            ValueError: the reference returns log-probabilities only.
        """
        self.check_exact()
        self._refuse("gives no logits")

    def check_exact(self) -> None:
        """Raise ValueError if the reference has neither hidden states nor logits, which an exact divergence needs."""
        self._refuse(
            "gives log-probabilities only, and an exact divergence needs hidden states or logits. Use an estimator "
            "(k1, k2, k3)"
        )

    def head(self) -> Head | None:
        """Return the reference's output head if its weights can be read at any time, on the policy's device; else None.

        An exact divergence is then computed inside the policy's forward, from the reference's hidden states.

        Raises:
            HeadError: see `find_head`.
        """
        return None

    def check_movable(
        self,
        policy: nn.Module,
        alpha: float = 1.0,
        *,
        bias: float | None = None,
        lora: Literal["factors", "product"] = "factors",
        rank: int | None = None,
    ) -> None:
        """Raise ValueError wherever `update` would, so that an impossible sync fails before the run."""
        self._refuse("cannot move")

    def update(
        self,
        policy: nn.Module,
        alpha: float = 1.0,
        *,
        bias: float | None = None,
        lora: Literal["factors", "product"] = "factors",
        rank: int | None = None,
    ) -> None:
        """Move the reference: theta_ref <- (1 - alpha) theta_ref + alpha theta_policy.

        Each rank moves its own part: nothing is gathered or sent. Weights of 16 bits are averaged in fp32. The fp32
        tensors are kept beside the weights from the first move with alpha < 1 (`reference.averages` says where).

        Args:
            policy: the policy, wrapped or not; weights are paired by name.
            alpha: in (0, 1]; 1 copies the policy, bit for bit.
            bias: if given, the average above is kept separately, and the reference is that average + bias
                (theta_policy - theta_start). theta_start is the reference at the first update with a bias since it was
                built, or since an update without one (BEMA, arXiv:2508.00180).
            lora: the quantity to average in LoRA layers with alpha < 1. "factors": A and B separately. "product": the
                change of weight B · A, exactly. Each update then adds the policy's rank to the reference's, up to the
                smaller side of the layer's weight; an update with alpha 1 returns to the policy's rank.
                `last_update.distance` is the distance between the two averages. Other trainable weights are averaged
                directly.
            rank: for "product", the rank to keep: the best approximation of the average in the Frobenius norm.

        Raises:
            ValueError: alpha, bias, lora or rank is out of range; the strategy cannot move; names or shapes do not
                pair; "product" without LoRA layers, for adapters whose change of weight is not only B · A (DoRA), for
                weights of which ranks hold parts, or with a bias; "factors" for a reference that has another rank
                than the policy. The reference is then unchanged.
            RuntimeError: the written weights cannot be read back, because the forward uses other tensors.
        """
        self._refuse("cannot move")

    def keep_first(self) -> None:
        """Keep a copy of the weights as they are, before the first move, for `first`.

        Raises:
            ValueError: the reference has moved already, or cannot move.
        """
        self._refuse("cannot move, so it has no first state to keep")

    def first(self) -> AbstractContextManager[None]:
        """Restore the reference's state before its first move, while this is open.

        Raises:
            ValueError: `keep_first` was not called before the first move.
        """
        self._refuse("cannot move, so it has no first state to show")

    def save(self, folder: str | Path) -> None:
        """Write the reference's own weights (safetensors) and provenance (JSON) into `folder`.

        Weights that it shares with the policy, such as an adapter's base, are recorded as digests in the provenance,
        which `load` compares. The folder gets its name only when it is complete, and replaces one that was saved
        before. If weights are sharded, every rank must call and writes its own parts; otherwise rank 0 writes, and the
        other ranks may call.

        Raises:
            ValueError: there are no weights to save, or they were freed; the folder holds other files.
        """
        self._refuse("has no weights in this process to save")

    def load(self, folder: str | Path) -> None:
        """Load what `save` wrote, with any strategy and any number of ranks. Every rank must call.

        Its LoRA layers may have another rank than the policy's.

        Raises:
            ValueError: the folder holds no saved reference; a weight was altered since it was saved; names, shapes or
                dtypes differ from this reference's; a weight shared with the policy differs from the saved one; a LoRA
                layer of another rank was saved with another scaling than this one's. Nothing is changed then.
        """
        self._refuse("has no weights in this process to load into")

    @property
    def kl_floor(self) -> KLFloor | None:
        """The KL in nats that quantising causes; None until it is measured, and for a reference that is not quantised.

        It is measured on build_reference's `calibration`, or else on the first batch that is scored.
        """
        return None

    def recall_floor(self, found: dict[str, Any]) -> None:
        """Use a floor that was measured in an earlier run: the "kl_floor" of that run's provenance.

        Raises:
            ValueError: it is above `reference.max_kl_floor`; the reference is not quantised.
        """
        raise ValueError("The reference is not quantised, so it has no KL floor. Set reference.quantize as it was.")

    # Methods that `reference.cache` adds; see CachedReference.

    @property
    def cache(self) -> ScoreCache | None:
        """The store of scores if `reference.cache` names a folder, else None. `cache.stats` has its counts."""
        return None

    @property
    def freed(self) -> bool:
        """True once the weights were freed, so that scores come from the cache only."""
        return False

    def fill(
        self, batches: Iterable[TokenBatch], *, temperature: float = 1.0, entropy: bool = False, free: bool = False
    ) -> CacheStats:
        """Score batches into the cache. Rows that are in it already are not scored again, so a stopped fill resumes.

        Every rank must call, each with its own batches. In a terminal, a progress bar is shown.

        Args:
            batches: the sequences that will be scored later. Padding and the grouping into batches do not matter.
            temperature: the temperature of the later scores.
            entropy: True if the later scores ask for entropies.
            free: if True, free the weights afterwards, as `free` does.

        Raises:
            ValueError: there is no cache; see also `score` and `free`.
        """
        raise ValueError("reference.fill is for a reference with a cache: set reference.cache to a folder.")

    def free(self) -> None:
        """Drop the reference's own weights; scores come from the cache from then on. "adapter" has none to drop.

        Raises:
            ValueError: there is no cache; the reference has been moved, so checkpoints must hold its weights.
        """
        raise ValueError("reference.free is for a reference with a cache: set reference.cache to a folder.")

    def free_weights(self) -> bool:
        """Drop the weights that belong to the reference only; return False if there are none to drop."""
        self._refuse("cannot free its weights")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"The reference of strategy {self.strategy!r} {what}.")
