"""A batch too large for one forward is scored in parts, and the scores are those of the whole, in its order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import llama, shared_batch

from refkl import ReferenceConfig, TokenBatch, build_reference, score_tokens
from refkl.scoring import in_parts as budget
from refkl.scoring import prepare
from refkl.scoring.in_parts import free_tokens, parts

ROWS = ((0, 5), (1, 3), (0, 2), (1, 6), (0, 1), (2, 4), (1, 9), (2, 2))
LENGTHS = (7, 4, 12)


def real(batch: TokenBatch) -> int:
    return int(batch.attention_mask.sum())


@pytest.mark.parametrize("prefix", ["auto", "off"])
@pytest.mark.parametrize("limit", [1, 14, 25, 40, 100, 1000])
@pytest.mark.parametrize("left", [True, False])
def test_parts_hold_each_row_once_and_no_more_than_they_may(prefix: Any, limit: int, left: bool) -> None:
    batch = shared_batch(ROWS, LENGTHS, left=left, prefix=prefix)
    cut = list(parts(batch, limit, shares=prefix == "auto"))
    assert sorted(row for rows, _ in cut for row in rows.tolist()) == list(range(len(ROWS)))
    for rows, part in cut:
        prompts = {ROWS[row][0] for row in rows.tolist()}
        shared = sum(LENGTHS[p] for p in prompts) + sum(ROWS[row][1] for row in rows.tolist())
        count = shared if prefix == "auto" else part.input_ids.numel()
        assert count <= limit or len(rows) == 1 or len(cut) == 1
        if len(cut) > 1:  # what no row of a part has is cut off
            assert part.attention_mask.any(0).all()
        for row, ids, mask in zip(rows.tolist(), part.input_ids, part.attention_mask.bool(), strict=True):
            assert torch.equal(ids[mask], batch.input_ids[row][batch.attention_mask[row].bool()])
    assert (len(cut) == 1) == (limit >= (real(batch) if prefix == "auto" else batch.input_ids.numel()))


def test_a_prompt_counts_once_in_a_part() -> None:
    batch = shared_batch([(0, 2)] * 4 + [(1, 2)] * 4, (12, 12))
    assert [rows.tolist() for rows, _ in parts(batch, 20, shares=True)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_little_is_filled_up() -> None:
    """Lengths as answers have them, log-normal: in parts of 4096 tokens under 10 % of what is run is padding."""
    source = torch.Generator().manual_seed(0)
    lengths = (torch.randn(256, generator=source) * 0.8 + 5.0).exp().clamp(8, 1500).int().tolist()
    ids = torch.randint(2, 250, (256, max(lengths)), generator=source)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = TokenBatch(ids, mask, mask, prefix="off")
    cut = [part for _, part in parts(batch, 4096, shares=False)]
    given = sum(part.input_ids.numel() for part in cut)
    assert given < 1.1 * sum(lengths) < 0.5 * ids.numel()
    # In one row there is none at all.
    scored = mask.clone()
    scored[:, 0] = False
    one = prepare(llama(max_position_embeddings=2048), TokenBatch(ids, mask, scored)).packed
    assert one is not None and one.tokens <= sum(lengths)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("strategy", ["clone", "swap"])
def test_scores_in_parts_are_those_of_the_whole(strategy: str, left: bool) -> None:
    policy = llama()
    with torch.no_grad():
        policy.lm_head.weight += 0.1
    batch = shared_batch(ROWS, LENGTHS, left=left)
    whole = score_tokens(policy, shared_batch(ROWS, LENGTHS, left=left, prefix="off"), entropy=True)
    reference = build_reference(policy, ReferenceConfig(strategy=strategy, max_tokens=20))
    forwards: list[int] = []
    model: Any = policy if strategy == "swap" else reference.model
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: forwards.append(args[0].numel()))
    reference.score(batch)  # before the first score, rows are tried
    forwards.clear()
    found = reference.score(batch, entropy=True, hidden=True)
    looked = [n for n in forwards if n > 2]  # but for two tokens on which the head is found
    assert len(looked) == len(list(parts(batch, 20, shares=True))) > 2 and max(looked) <= 20
    torch.testing.assert_close(found.logp, whole.logp.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy, whole.entropy.detach(), rtol=0, atol=1e-5)
    hidden = build_reference(policy, strategy).score(batch, hidden=True).hidden
    torch.testing.assert_close(found.hidden, hidden, rtol=0, atol=1e-5)


def test_the_limit_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = llama()
    monkeypatch.setattr(budget, "free_bytes", lambda device: 4 * 4 * (10 * 32 + 4 * 64) * 30)
    assert free_tokens(policy, torch.device("cpu")) == 30
    seen: list[int] = []
    reference = build_reference(policy, "clone")
    reference.model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    for _ in range(2):  # before the first score, rows are tried
        seen.clear()
        reference.score(shared_batch(ROWS, LENGTHS))
    assert max(seen) <= 30 and len([n for n in seen if n > 2]) == len(
        list(parts(shared_batch(ROWS, LENGTHS), 30, shares=True))
    )


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reference.max_tokens must be at least 1, got 0"):
        ReferenceConfig(max_tokens=0)


@pytest.mark.parametrize("strategy", ["clone", "swap"])
def test_padding_that_all_rows_have_is_in_the_scores_too(strategy: str) -> None:
    """A batch over the limit may fit in one part without that padding."""
    policy = llama()
    ids, mask = torch.full((2, 30), 7), torch.zeros(2, 30, dtype=torch.long)
    mask[:, 12:20] = 1
    scored = mask.bool() & (torch.arange(30) >= 15)
    batch = TokenBatch(ids, mask, scored, prefix="off")
    reference = build_reference(policy, ReferenceConfig(strategy=strategy, max_tokens=20))
    found = reference.score(batch, entropy=True, hidden=True)
    whole = build_reference(policy, strategy).score(batch, entropy=True, hidden=True)
    for name in ("logp", "entropy", "hidden"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))
