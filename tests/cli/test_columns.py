"""Every row of the data is checked before a model is loaded; the message names the row, its value and what fits."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.models import byte_tokenizer
from support.train_inputs import write_config

from refkl.cli import main
from refkl.cli.columns import check_columns, check_empty_prompts
from refkl.cli.inputs import load_data
from refkl.config import DataConfig

GOOD: dict[str, dict[str, Any]] = {
    "grpo": {"prompt": "hello"},
    "rloo": {"prompt": "hello"},
    "dpo": {"prompt": "hello", "chosen": " good", "rejected": " bad"},
    "kto": {"prompt": "hello", "completion": " good", "label": True},
    "sft": {"prompt": "hello", "completion": " good"},
}
TURNS = [{"role": "user", "content": "hello"}]
ANSWER = [{"role": "assistant", "content": " good"}]


def write(rows: list[dict[str, Any]], path: Path) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def load(rows: list[dict[str, Any]], path: Path, method: str) -> datasets.Dataset:
    return load_data(DataConfig(source=write(rows, path)), method)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("method", GOOD)
def test_a_null_is_named_in_every_column_of_every_method(method: str, suffix: str, tmp_path: Path) -> None:
    good = GOOD[method]
    assert len(load([good] * 4, tmp_path / f"good{suffix}", method)) == 4
    for name in good:
        rows = [good, good, good | {name: None}, good]
        with pytest.raises(ValueError) as error:
            load(rows, tmp_path / f"{name}{suffix}", method)
        for part in (f"Row 2 of {tmp_path / name}{suffix} (counted from 0) has ", "None of type NoneType",
                     f"in the column {name!r}", "Correct the row, or leave it out"):  # fmt: skip
            assert part in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("method", GOOD)
def test_a_number_is_no_prompt(method: str, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Row 0 of .* has 7 of type int in the column 'prompt', which must hold text"):
        load([GOOD[method] | {"prompt": 7}] * 2, tmp_path / f"d{suffix}", method)


def test_one_number_among_texts(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}] * 1500 + [{"prompt": 3.5}]
    with pytest.raises(ValueError, match=r"Row 1500 of .* has 3\.5 of type float in the column 'prompt'"):
        load(rows, tmp_path / "d.jsonl", "grpo")


@pytest.mark.parametrize(
    ("label", "found"), [("yes", "'yes' of type str"), (2, "2 of type int"), (0.5, "0.5 of type float")]
)
def test_labels(label: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load([GOOD["kto"] | {"label": label}], tmp_path / "d.jsonl", "kto")
    assert f"has {found} in the column 'label', which must hold true or false." in str(error.value)
    for right in (True, 0):
        assert len(load([GOOD["kto"] | {"label": right}], tmp_path / f"{right}.jsonl", "kto")) == 1


CONVERSATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"prompt": TURNS}),
    "dpo": ("dpo", {"prompt": TURNS, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": " bad"}]}),
    "kto": ("kto", {"prompt": TURNS, "completion": ANSWER, "label": False}),
    "sft with a prompt": ("sft", {"prompt": TURNS, "completion": ANSWER}),
    "sft without": ("sft", {"messages": TURNS + ANSWER}),
    "text": ("sft", {"text": "hello good"}),
    "blocks of content": ("grpo", {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}),
    "tools and extra columns": (
        "sft",
        {
            "messages": [
                *TURNS,
                {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
                {"role": "tool", "name": "f", "content": "3"},
                *ANSWER,
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "source": None,
            "score": 0.5,
        },
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_rows_too(name: str, tmp_path: Path) -> None:
    method, row = CONVERSATIONS[name]
    data = load([row] * 3, tmp_path / "d.jsonl", method)
    assert len(data) == 3 and set(data.column_names) == set(row)


@pytest.mark.parametrize(
    "turns",
    [[], ["hello"], {"role": "user", "content": "hello"}, [{"content": "hello"}], [{"role": "user", "content": None}],
     [{"role": None, "content": "hello"}], [*TURNS, None]],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("method", "column"), [("grpo", "prompt"), ("sft", "messages")])
def test_what_is_no_conversation(turns: Any, method: str, column: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"Row 0 of .* in the column '{column}', which must hold .*a list of messages"):
        load([{column: turns}], tmp_path / "d.jsonl", method)


@pytest.mark.parametrize("command", ["train", "check"])
def test_the_command_stops_before_it_loads_or_writes(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model={"path": "no model is here"})
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n')
    assert main([command, str(config)]) == 2
    error = capsys.readouterr().err
    assert "Row 1 of" in error and "None of type NoneType in the column 'prompt'" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_rows_past_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    source = write([{"prompt": "a"}, {"prompt": "b"}, {"prompt": None}], tmp_path / "d.jsonl")
    assert load_data(DataConfig(source=source, limit=2), "grpo")["prompt"] == ["a", "b"]
    with pytest.raises(ValueError, match="Row 2 of"):
        load_data(DataConfig(source=source), "grpo")


def test_a_formatted_and_shuffled_data_set_is_read_as_it_is() -> None:
    data = datasets.Dataset.from_dict({"prompt": ["a", None, "b"]}).select([0, 2, 1]).with_format("numpy")
    with pytest.raises(ValueError, match=r"Row 2 of d .* has None of type NoneType"):
        check_columns(data, "grpo", "d")
    check_columns(data.select([0, 1]), "grpo", "d")


def test_an_empty_prompt_needs_a_token_of_the_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, trainer={"max_steps": 1})
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n' * 4 + '{"prompt": ""}\n')
    assert main(["train", str(config)]) == 2
    error = capsys.readouterr().err
    assert "Row 4 of" in error and "has an empty prompt, and the tokenizer adds no token" in error
    assert "Write a prompt, or leave the row out" in error and not (tmp_path / "run" / "metrics.jsonl").exists()

    data = datasets.Dataset.from_dict({"prompt": ["a", ""]})
    begins = byte_tokenizer()
    begins.bos_token = "!"
    begins._tokenizer.post_processor = template_with(begins.bos_token_id)
    assert begins("")["input_ids"] == [begins.bos_token_id]
    check_empty_prompts(data, begins, "d")
    check_empty_prompts(data.select([0]), byte_tokenizer(), "d")


def template_with(token: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="! $A", special_tokens=[("!", token)])


def test_many_rows_take_a_second_or_so() -> None:
    """200,000 texts take 0.13 s and as many conversations 1.4 s; row by row they took 5 and 8 s."""
    rows = 20_000
    for column in (["a text of some words"] * rows, [TURNS + ANSWER] * rows):
        data = datasets.Dataset.from_dict({"prompt": column})
        start = time.process_time()
        for value in data["prompt"]:
            assert value
        plain = time.process_time() - start
        start = time.process_time()
        check_columns(data, "grpo", "d")
        assert time.process_time() - start < plain / 2
