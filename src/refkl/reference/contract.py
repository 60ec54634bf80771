"""The contract of a strategy, and what all of them share: scoring without a trace, provenance, saving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refkl.backend import Backend, Weight, Whole, communicating_device, evaluating, learned_prompt
from refkl.backend.adapters import LoraFactors, check_scalings, rank_dims
from refkl.config import ReferenceConfig
from refkl.reference.cached.score_cache import CacheStats, ScoreCache, describe, each
from refkl.reference.cost import Cost, Shape, Step, shape_of
from refkl.reference.moving.average import Averages, Move, Pair, Probe, same_bits
from refkl.reference.moving.lora_update import LastUpdate, planned
from refkl.reference.weights.fingerprint import combined, digests
from refkl.reference.weights.saved import Saved, write_saved
from refkl.reference.weights.tensors import check_pairs
from refkl.scoring import Head, ScoredLogits, completion_logits, score_model
from refkl.scoring.in_parts import free_tokens, in_parts
from refkl.scoring.packing.worthwhile import shares_prompts
from refkl.types import KLFloor, MemoryReport, TokenBatch, TokenScores
from refkl.versions import library_versions

if TYPE_CHECKING:
    from accelerate import Accelerator

_WITHOUT_CACHE = "Build the reference without cache, or score log-probabilities."


@dataclass(frozen=True)
class BuildRequest:
    """What a strategy is asked to hold a reference for."""

    policy: nn.Module
    """Wrapped or not, sharded or not."""
    config: ReferenceConfig
    """What was asked for."""
    backend: Backend
    """What the policy runs on, or will."""
    accelerator: Accelerator | None
    """The one that prepares the policy, if there is one."""
    step: Step = field(default_factory=Step)
    """What is scored per step; without it a cost is of bytes held alone."""
    planned: bool = False
    """Whether the policy is a plan, without weights: an adapter of it is fresh."""
    memory: int | None = None
    """Bytes of a device, for a plan; in a run the device is asked."""
    calibration: TokenBatch | Iterable[TokenBatch] | None = None
    """For a quantised reference: what its floor is measured on; None takes what is scored first."""

    @cached_property
    def shape(self) -> Shape:
        """What a cost is counted from."""
        on_cpu = next(self.policy.parameters()).device.type == "cpu"
        stays = self.accelerator is None or self.accelerator.device.type == "cpu"
        memory = self.memory
        if memory is None and not (on_cpu and stays):
            home = next(self.policy.parameters()).device if self.accelerator is None else self.accelerator.device
            memory = device_memory(home)
        return shape_of(self.policy, self.backend, self.step, on_host=on_cpu and stays, memory=memory)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for what is not known."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


class Reference(ABC):
    """A frozen model to compare the policy with. Subclass it, then `register_strategy`, to hold one in your own way.

    A strategy says whether it can (`supports`), what it adds (`cost`), makes itself (`build`), and opens the module
    that is to be run (`_active`). It lists its weights (`_weights`), and pairs those that move with the policy's
    (`_pairs`).
    """

    strategy: str
    """Its name in STRATEGIES; of one that moved it can become another's."""

    def __init__(self, request: BuildRequest, reason: str, source: str) -> None:
        self.reason = reason
        """One sentence: why this strategy."""
        self.source = source
        """Where the weights came from."""
        self.updates = 0
        """How often it has been moved by `update`."""
        self.last_update: LastUpdate | None = None
        """What the last of them did; None before the first, and once it is loaded."""
        self._accelerator = request.accelerator
        self.config = request.config
        """What was asked for."""
        self._device = None if request.config.device is None else torch.device(request.config.device)
        self.cache = None if request.config.cache is None else ScoreCache(request.config.cache)
        """Where its scores are kept, if `reference.cache` names a folder; `cache.stats` counts."""
        self.freed = False
        """Whether its weights were freed, so that it answers from the cache alone."""
        self._described: tuple[str, dict[str, Any]] | None = None
        self._recorded: str | None = None
        self.digests: dict[str, str] = {}
        """Of each weight when the fingerprint was last taken: to name the one that changed."""
        self._verified = 0
        self._averages = Averages(on_host=request.config.averages == "host")
        self._half_moved = False
        """Whether an error left it between two moves."""
        self._initial_fingerprint: str | None = None
        """The fingerprint before the first move, if it was kept."""

    @classmethod
    @abstractmethod
    def supports(cls, request: BuildRequest) -> str | None:
        """None if this strategy gives the right reference for this policy here; else a sentence that says why not."""

    @classmethod
    @abstractmethod
    def cost(cls, request: BuildRequest) -> Cost:
        """What it would add on a rank, counted from `request.shape`. Auto takes the cheapest that can."""

    @classmethod
    def auto(cls, request: BuildRequest) -> bool:
        """Whether auto may take it, where it can; else it has to be asked for by name."""
        return True

    @classmethod
    @abstractmethod
    def why(cls, request: BuildRequest) -> str:
        """The reason that auto gives for this strategy, without a full stop."""

    @classmethod
    @abstractmethod
    def build(cls, request: BuildRequest, reason: str) -> Reference:
        """Make it. `supports` has said None."""

    @abstractmethod
    def activate(self) -> AbstractContextManager[nn.Module]:
        """The module to run, as the reference for as long as this is open; switched back also when scoring raises."""

    @abstractmethod
    def weights(self) -> Iterator[Weight]:
        """Every weight of the reference, as far as this rank holds it, in a fixed order; tied ones once."""

    def pairs(self, policy: nn.Module) -> list[Pair]:
        """Each weight that moves, with the policy's; nothing is written here.

        Raises:
            ValueError: names or shapes that do not pair; a strategy that cannot move.
        """
        raise ValueError(f"strategy {self.strategy!r} cannot move.")

    def lora_layers(self) -> list[LoraFactors]:
        """The LoRA layers of which it can hold another rank than the policy's; a strategy that lists any has
        `_replace`."""
        return []

    def replace_weights(self, weights: dict[str, Tensor]) -> None:
        """Let these be the reference's, which were of other shapes; the tensors are its own from then on."""
        raise ValueError(f"strategy {self.strategy!r} cannot hold weights of other shapes than the policy's.")

    def before_writing(self) -> None:  # noqa: B027 - an optional hook: most hold no copies of their shards
        """Drop what would hide new weights from the next forward."""

    def free_weights(self) -> bool:
        """Drop the weights that are the reference's alone; False if there are none, so that it can still be run."""
        raise ValueError(f"strategy {self.strategy!r} cannot free its weights.")

    def owns(self, name: str) -> bool:
        """Whether the weight is the reference's alone, and not the policy's too."""
        return True

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
        step = Move(alpha, bias, lora, rank)
        step.check()
        self._check_held("be moved")
        self._check_move(policy, step)

    def _check_move(self, policy: nn.Module, step: Move) -> None:
        planned(step, self.pairs(policy), self.lora_layers())

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

    def before_scoring(self, batch: TokenBatch) -> None:  # noqa: B027 - an optional hook
        """Raise ValueError if it must not answer; settled it is."""

    def follow_policy(self) -> None:  # noqa: B027 - an optional hook: a strategy without weights of its own has none to move
        """Follow the policy to the device and dtype that it has been given since. Each score does this first."""

    def score(
        self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False, hidden: bool = False
    ) -> TokenScores:
        """Log-probabilities of the scored tokens under the reference: no grad, dropout off, nothing left changed.

        Where its weights are sharded every rank must call; and of a quantised one the first time, which measures its
        floor over all of them.

        Args:
            batch: what to score.
            temperature: divides the logits; give the policy the same.
            entropy: also the entropy of each predicting distribution.
            hidden: also the states that enter the output head.

        Raises:
            ValueError: as `score_tokens`; or the reference can no longer be told from the policy; or it has a cache and
                hidden states are asked for; or its weights were freed and a row is not there; or it is quantised and
                its floor (`kl_floor`) is too high, or cannot be measured any more.
        """

        def run(batch: TokenBatch) -> TokenScores:
            options: dict[str, Any] = {"temperature": temperature, "entropy": entropy, "hidden": hidden}
            with self._scoring(batch) as (model, moved):

                def score(part: TokenBatch) -> TokenScores:
                    return score_model(model, part, **options).scores

                limit = self._most_tokens(model, moved.input_ids.device)
                if limit is None:
                    return score(moved).to(batch.input_ids.device)
                scores = in_parts(score, moved, limit, self._rounds, shares=shares_prompts(model, moved))
                return scores.to(batch.input_ids.device)

        if self.cache is None:
            return replace(run(batch), fingerprint=self.recorded_fingerprint)
        if hidden:
            raise ValueError("hidden states are not kept by reference.cache. " + _WITHOUT_CACHE)
        if not self.freed:
            self.before_scoring(batch)  # also for what the cache knows
        about = self._about(batch)
        options: dict[str, Any] = {"temperature": temperature, "entropy": entropy, "together": self._sharded()}
        scores = self.cache.score(batch, about, None if self.freed else run, **options)
        return replace(scores, fingerprint=self.recorded_fingerprint)

    def fill(
        self, batches: Iterable[TokenBatch], *, temperature: float = 1.0, entropy: bool = False, free: bool = False
    ) -> CacheStats:
        """Score batches for the cache alone; what is there already is not scored again, so a stopped one goes on.

        Every rank calls, each with batches of its own; a progress bar shows in a terminal.

        Args:
            batches: what will be scored; how rows are put together, and padding, are no matter.
            temperature: as it will be asked for.
            entropy: whether entropies will be asked for.
            free: then free the weights, as `free` does.

        Raises:
            ValueError: no cache; as `score` and `free`.
        """
        cache = self._need_cache("fill")
        if not self.freed:
            self.follow_policy()  # whether it is sharded is known then
        for batch in each(batches, together=self._sharded()):
            self.score(batch, temperature=temperature, entropy=entropy)
        cache.write()
        if dist.is_initialized():
            dist.barrier()  # what the others scored is on disk, and may be asked for here
        if free:
            self.free()
        return cache.stats

    def free(self) -> None:
        """Drop the reference's own weights; from then on it answers from the cache alone. "adapter" has none to drop.

        Raises:
            ValueError: no cache; a reference that has been moved, which checkpoints must hold.
        """
        cache = self._need_cache("free")
        if self.freed:
            return
        if self.updates:
            raise ValueError("A reference that has been moved cannot be freed: a resumed run needs its weights.")
        self.follow_policy()
        self._description(self.recorded_fingerprint or self.fingerprint())
        cache.write()
        self.freed = self.free_weights()

    def _need_cache(self, what: str) -> ScoreCache:
        if self.cache is None:
            raise ValueError(f"reference.{what} is for a reference with a cache: set reference.cache to a folder.")
        return self.cache

    def _about(self, batch: TokenBatch) -> dict[str, Any]:
        """What its scores depend on, beside the batch. Collective after an update, if sharded."""
        if not self.freed:
            self.follow_policy()
        device = (self._device or batch.input_ids.device).type
        with self._autocast():
            cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        # After an update there is no stamp: what was scored before it must not answer.
        stamp = self.recorded_fingerprint or self.fingerprint()
        return {"fingerprint": stamp, "autocast": cast, **self._description(stamp)}

    def _description(self, stamp: str) -> dict[str, Any]:
        if self._described is None or self._described[0] != stamp:
            with self.activate() as model:
                self._described = stamp, describe(model)
        return self._described[1]

    def _sharded(self) -> bool:
        """Whether a score is collective: no rank holds all of the weights."""
        several = dist.is_initialized() and dist.get_world_size() > 1 and not self.freed
        return several and self.holds_parts()

    def holds_parts(self) -> bool:
        """Return True if this rank holds only a part of some weight.

        Scores ask this, also inside `keep_active`, where a strategy may refuse to list its weights.
        """
        return any(weight.layout.sharded for weight in self.weights())

    def _most_tokens(self, model: nn.Module, device: torch.device) -> int | None:
        """How many to score at once; None for all."""
        if self.config.max_tokens is not None:
            return self.config.max_tokens
        # What is moved for each score is moved once for all tokens.
        return None if self.one_sweep or self._sharded() else free_tokens(model, device)

    def _rounds(self, parts: int) -> int:
        """How often to score, if a batch is in so many parts here: as often as any rank, where they score together."""
        if not self._sharded():
            return parts
        most = torch.tensor(parts, device=communicating_device())
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _check_held(self, what: str) -> None:
        if self.freed:
            raise ValueError(
                f"The reference's weights were freed once its cache was full, so it cannot {what}. Build it anew, and "
                "leave the weights."
            )

    def _check_whole(self) -> None:
        if self._half_moved:
            raise ValueError(
                "An error ended the reference's last update half-way: some of its weights were moved and some were "
                "not. Load it from a checkpoint (reference.load), copy the policy (alpha 1), or build it anew."
            )

    @contextmanager
    def logits(self, batch: TokenBatch) -> Iterator[ScoredLogits]:
        """The reference's logits for the scored tokens, in full, with the reference active for as long as this is
        open.

        Raises:
            ValueError: it has a cache, which holds no logits.
        """
        self.check_exact()
        with self._scoring(batch) as (model, moved):
            yield completion_logits(model, moved)

    def check_exact(self) -> None:
        """Raise ValueError if it cannot give what an exact divergence needs."""
        if self.cache is not None:
            raise ValueError(
                "an exact divergence needs the reference's hidden states or logits, and reference.cache keeps "
                "log-probabilities alone. " + _WITHOUT_CACHE
            )

    def keep_active(self) -> AbstractContextManager[None]:
        """Open around scores that follow each other, with nothing between them: what each moves is moved once."""
        return nullcontext()

    def sharing_work_with(self, policy: nn.Module, batch: TokenBatch) -> AbstractContextManager[None]:
        """Open around a score of the policy and one of the reference on the same batch, for what they can share."""
        return nullcontext()

    def head(self) -> Head | None:
        """The reference's output head, where its weights can be read at any time, on the policy's device; else None.

        An exact divergence is then computed inside the policy's forward, from the reference's hidden states.

        Raises:
            HeadError: as `find_head`.
        """
        return None

    @contextmanager
    def _scoring(self, batch: TokenBatch) -> Iterator[tuple[nn.Module, TokenBatch]]:
        """The module to run and the batch where it is: no grad, dropout off, nothing left changed."""
        self._check_whole()
        self.follow_policy()
        self.before_scoring(batch)
        with self.activate() as model, torch.no_grad(), evaluating(model), self._autocast():
            yield model, batch if self._device is None else batch.to(self._device)

    def _autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self._accelerator is None else self._accelerator.autocast()

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
            lora: what of LoRA layers is averaged with alpha < 1; all else that trains is, as it stands. "factors": A
                and B, each by itself. "product": the change of weight B · A that they make, exactly, which adds the
                policy's rank to the reference's with each update, up to the smaller side of the layer's weight; with
                alpha 1 the rank is the policy's again. `last_update.distance` says how far apart the two are.
            rank: for "product", the rank to keep: the best approximation of the average in the Frobenius norm.

        Raises:
            ValueError: alpha, bias, lora or rank out of range; a strategy that cannot move; names or shapes that do not
                pair; "product" without LoRA layers, for adapters whose change of weight is not B · A alone (DoRA), for
                weights of which ranks hold parts, or with a bias; "factors" for a reference that has another rank
                than the policy. The reference is then as it was.
            RuntimeError: what was written cannot be read back: something else holds the weights that are run.
        """
        step = Move(alpha, bias, lora, rank)
        step.check()
        self._check_held("be moved")
        if not step.copies:
            self._check_whole()
        self._update(policy, step)

    def _update(self, policy: nn.Module, step: Move) -> None:
        """Make a move that has been checked."""
        self.follow_policy()
        self._averages.follow(self.weights())
        with torch.no_grad():
            plan = planned(step, self.pairs(policy), self.lora_layers())
            new, distance = plan.new(self._averages), plan.distance(self._averages)
            self._averages.prepare(plan.pairs, step)
            self.before_writing()
            self._half_moved = True
            if new.weights:
                self.replace_weights(new.weights)
                new.keep(self._averages)
            probes = {pair.own.name: self._averages.move(pair, step) for pair in plan.pairs}
            self._half_moved = False
        self.updates += 1
        self.last_update = LastUpdate(step.alpha, step.lora, distance, plan.rank(new), new.cut)
        self._recorded = None
        self._check_moved(probes | {name: Probe(0, tensor.reshape(-1)[0]) for name, tensor in new.weights.items()})

    def _check_moved(self, probes: dict[str, Probe | None]) -> None:
        """Look each changed weight up anew: a write into a gathered copy, or into a placeholder, would be lost."""
        self.before_writing()
        for name, local, _ in self.weights():
            probe = probes.get(name)
            if probe is not None and not same_bits(local.reshape(-1)[probe.place], probe.number):
                raise RuntimeError(
                    f"The reference was moved, and {name} did not change: something else than the weights that were "
                    "written is what a forward reads. Was a module of it replaced after the reference was built?"
                )

    def keep_first(self) -> None:
        """Keep a copy of the weights as they are, before the first move, for `first`.

        Raises:
            ValueError: it has moved already.
        """
        if self.updates and not self._averages.first:
            raise ValueError("The reference has moved already, and what it was first was not kept.")
        self.follow_policy()
        if self._initial_fingerprint is None:
            self._initial_fingerprint = self.recorded_fingerprint or self.fingerprint()
            self._averages.keep_first(weight for weight in self.weights() if self.owns(weight.name))

    @contextmanager
    def first(self) -> Iterator[None]:
        """What the reference was before it first moved, for as long as this is open: it scores as that.

        Raises:
            ValueError: `keep_first` was not called in time.
        """
        if self._initial_fingerprint is None:
            raise ValueError("What the reference was first was not kept: call reference.keep_first() before it moves.")
        self._check_whole()
        self.follow_policy()
        self._averages.follow(self.weights())
        self._exchange_first()
        present, self._recorded = self._recorded, self._initial_fingerprint
        try:
            yield
        finally:
            self._recorded = present
            self._exchange_first()

    @torch.no_grad()
    def _exchange_first(self) -> None:
        """The weights and what was kept of the first ones change places."""
        self._half_moved = True
        self.before_writing()
        replaced = {}
        for name, local, _ in self.weights():
            if (kept := self._averages.first.get(name)) is None:
                continue
            present = local.clone()
            if kept.shape == local.shape:
                local.copy_(kept)
                kept.copy_(present)
            else:
                replaced[name], self._averages.first[name] = kept, self._averages.place(present)
        if replaced:
            self.replace_weights(replaced)
        self._half_moved = False

    def _recalled_first(self, stamp: str | None) -> str | None:
        """The stamp of the first reference that was loaded, if `first` can give that here."""
        return stamp if self._averages.first else None

    def fingerprint(self) -> str:
        """64 hex digits that change if and only if the name, shape, dtype or a bit of some weight does.

        The same weights have the same fingerprint whatever strategy, device or number of ranks holds them. Where
        weights are sharded every rank must call: they exchange one number a weight. See fingerprint.py.
        Once the weights are freed, what it was.
        """
        if self.freed:
            assert self._recorded is not None, "free() took it"
            return self._recorded
        self.digests = digests(self.weights())
        self._recorded = combined(self.digests)
        return self._recorded

    def verify(self, count: int | None = None) -> None:
        """Find a weight that changed since the fingerprint was taken, with no `update` or `load` to explain it.

        Args:
            count: how many weights to look at, the next ones at each call; None looks at all. Where weights are sharded
                every rank must call.

        Raises:
            ValueError: one has changed; it is named. Right after an update there is nothing to compare with: the
                fingerprint is taken instead.
        """
        if self.freed:
            return
        self.follow_policy()
        if self._recorded is None:
            self.fingerprint()
            return
        names = sorted(self.digests)
        if count is not None:
            start, self._verified = self._verified % len(names), self._verified + count
            names = [*names, *names][start : start + min(count, len(names))]
        chosen = set(names)
        found = digests(w for w in self.weights() if w.name in chosen)
        if changed := [name for name, digest in found.items() if digest != self.digests[name]]:
            raise ValueError(
                f"The reference changed though nothing was to update it: {changed[0]} is another "
                f"({len(changed)} of the {len(found)} weights looked at)."
            )

    @property
    def one_sweep(self) -> bool:
        """Whether a score moves all weights to the device and takes any number of sequences: give it whole rollout
        batches, not micro-batches."""
        return False

    @property
    def recorded_fingerprint(self) -> str | None:
        """The fingerprint when it was last taken, which scores carry; None from an update until it is taken again."""
        return self._recorded

    def _home(self) -> torch.device:
        """Where the accelerator has models run; without one, a CPU."""
        return torch.device("cpu") if self._accelerator is None else self._accelerator.device

    def memory(self) -> MemoryReport:
        """Bytes that the reference adds on this rank, averages included."""
        held, averages = self.memory_of_weights(), self._averages.memory(self._home())
        return MemoryReport(device=held.device + averages.device, host=held.host + averages.host)

    def memory_of_weights(self) -> MemoryReport:
        """Bytes of its weights on this rank."""
        return MemoryReport(device=0, host=0)

    def save(self, folder: str | Path) -> None:
        """Write the reference's own weights (safetensors) and provenance (JSON) into `folder`.

        Of weights that it shares with the policy, such as an adapter's base, the provenance has digests, which `load`
        compares. The folder takes its name once it is whole, also in the place of one that was saved before. Where
        weights are sharded every rank must call, and writes its own parts; else rank 0 writes, and the others may call.

        Raises:
            ValueError: the weights were freed; the folder holds other files.
        """
        self._check_held("be saved")
        self._check_whole()
        own = [weight for weight in self.weights() if self.owns(weight.name)]

        def record() -> dict[str, Any]:
            averages = digests(self._averages.weights())
            scalings = {layer.b: layer.scaling for layer in self.lora_layers()}
            kept = {"averages": averages, "first": self._initial_fingerprint, "scalings": scalings}
            return {**self.provenance(), "weights": self.digests, **kept}

        write_saved(Path(folder), [*own, *self._averages.weights()], record)

    def load(self, folder: str | Path) -> None:
        """Take over what `save` wrote, whatever strategy and number of ranks wrote it; every rank calls, and reads its
        own copy or part.

        The rank of its LoRA layers may be another than the policy's.

        Raises:
            ValueError: no saved reference there; a weight that is not as it was saved; names, shapes or dtypes that
                differ from this reference's; a weight that the policy shares and that is another there; a LoRA layer
                of another rank that was not saved with this one's scaling. Nothing is changed then.
        """
        self._check_held("be loaded into")
        saved = Saved(Path(folder))
        self.follow_policy()
        self.fingerprint()
        layouts = {weight.name: weight.layout for weight in self.weights()}
        devices = {weight.name: weight.local.device for weight in self.weights()}
        shapes = {name: layout.shape for name, layout in layouts.items()}
        recorded = {name: saved.shapes.get(name, shapes.get(name, torch.Size())) for name in saved.digests}
        layers = [layer for layer in self.lora_layers() if layer.b in layouts]
        free = {name: dim for name, dim in rank_dims(layers).items() if not layouts[name].sharded}
        check_pairs(recorded, shapes, "the saved reference", free)
        other = {name for name, shape in saved.shapes.items() if shape != shapes[name]}
        check_scalings(layers, saved.provenance.get("scalings", {}), other)
        layouts |= {name: Whole(saved.shapes[name]) for name in other}
        changed = saved.changed(self.digests, self.owns, layouts)
        self.before_writing()
        self._half_moved = True
        if other:
            own = {weight.name: weight.local for weight in self.weights()}
            self.replace_weights({name: own[name].new_empty(saved.shapes[name]) for name in other})
        saved.copy_into(weight for weight in self.weights() if weight.name in changed)
        self._averages.load(saved.averages(layouts), devices)
        self.updates, self.last_update = int(saved.provenance["updates"]), None
        self._initial_fingerprint, self._half_moved = self._recalled_first(saved.provenance.get("first")), False
        loaded = self.fingerprint()
        assert loaded == saved.provenance["fingerprint"], "every weight was compared before it was written"

    def provenance(self) -> dict[str, Any]:
        """What to record of this reference: strategy, reason, source, updates, fingerprint (collective if sharded), and
        the versions of the libraries."""
        return {
            "strategy": self.strategy,
            "reason": self.reason,
            "source": self.source,
            "updates": self.updates,
            # What it was when recorded: taking it anew would approve of a change.
            "fingerprint": self.recorded_fingerprint or self.fingerprint(),
            "versions": library_versions(),
        }


def held_in_place(request: BuildRequest) -> str | None:
    """A sentence for a strategy that makes a copy, where the reference is the policy's bare base, which needs none."""
    if request.config.source == "base":
        return "reference.source is 'base': the policy holds that itself, and strategy 'adapter' needs no copy of it."
    if request.config.source == "policy" and (prompt := learned_prompt(request.policy)) is not None:
        return (
            f"a learned prompt ({prompt.kind}) is no part of the reference, which is the bare base without it: the "
            "policy holds that itself, and strategy 'adapter' needs no copy of it."
        )
    return None
