"""The optional methods of a reference. Each refuses by name until the author of a strategy writes it."""

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
    """The optional part of the contract. Each method answers for a reference that has no such thing: with nothing, if
    that is the truth, else with a ValueError that names the strategy."""

    strategy: str

    def memory(self) -> MemoryReport:
        """Return the bytes that the reference adds on this rank, averages included."""
        return MemoryReport(device=0, host=0)

    def follow_policy(self) -> None:
        """Follow the policy to the device and dtype that it has been given since. Each score does this first."""

    def before_scoring(self, batch: TokenBatch) -> None:
        """Raise ValueError if the reference must not score yet. `follow_policy` has already run."""

    def weights(self) -> Iterator[Weight]:
        """Yield every weight of the reference, as far as this rank holds it, in a fixed order; tied ones once."""
        return iter(())

    def owns(self, name: str) -> bool:
        """Return True if the weight is only the reference's, and not the policy's too."""
        return True

    @property
    def collective(self) -> bool:
        """True if a score needs all ranks, because none holds all of the weights."""
        return False

    @property
    def one_sweep(self) -> bool:
        """True if a score moves all weights to the device and takes any number of sequences: give it whole rollout
        batches, not micro-batches."""
        return False

    def keep_active(self) -> AbstractContextManager[None]:
        """Open around scores that follow each other, with nothing between them: what each moves is moved once."""
        return nullcontext()

    def sharing_work_with(self, policy: nn.Module, batch: TokenBatch) -> AbstractContextManager[None]:
        """Open around a score of the policy and one of the reference on the same batch, for what they can share."""
        return nullcontext()

    def logits(self, batch: TokenBatch) -> AbstractContextManager[ScoredLogits]:
        """Yield the reference's logits for the scored tokens, in full, with the reference active while this is open.

        Raises:
            ValueError: the reference gives log-probabilities only.
        """
        self.check_exact()
        self._refuse("gives no logits")

    def check_exact(self) -> None:
        """Raise ValueError if the reference cannot give what an exact divergence needs: hidden states, or logits."""
        self._refuse(
            "gives log-probabilities only, and an exact divergence needs hidden states or logits. Use an estimator "
            "(k1, k2, k3)"
        )

    def head(self) -> Head | None:
        """Return the reference's output head if its weights can be read at any time, on the policy's device; else None.

        An exact divergence is then computed inside the policy's forward, from the reference's hidden states.

        Raises:
            HeadError: as `find_head`.
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
        """Raise ValueError for what `update` would: a sync that can never be made is to fail before the run."""
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

        Each rank moves its own part: nothing is gathered or sent. Weights of 16 bits are averaged in fp32, in tensors
        that are kept beside them from the first move with alpha < 1 on (`reference.averages` says where).

        Args:
            policy: the policy, wrapped or not; weights are paired by name.
            alpha: in (0, 1]; 1 copies the policy, to the bit.
            bias: with it the average above is kept apart, and the reference is that average + bias (theta_policy -
                theta_start), where theta_start is what it was when a bias was first given since it was built, or since
                an update without one (BEMA, arXiv:2508.00180).
            lora: for LoRA layers with alpha < 1, what is averaged. "factors": A and B, each by itself. "product": the
                change of weight B · A that they make, exactly, which adds the policy's rank to the reference's with
                each update, up to the smaller side of the layer's weight; with alpha 1 the rank is the policy's again.
                `last_update.distance` says how far apart the two are. Other trainable weights are averaged as they are.
            rank: for "product", the rank to keep: the best approximation of the average in the Frobenius norm.

        Raises:
            ValueError: alpha, bias, lora or rank out of range; a strategy that cannot move; names or shapes that do not
                pair; "product" without LoRA layers, for adapters whose change of weight is not only B · A (DoRA), for
                weights of which ranks hold parts, or with a bias; "factors" for a reference that has another rank
                than the policy. The reference is then as it was.
            RuntimeError: what was written cannot be read back: something else holds the weights that are run.
        """
        self._refuse("cannot move")

    def keep_first(self) -> None:
        """Keep a copy of the weights as they are, before the first move, for `first`.

        Raises:
            ValueError: the reference has moved already, or cannot move.
        """
        self._refuse("cannot move, so it has no first state to keep")

    def first(self) -> AbstractContextManager[None]:
        """Let the reference be what it was before it first moved, while this is open.

        Raises:
            ValueError: `keep_first` was not called in time.
        """
        self._refuse("cannot move, so it has no first state to show")

    def save(self, folder: str | Path) -> None:
        """Write the reference's own weights (safetensors) and provenance (JSON) into `folder`.

        For weights that it shares with the policy, such as an adapter's base, the provenance has digests, which `load`
        compares. The folder takes its name once it is whole, also in the place of one that was saved before. If weights
        are sharded, every rank must call and writes its own parts; else rank 0 writes, and the others may call.

        Raises:
            ValueError: there are no weights to save, or they were freed; the folder holds other files.
        """
        self._refuse("has no weights in this process to save")

    def load(self, folder: str | Path) -> None:
        """Take over what `save` wrote, whatever strategy and number of ranks wrote it; every rank calls.

        The rank of its LoRA layers may be another than the policy's.

        Raises:
            ValueError: no saved reference there; a weight that is not as it was saved; names, shapes or dtypes that
                differ from this reference's; a weight that the policy shares and that is another there; a LoRA layer
                of another rank that was not saved with this one's scaling. Nothing is changed then.
        """
        self._refuse("has no weights in this process to load into")

    @property
    def kl_floor(self) -> KLFloor | None:
        """For a quantised reference, what quantising did to it in nats; None until it is measured, and for all others.

        Measured on build_reference's `calibration`, else on the first batch that is scored.
        """
        return None

    def recall_floor(self, found: dict[str, Any]) -> None:
        """Take over a floor that was measured in an earlier run: the "kl_floor" of its provenance.

        Raises:
            ValueError: it is above `reference.max_kl_floor`; the reference is not quantised.
        """
        raise ValueError("The reference is not quantised, and so has no floor of its own.")

    # What `reference.cache` adds; see CachedReference.

    @property
    def cache(self) -> ScoreCache | None:
        """The store of scores if `reference.cache` names a folder, else None; `cache.stats` counts."""
        return None

    @property
    def freed(self) -> bool:
        """True once the weights were freed, so that scores come from the cache only."""
        return False

    def fill(
        self, batches: Iterable[TokenBatch], *, temperature: float = 1.0, entropy: bool = False, free: bool = False
    ) -> CacheStats:
        """Score batches for the cache; rows that are there are not scored again, so a stopped fill goes on.

        Every rank calls, each with batches of its own; a progress bar shows in a terminal.

        Args:
            batches: what will be scored. Neither padding nor the way rows are put together matters.
            temperature: as it will be asked for.
            entropy: True if entropies will be asked for.
            free: then free the weights, as `free` does.

        Raises:
            ValueError: no cache; as `score` and `free`.
        """
        raise ValueError("reference.fill is for a reference with a cache: set reference.cache to a folder.")

    def free(self) -> None:
        """Drop the reference's own weights; from then on the cache answers. "adapter" has none to drop.

        Raises:
            ValueError: no cache; a reference that has been moved, which checkpoints must hold.
        """
        raise ValueError("reference.free is for a reference with a cache: set reference.cache to a folder.")

    def free_weights(self) -> bool:
        """Drop the weights that are only the reference's; return False if there are none to drop."""
        self._refuse("cannot free its weights")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"The reference of strategy {self.strategy!r} {what}.")
