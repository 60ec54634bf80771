"""What a cached score depends on, besides the weights and the row's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import llama

from refkl import TokenBatch
from refkl.reference.cached.row_keys import describe
from refkl.reference.cached.score_cache import rows_of


def test_an_adapter_that_is_on_is_described_and_one_that_is_off_is_not() -> None:
    def made(**options: Any) -> Any:
        return get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options))

    policy = made(r=4)
    found = describe(policy)
    assert found["peft"]["default"]["r"] == 4 and found["adapters"]
    assert describe(made(r=4)) == found != describe(made(r=2, lora_alpha=4))
    assert "base_model_name_or_path" not in found["peft"]["default"]
    with policy.disable_adapter():
        off = describe(policy)
    assert "peft" not in off and "adapters" not in off


@pytest.mark.parametrize(("rows", "columns"), [([0], (2, 5)), ([1], (0, 4)), ([0, 1], (0, 5)), ([2], (3, 4))])
def test_rows_are_cut_to_their_tokens(rows: list[int], columns: tuple[int, int]) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]])
    ids = torch.arange(18).view(3, 6)
    positions = ids + 100
    batch = TokenBatch(ids, mask, mask, positions, {"kinds": ids + 200, "name": "same for all"})
    found = rows_of(batch, rows)
    cut = slice(*columns)
    assert torch.equal(found.input_ids, ids[rows, cut]) and torch.equal(found.attention_mask, mask[rows, cut])
    assert found.position_ids is not None and torch.equal(found.position_ids, positions[rows, cut])
    assert torch.equal(found.model_inputs["kinds"], ids[rows, cut] + 200)
    assert found.model_inputs["name"] == "same for all"
