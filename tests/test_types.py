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


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_a_batch_without_tokens_is_refused(shape):
    ids = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"shape \[{shape[0]}, {shape[1]}\], so the batch holds no token"):
        TokenBatch(ids, ids, ids)


def test_an_unknown_prefix_is_refused():
    with pytest.raises(ValueError, match="Unknown prefix 'on'"):
        TokenBatch(IDS, REAL, SCORED, prefix="on")


@pytest.mark.parametrize("name", ["attention_mask", "completion_mask"])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.long, 2),
        (torch.long, -1),
        (torch.uint8, 255),
        (torch.int8, -1),
        (torch.float32, 0.5),
        (torch.float32, -1.0),
        (torch.float32, float("nan")),
        (torch.bfloat16, float("inf")),
    ],
)
def test_a_mask_holds_only_0_and_1(name, dtype, value):
    masks = {"attention_mask": REAL, "completion_mask": SCORED}
    wrong = masks[name].to(dtype, copy=True)
    wrong[0, 2] = value
    with pytest.raises(ValueError, match=rf"{name} must hold 0 and 1.*row 0, column 2 is {value}"):
        TokenBatch(IDS, **{**masks, name: wrong})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.long, torch.float32, torch.bfloat16])
def test_a_mask_of_any_dtype_means_the_same(dtype):
    tokens = TokenBatch(IDS, REAL.to(dtype), SCORED.to(dtype))
    assert torch.equal(tokens.completion_mask, SCORED.bool())
    assert tokens.attention_mask.dtype == dtype  # the model gets what was passed


def test_a_batch_waits_for_its_device_once(monkeypatch):
    """Each bool() of a tensor on a GPU waits for it: all checks of values share one."""
    calls = []
    whole = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: calls.append(self) or whole(self))
    TokenBatch(IDS, REAL, SCORED)
    assert len(calls) == 1


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
