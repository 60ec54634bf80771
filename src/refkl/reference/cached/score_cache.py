"""`reference.cache`: a row that was scored once is not scored again, by this process or another, now or in a later run.

A row's key includes everything on which its scores depend: the reference's fingerprint, how the model computes
(`describe`), the temperature, the row's tokens, the mask of scored tokens, and the other inputs of the model. Padding
is not included.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from refkl.backend.layout import communicating_device
from refkl.messages import size
from refkl.reference.cached.row_keys import row_keys
from refkl.reference.cached.score_files import Row, ScoreStore
from refkl.types import TokenBatch, TokenScores

FORMAT = 1
"""Version of the cache. Increase it when refkl's scores or the contents of a file change."""


@dataclass(frozen=True)
class CacheStats:
    """Counts of a cache: its work in this process, and the scores that it holds of the reference's present state."""

    hits: int
    """Rows that were looked up, without running a model."""
    misses: int
    """Rows that the reference scored."""
    rows: int
    """Rows that the cache holds."""
    bytes: int
    """Bytes on disk of the files that were read."""

    def __str__(self) -> str:
        return f"{self.hits} rows from the cache, {self.misses} scored; it holds {self.rows} rows, {size(self.bytes)}"


class ScoreCache:
    """Scores of a reference in a folder, which other processes may use at the same time.

    Raises:
        ValueError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"reference.cache {str(folder)!r} cannot be a folder: {error}.") from None
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"reference.cache {str(folder)!r} cannot be written to. Name a folder that can.")
        self._store: ScoreStore | None = None
        self._about: dict[str, Any] = {}
        self._hits = self._misses = 0

    @property
    def stats(self) -> CacheStats:
        """Hits, misses, rows and bytes so far."""
        rows, held = (0, 0) if self._store is None else (len(self._store), self._store.bytes)
        return CacheStats(self._hits, self._misses, rows, held)

    def write(self) -> None:
        """Write rows that are not on disk yet. This also happens every half minute of scoring and when the process
        ends."""
        if self._store is not None:
            self._store.write()

    def score(
        self,
        batch: TokenBatch,
        about: dict[str, Any],
        run: Callable[[TokenBatch], TokenScores] | None,
        *,
        temperature: float,
        entropy: bool,
        together: bool,
    ) -> TokenScores:
        """Return the scores of a batch. `run` scores the rows that are not in the cache.

        Args:
            batch: the sequences to score.
            about: the reference and how it computes: `describe`, its fingerprint, the autocast.
            run: scores a batch; None if the weights were freed.
            temperature, entropy: as in Reference.score.
            together: True if the weights are sharded, so that either all ranks run or none.

        Raises:
            ValueError: a row is not in the cache and `run` is None; model_inputs belong to no row.
        """
        store = self._open(about)
        keys = row_keys(batch, temperature, entropy)
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
        rows = store.find(first, scan=run is None)
        missing = sorted(row for key, row in first.items() if key not in rows)
        if run is None and missing:
            raise ValueError(self._not_there(batch, missing, temperature, entropy))
        if run is not None and (_on_any_rank(bool(missing)) if together else missing):
            part = rows_of(batch, missing) if missing else _nothing(batch.input_ids.device)
            scores = run(part).to("cpu")
            fresh = {}
            for place, mask in enumerate(part.completion_mask.cpu()[: len(missing)]):
                key = keys[missing[place]]
                assert key is not None, "only rows with a key are missed"
                entropies = scores.logp.new_empty(0) if scores.entropy is None else scores.entropy[place][mask]
                fresh[key] = Row(scores.logp[place][mask].numpy(), entropies.numpy())
            store.add(fresh)
            rows |= fresh
        self._misses += len(missing)
        self._hits += sum(key is not None for key in keys) - len(missing)
        found = [rows[key] for key in keys if key is not None]
        return TokenScores(
            logp=_spread([row.logp for row in found], batch),
            entropy=_spread([row.entropy for row in found], batch) if entropy else None,
            temperature=temperature,
        )

    def _open(self, about: dict[str, Any]) -> ScoreStore:
        if self._store is None or about != self._about:
            self.write()
            about = {"format": FORMAT, **about}
            name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
            self._store = ScoreStore(self.folder / name, about)
            self._about = {k: v for k, v in about.items() if k != "format"}
        return self._store

    def _not_there(self, batch: TokenBatch, missing: list[int], temperature: float, entropy: bool) -> str:
        row = missing[0]
        tokens, scored = (int(mask[row].sum()) for mask in (batch.attention_mask.bool(), batch.completion_mask))
        return (
            f"The reference's weights were freed, and row {row} ({tokens} tokens, {scored} of them scored, at "
            f"temperature {temperature:g}, {'with' if entropy else 'without'} entropies) is not in the cache "
            f"{self.folder}; {len(missing)} of the batch's {len(batch)} rows are missing. Fill the cache with all rows "
            "that will be scored, at that temperature, or do not free the weights."
        )


def rows_of(batch: TokenBatch, rows: list[int]) -> TokenBatch:
    """Return some rows of a batch, without the columns at either end that are padding in all of these rows."""
    if len(rows) == len(batch):
        return batch
    columns = batch.attention_mask[rows].bool().any(0).nonzero()[:, 0]
    cut = slice(int(columns[0]), int(columns[-1]) + 1)
    return TokenBatch(
        batch.input_ids[rows, cut],
        batch.attention_mask[rows, cut],
        batch.completion_mask[rows, cut],
        None if batch.position_ids is None else batch.position_ids[rows, cut],
        {k: v[rows, cut] if isinstance(v, Tensor) else v for k, v in batch.model_inputs.items()},
    )


def _nothing(device: torch.device) -> TokenBatch:
    """Return the smallest batch without scored tokens, for a rank that runs only because others do."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=device)
    return TokenBatch(ids, torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool))


def _spread(values: list[np.ndarray[Any, Any]], batch: TokenBatch) -> Tensor:
    """Return [B, T]: the rows' values at the scored tokens, 0.0 elsewhere."""
    flat = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *values]))
    mask = batch.completion_mask
    return torch.zeros(mask.shape, dtype=flat.dtype, device=mask.device).masked_scatter(mask, flat.to(mask.device))


def _on_any_rank(yes: bool) -> bool:
    flag = torch.tensor(float(yes), device=communicating_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def each(batches: Iterable[TokenBatch], *, together: bool) -> Iterator[TokenBatch]:
    """Yield the batches, with a progress bar in a terminal. If ranks run together, a rank without further batches
    yields empty ones until no rank has any."""
    console = Console(stderr=True)
    main = not dist.is_initialized() or dist.get_rank() == 0
    columns = TextColumn("scoring the reference"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not (main and console.is_terminal)) as bar:
        task = bar.add_task("", total=len(batches) if isinstance(batches, Sized) else None)
        remaining = iter(batches)
        while True:
            batch = next(remaining, None)
            if not (_on_any_rank(batch is not None) if together else batch is not None):
                return
            yield _nothing(communicating_device()) if batch is None else batch
            bar.advance(task)
