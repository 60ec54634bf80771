"""TokenBatch and its neighbours: what is refused, and what a mask becomes."""

import pytest
import torch
from support.models import batch

from refkl import MemoryReport, TokenBatch

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
SCORED = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])


def test_completion_mask_is_kept_as_bool():
    tokens = TokenBatch(IDS, REAL, SCORED)
    assert tokens.completion_mask.dtype == torch.bool and torch.equal(tokens.completion_mask, SCORED == 1)
    assert len(tokens) == 2


def test_a_first_token_is_never_scored_wherever_the_padding_is():
    right = TokenBatch(IDS, REAL, REAL)
    assert right.completion_mask.tolist() == [[False, True, True, True], [False, True, False, False]]
    left = TokenBatch(IDS.flip(1), REAL.flip(1), REAL.flip(1))
    assert left.completion_mask.tolist() == [[False, True, True, True], [False, False, False, True]]


def test_the_mask_that_was_passed_is_left_as_it_was():
    scored = REAL.bool()
    TokenBatch(IDS, REAL, scored)
    assert torch.equal(scored, REAL.bool())


def test_scoring_padding_names_the_place():
    with pytest.raises(ValueError, match=r"row 1, column 2 has attention_mask 0.*completion_mask & attention_mask"):
        TokenBatch(IDS, REAL, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids must be \[B, T\], got shape \[4\]"),
        ({"input_ids": IDS.float()}, r"integer token ids, got dtype torch.float32"),
        ({"input_ids": IDS.bool()}, r"integer token ids, got dtype torch.bool"),
        ({"attention_mask": REAL[:, :3]}, r"attention_mask has shape \[2, 3\] but input_ids has shape \[2, 4\]"),
        ({"completion_mask": SCORED[:1]}, r"completion_mask has shape \[1, 4\] but input_ids"),
        ({"position_ids": torch.arange(4)}, r"position_ids has shape \[4\] but input_ids"),
        ({"model_inputs": {"labels": IDS}}, r"may not hold \['labels'\]"),
        ({"model_inputs": {"position_ids": IDS, "input_ids": IDS}}, r"may not hold \['input_ids', 'position_ids'\]"),
        ({"model_inputs": {"attention_mask": REAL}}, r"may not hold \['attention_mask'\]"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenBatch(**{"input_ids": IDS, "attention_mask": REAL, "completion_mask": SCORED, **changes})


@pytest.mark.parametrize("name", ["use_cache", "logits_to_keep"])
def test_what_refkl_passes_itself_is_refused_in_model_inputs(name):
    with pytest.raises(ValueError, match=rf"may not hold \['{name}'\]"):
        TokenBatch(IDS, REAL, SCORED, model_inputs={name: 0})


def test_to_takes_everything_along():
    tokens = batch(
        (4, 3),
        position_ids=torch.arange(8).view(2, 4),
        model_inputs={"pixel_values": torch.ones(2, 5), "interpolate": True, "sizes": [(1, 2)]},
    )
    moved = tokens.to("cpu")
    for name in ("input_ids", "attention_mask", "completion_mask", "position_ids"):
        assert torch.equal(getattr(moved, name), getattr(tokens, name))
    assert torch.equal(moved.model_inputs["pixel_values"], torch.ones(2, 5))
    assert moved.model_inputs["interpolate"] is True and moved.model_inputs["sizes"] == [(1, 2)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_moves_everything():
    moved = batch((4, 3), position_ids=torch.ones(2, 4), model_inputs={"pixel_values": torch.ones(2, 5)}).to("cuda")
    tensors = [moved.input_ids, moved.attention_mask, moved.completion_mask, moved.position_ids]
    assert all(t.is_cuda for t in [*tensors, moved.model_inputs["pixel_values"]])


def test_memory_adds_up():
    assert MemoryReport(device=3, host=4).total == 7
