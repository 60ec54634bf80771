"""`refkl compare`: what the command prints and leaves behind, and for each wrong input an error that helps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import plain
from support.comparisons import SIZES, dense, frozen, random_texts
from support.models import byte_tokenizer, llama
from support.train_inputs import model_folder, write_config
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from refkl.cli import compare_folder, main
from refkl.compare import Comparison, Text, compare_models, hold, load_checkpoint
from refkl.messages import RunError


def folders(folder: Path) -> tuple[str, str]:
    """Two models of one tokenizer, as train_inputs makes them."""
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        model_folder(folder / name)
    return str(folder / "a"), str(folder / "b")


def data(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIRS = [{"prompt": f"say {word}", "chosen": f" {word}!", "rejected": "no"} for word in ("yes", "hello", "that", "mm")]


def test_the_command_on_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = folders(tmp_path)
    output = tmp_path / "found" / "here"
    options = ["--samples-per-prompt", "2", "--max-new-tokens", "6", "--kind", "reverse_kl,tv", "--output", str(output)]
    assert main(["compare", one, two, "--data", data(tmp_path, PAIRS), "--sample", *options, "--top", "3"]) == 0
    printed = capsys.readouterr()
    assert "8 sequences of" in printed.out and "intervals over 4 prompts" in printed.out
    assert "k1 (sampled)" in printed.out and f"written to {output}" in printed.err
    assert sorted(p.name for p in output.iterdir()) == ["compare.json", "compare.png", "tokens.jsonl"]
    assert (output / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in output.parent.iterdir()) == ["here"]

    record = json.loads((output / "compare.json").read_text())
    lines = [json.loads(line) for line in (output / "tokens.jsonl").read_text().splitlines()]
    values = [value for line in lines for value in line["divergence"]["reverse_kl"]]
    result = record["results"]["reverse_kl"]
    assert result["per_token"]["mean"] == pytest.approx(np.mean(values)) and result["exact"]
    assert result["per_sequence"]["mean"] == pytest.approx(sum(values) / 8) and result["largest"] == max(values)
    assert result["per_token"]["low"] < result["per_token"]["mean"] < result["per_token"]["high"]
    assert f"{result['per_token']['mean']:.4g}" in printed.out
    ratios = [ratio for line in lines for ratio in line["log_ratio"]]
    assert record["results"]["k1"]["per_token"]["mean"] == pytest.approx(np.mean(ratios), rel=1e-6)
    assert (record["sequences"], record["tokens"], record["units"]) == (8, len(values), {"of": "prompt", "count": 4})
    assert [(line["row"], line["sample"]) for line in lines] == [(row, sample) for row in range(4) for sample in (0, 1)]
    assert all(len(line["tokens"]) == len(line["token_ids"]) == len(line["log_ratio"]) for line in lines)
    assert lines[0]["prompt"] == "say yes" and record["settings"]["seed"] == 0
    assert len(record["by_token"]["tv"]) == 3 and record["by_position"]["tv"][0]["first"] == 1
    assert record["versions"]["refkl"] and record["policy"]["fingerprint"] != record["reference"]["fingerprint"]

    texts = [Text(0, "", line["prompt_ids"], line["token_ids"]) for line in lines]
    models = [load_checkpoint(path).model for path in (one, two)]
    for line, text in zip(lines, texts, strict=True):
        exact = plain.divergence(*(dense(model, text) for model in models), "reverse_kl")
        np.testing.assert_allclose(line["divergence"]["reverse_kl"], exact.numpy(), rtol=1e-4, atol=1e-6)

    assert main(["compare", one, two, "--data", data(tmp_path, PAIRS), "--output", str(output)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_command_on_given_text_and_a_checkpoint_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    long = [*PAIRS, {"prompt": "x" * 125, "chosen": "yyyyyy", "rejected": ""}]
    assert main(["compare", one, one, "--data", data(tmp_path, long)]) == 0
    assert "1 row was cut to 128 tokens" in capsys.readouterr().err
    record = json.loads((tmp_path / "compare-a-a" / "compare.json").read_text())
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
    found = {"exact": True, "largest": 0.0, "per_token": zero, "per_sequence": zero}
    assert record["results"] == {"reverse_kl": found}
    stamp = hold(load_checkpoint(one).model).fingerprint()
    assert record["policy"]["fingerprint"] == record["reference"]["fingerprint"] == stamp
    assert (record["data"]["scored"], record["data"]["truncated"], record["units"]["of"]) == ("chosen", 1, "sequence")
    assert record["tokens"] == sum(len(row["chosen"]) for row in PAIRS) + 3
    assert (tmp_path / "compare-a-a" / "compare.png").stat().st_size > 1000

    texts = data(tmp_path, [{"text": "hello there"}, {"text": "a"}, {"text": "ab"}])
    assert main(["compare", one, two, "--data", texts, "--batch-size", "1", "--kind", "renyi", "--order", "0.5"]) == 0
    record = json.loads((tmp_path / "compare-a-b" / "compare.json").read_text())
    assert (record["tokens"], record["data"]["left_out"]) == (11, 1)
    assert record["results"]["renyi"]["per_token"]["mean"] > 0


def test_an_adapter_and_the_folder_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    config = write_config(tmp_path, "dpo", peft=lora, trainer={"max_steps": 1, "learning_rate": 0.05})
    assert main(["train", str(config)]) == 0
    run, start = str(tmp_path / "run"), str(tmp_path / "model")
    both = ["--data", str(tmp_path / "data.jsonl"), "--limit", "2", "--output"]
    assert main(["compare", run, start, *both, str(tmp_path / "one")]) == 0
    assert main(["compare", start, run, "--kind", "forward_kl", *both, str(tmp_path / "two")]) == 0
    assert main(["compare", f"{run}/model", run, *both, str(tmp_path / "same")]) == 0
    one, two, same = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("one", "two", "same"))
    assert one["policy"]["base"] == start and one["policy"]["folder"] == str(tmp_path / "run" / "model")
    mean = one["results"]["reverse_kl"]["per_token"]["mean"]
    assert mean > 1e-6
    assert two["results"]["forward_kl"]["per_token"]["mean"] == pytest.approx(mean, rel=1e-3)  # the two exchanged
    assert same["results"]["reverse_kl"]["largest"] == 0.0

    adapter = tmp_path / "run" / "model"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    torch.manual_seed(0)
    model_folder(tmp_path / "wide", hidden_size=64)
    for base, said in ((str(tmp_path / "gone"), "the adapter's base model .* cannot be loaded"),
                       (str(tmp_path / "wide"), "does not fit its base model")):  # fmt: skip
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        assert main(["compare", run, start, *both, str(tmp_path / "three")]) == 2
        assert re.search(said, capsys.readouterr().err)


def wrong_vocabulary(folder: Path) -> str:
    llama(vocab_size=300).save_pretrained(folder / "wide")
    byte_tokenizer().save_pretrained(folder / "wide")
    return str(folder / "wide")


def wrong_tokens(folder: Path) -> str:
    llama().save_pretrained(folder / "other")
    tokenizer = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    changed = Tokenizer.from_str(json.dumps(tokenizer))
    PreTrainedTokenizerFast(tokenizer_object=changed, pad_token="<pad>").save_pretrained(folder / "other")
    return str(folder / "other")


def headless(folder: Path) -> str:
    llama(tie_word_embeddings=False).model.save_pretrained(folder / "headless")
    return str(folder / "headless")


WRONG: dict[str, tuple[list[str], Callable[[Path], str] | None, str]] = {
    "missing model": ([], lambda _: "nowhere", "The model 'nowhere' cannot be loaded"),
    "empty folder": ([], lambda folder: str(folder), r"holds no model \(config.json\)"),
    "a file": ([], lambda folder: str(folder / "data.jsonl"), "is a file"),
    "no head": ([], headless, "lacks 1 weights that LlamaForCausalLM has, such as lm_head.weight"),
    "another width": ([], wrong_vocabulary, "has 258 logits and .* 300"),
    "another token map": ([], wrong_tokens, "differ in 2 of 258 tokens: 'A' is number"),
    "missing data": (["--data", "no.jsonl"], None, "--data: there is no file no.jsonl"),
    "a table of less than nothing": (["--top=-3"], None, "--top must be at least 1, got -3"),
    "a count below one": (["--min-count", "0"], None, "--min-count must be at least 1, got 0"),
    "unknown kind": (["--kind", "reverse_k"], None, "Did you mean 'reverse_kl'"),
    "no kind": (["--kind", ","], None, "No kind of divergence"),
    "order without use": (["--order", "0.5"], None, "order is for amari"),
    "order missing": (["--kind", "renyi"], None, "renyi needs a finite order"),
    "jsd weight without use": (["--jsd-weight", "0.5"], None, "--jsd-weight is for --kind jsd"),
    "samples that are not drawn": (["--max-new-tokens", "4"], None, "--max-new-tokens is for samples"),
    "no room": (["--max-length", "1"], None, "--max-length must be at least 2"),
    "no batch": (["--batch-size", "0"], None, "batch_size must be at least 1"),
    "unknown dtype": (["--dtype", "int8"], None, "dtype is 'int8'"),
    "no such device": (["--device", "gpu"], None, "--device 'gpu' is not a device"),
    "a cold sample": (["--sample", "--temperature", "0"], None, "at 0 there is no distribution"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, other, message = WRONG[case]
    one = str(model_folder(tmp_path / "a"))
    given = ["--data", data(tmp_path, PAIRS), "--output", str(tmp_path / "out"), *options]
    assert main(["compare", one, other(tmp_path) if other else one, *given]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"completion": "a"}], r"The data needs 'prompt' .*; it has the columns \['completion'\]"),
        ([{"prompt": "a", "completion": ""}], "No token of the data can be scored: 1 rows"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "Row 1 of the data has no 'completion'"),
        ([], "is empty"),
    ],
)
def test_wrong_data_is_named(
    rows: list[dict[str, Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(model_folder(tmp_path / "a"))
    assert main(["compare", one, one, "--data", data(tmp_path, rows), "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = frozen(llama())
    found = compare_models(policy, hold(policy), random_texts(SIZES))

    def full(found: Comparison, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(compare_folder, "_draw", full)
    with pytest.raises(RunError, match=r"could not be written .*No space left"):
        compare_folder.write_comparison(tmp_path / "out", {}, found, byte_tokenizer())
    assert not list(tmp_path.iterdir())
