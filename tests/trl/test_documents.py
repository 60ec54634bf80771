"""Documents that TRL lays in one row (packing, padding_free) are scored apart."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.models import byte_tokenizer, gpt2, llama, qwen2
from support.trl_runs import COMMON, logged
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer

from refkl import KLConfig
from refkl.trl import KLSFTTrainer
from refkl.trl.documents import rows_of

TEXTS = [("hello", " there, you"), ("a", "bc"), ("what is", " it?"), ("hi", " good morning to all"), ("x", "yz")] * 4
PACKED = [
    {"packing": True, "packing_strategy": "bfd", "max_length": 40},
    {"packing": True, "packing_strategy": "bfd_split", "max_length": 12},
    {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
]


def sft(cls: type, model: Any, folder: Path, options: dict[str, Any], **more: Any) -> Any:
    own = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "optim": "sgd", "max_grad_norm": 1e9}
    own |= {"train_sampling_strategy": "sequential", "max_steps": 3}
    args = SFTConfig(str(folder / "run"), **{**COMMON, **own, **options})
    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in TEXTS])
    more = {"eval_dataset": data.select(range(5)), **more}
    return cls(model, args=args, train_dataset=data, processing_class=byte_tokenizer(), **more)


@pytest.mark.parametrize("maker", [llama, gpt2, qwen2])
@pytest.mark.parametrize("options", PACKED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_train_as_in_trl(maker: Any, options: dict[str, Any], attention: str, tmp_path: Path) -> None:
    """transformers keeps the documents of a row apart too, by their positions, so TRL's own numbers are right here."""
    torch.manual_seed(2)
    start = maker()
    start.set_attn_implementation(attention)
    options = {**options, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    runs = []
    for cls, more in ((SFTTrainer, {}), (KLSFTTrainer, {"kl": KLConfig(coef=0.0)})):
        trainer = sft(cls, copy.deepcopy(start), tmp_path, options, **more)
        trainer.train()
        runs.append(trainer)
    for key in ("loss", "eval_loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_entropy"):
        assert logged(runs[1], key) == pytest.approx(logged(runs[0], key), rel=1e-5, abs=1e-6), key
    kl = logged(runs[1], "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-9) and kl[-1] > 1e-5


@pytest.mark.parametrize("kl_on", ["labels", "all"])
@pytest.mark.parametrize("options", PACKED[::2])
@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}])
def test_the_kl_of_a_packed_row_is_that_of_its_documents(
    kl_on: Any, options: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    """Against a plain dense computation, one document at a time; another document in the row changes nothing."""
    policy = llama()
    first = copy.deepcopy(policy).eval()
    trainer = sft(KLSFTTrainer, policy, tmp_path, options | more, kl=KLConfig(coef=0.5), kl_on=kl_on)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.3)
    inner = trainer.data_collator.collator
    examples = [trainer.train_dataset[i] for i in range(2)]
    flat = inner([{"input_ids": e["input_ids"], "labels": e["labels"], **_lengths(e)} for e in examples])
    starts = [*(flat["position_ids"][0] == 0).nonzero().flatten().tolist(), flat["input_ids"].shape[1]]
    assert len(starts) > 3
    kls, terms = [], []
    for begin, end in itertools.pairwise(starts):
        ids, labels = flat["input_ids"][:, begin:end], flat["labels"][:, begin:end]
        if end - begin < 2:
            continue
        own, ref = (model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in (policy, first))
        counted = labels[0, 1:] != -100
        kl = (own.exp() * (own - ref)).sum(-1)
        kls.append(kl if kl_on == "all" else kl[counted])
        smooth = more.get("label_smoothing_factor", 0.0)
        terms.append(F.cross_entropy(own[counted], labels[0, 1:][counted], label_smoothing=smooth, reduction="none"))
    expected = torch.cat(terms).mean() + 0.5 * torch.cat(kls).mean()
    policy.eval()
    found = trainer.compute_loss(policy, trainer._prepare_inputs(trainer.data_collator(examples)))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def _lengths(example: dict[str, Any]) -> dict[str, Any]:
    return {"seq_lengths": example["seq_lengths"]} if "seq_lengths" in example else {}


def test_a_row_is_taken_apart() -> None:
    flat = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 4, 0, 0]]),
        "labels": torch.tensor([[-100, 6, 7, -100, 9, -100, -100, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]]),
        "max_length_q": 3,
    }
    rows = rows_of(flat, pad_token_id=1)
    assert rows["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert rows["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert rows["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert rows_of(rows, 1) is rows
    with pytest.raises(ValueError, match="also pixel_values"):
        rows_of({**flat, "pixel_values": torch.zeros(1)}, 1)
    alone = rows_of({name: value[:, 5:] for name, value in flat.items() if name != "max_length_q"}, 1)
    assert alone["input_ids"].tolist() == [[4]]
