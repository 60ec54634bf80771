"""Random configuration files and command lines: status 2 and a sentence, never a traceback, and nothing is written.

The model that the configurations name does not exist, so no run can start. Values of a wrong type must be refused
before that is found out.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import string
import types
import typing
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import examples
from support.train_inputs import model_folder, write_config

from refkl.cli import main, settings
from refkl.config import RunConfig, choices

NO_MODEL = "no-such-model-anywhere"
WORDS = st.sampled_from(
    [
        "",
        " ",
        "null",
        "auto",
        "grpo",
        "~",
        "1e400",
        "-1",
        "nan",
        "[",
        "{",
        "a: b",
        "'",
        "--",
        "\u202e",
        "é",
        "\x00",
        "💥",
    ]
)
TEXTS = st.one_of(WORDS, st.text(alphabet=st.characters(codec="utf-8"), max_size=12))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 10**30, -(10**400), 2**63, 1e308, -0.0, math.nan, math.inf, -math.inf]),
    st.integers(),
    st.floats(),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXTS, st.integers()), inner, max_size=3)
    ),
    max_leaves=6,
)
METHODS = ("grpo", "rloo", "dpo", "kto", "sft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and data of each method, and a model for `refkl plan` and `refkl compare`."""
    folder = tmp_path_factory.mktemp("hostile")
    model_folder(folder / "model")
    for method in METHODS:
        (folder / method).mkdir()
        (folder / method / "model").symlink_to(folder / "model")
        write_config(folder / method, method, model={"path": str(folder / NO_MODEL)})
    return folder


@pytest.fixture(autouse=True, scope="module")
def _as_before() -> Iterator[None]:
    """Restore what TRL's configurations set: environment variables, and torch's precision.

    Meanwhile a parser is made once for each method, which takes most of the time of a command.
    """
    environment, precision, make = dict(os.environ), torch.get_float32_matmul_precision(), settings._parser
    settings._parser = lru_cache(make)
    yield
    settings._parser = make
    os.environ.clear()
    os.environ.update(environment)
    torch.set_float32_matmul_precision(precision)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(arguments: list[str], folder: Path) -> str:
    """Run the command; check that it is refused with a sentence and that no file appears. Return the message."""
    before, here = files(folder), set(os.listdir())
    output = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(output):
        try:
            status: Any = main(arguments)
        except SystemExit as exit:  # of argparse
            status = exit.code
    error = output.getvalue()
    assert status == 2, f"status {status}: {error}"
    assert "error: " in error and "Traceback" not in error, error
    message = error.rpartition("error: ")[2].replace("(REFKL_TRACEBACK=1 in the environment shows where)", "").strip()
    assert len(message) > 10, error
    assert files(folder) == before and set(os.listdir()) == here
    return message


def members_of(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; another type by itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def sections(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the type of each field of a configuration."""
    for name, hint in typing.get_type_hints(cls).items():
        members = members_of(hint)
        inner = next((m for m in members if dataclasses.is_dataclass(m)), None)
        yield f"{prefix}{name}", hint
        if inner is not None:
            yield from sections(inner, f"{prefix}{name}.")


FIELDS = [(path, hint) for path, hint in sections(RunConfig) if path not in ("trainer", "method")]
TRAINER = st.sampled_from(
    [
        "max_steps",
        "learning_rate",
        "beta",
        "output_dir",
        "seed",
        "bf16",
        "optim",
        "lr_scheduler_type",
        "save_strategy",
        "report_to",
        "fsdp",
        "deepspeed",
        "per_device_train_batch_size",
        "gradient_checkpointing",
        "logging_steps",
        "warmup_steps",
        "model_init_kwargs",
        "num_generations",
        "max_length",
        "loss_type",
        "dataset_num_proc",
        "run_name",
        "adam_beta1",
        "max_grad_norm",
        "resume_from_checkpoint",
        "reward_weights",
        "accelerator_config",
        "temperature",
    ]
).map("trainer.{}".format)


def set_at(values: Any, path: str, value: Any) -> None:
    *before, last = path.split(".")
    for part in before:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[last] = value


@st.composite
def configurations(draw: st.DrawFn, folder: Path) -> str:
    """Return the text of a configuration with a few random changes."""
    method = draw(st.sampled_from(METHODS))
    values = yaml.safe_load((folder / method / "config.yaml").read_text())
    for _ in range(draw(st.integers(1, 3))):
        path = draw(
            st.one_of(
                st.sampled_from([*(path for path, _ in FIELDS), "trainer", "method"]),
                TRAINER,
                st.text(alphabet=string.ascii_letters + "._é ", min_size=1, max_size=12).filter(lambda t: t.strip(".")),
            )
        )
        set_at(values, path, draw(VALUES))
    values["model"] = (
        values["model"]
        if not isinstance(values.get("model"), dict)
        else values["model"] | {"path": str(folder / NO_MODEL)}
    )
    text = yaml.safe_dump(values, allow_unicode=draw(st.booleans()))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):  # damage
        at = draw(st.integers(0, len(text)))
        text = (
            text[:at]
            + draw(
                st.sampled_from(
                    [
                        "&a ",
                        "*a",
                        ": ",
                        "- ",
                        "[",
                        "]",
                        "{",
                        "\t",
                        "!!python/name:os.abort",
                        "\n",
                        "%",
                        "'",
                        '"',
                        "? ",
                        "<<: ",
                    ]
                )
            )
            + text[at:]
        )
    return text


@examples(30)
@given(st.data())
def test_configuration_files(folder: Path, data: st.DataObject) -> None:
    text = data.draw(configurations(folder))
    path = folder / "random.yaml"
    path.write_text(text, encoding="utf-8")
    refused([data.draw(st.sampled_from(["train", "check"])), str(path)], folder)


@examples(10)
@given(
    content=st.one_of(st.binary(max_size=40), TEXTS.map(str.encode), VALUES.map(lambda v: yaml.safe_dump(v).encode()))
)
def test_files_that_are_no_configuration(folder: Path, content: bytes) -> None:
    path = folder / "random.yaml"
    path.write_bytes(content)
    refused(["train", str(path)], folder)


NOT_NUMBERS = st.sampled_from(["twelve", "1,5", [1], {"a": 1}, "1 2", [[]]])
NOT_TEXTS = st.sampled_from([[1], {"a": 1}, ["x", ["y"]]])


def wrong(hint: Any) -> st.SearchStrategy[Any] | None:
    """Return values that a field of this type cannot have; None if it takes anything."""
    members = set(members_of(hint))
    strategies: list[st.SearchStrategy[Any]] = []
    if types.NoneType not in members:
        strategies.append(st.none())
    if choices(hint):
        strategies.append(st.sampled_from(["nonsense", 17, [], {"a": 1}]))
    elif members & {int, float, bool}:
        strategies.append(NOT_NUMBERS)
        if int in members:
            strategies.append(st.sampled_from([1.5, math.nan, math.inf]))
    elif str in members:
        strategies.append(NOT_TEXTS)
    elif typing.get_origin(hint) in (list, dict):
        strategies.append(st.sampled_from([3, "x y", 1.5]))
    elif any(dataclasses.is_dataclass(m) for m in members):
        strategies.append(st.sampled_from([3, "x y", [1], {"nonsense": 1}]))
    else:
        return None
    return st.one_of(strategies)


@examples(30)
@given(st.data())
def test_values_of_a_wrong_type(folder: Path, data: st.DataObject) -> None:
    """In the file or on the command line, refused for what they are: not because the model is missing."""
    path, hint = data.draw(st.sampled_from([(p, h) for p, h in FIELDS if wrong(h) is not None]))
    strategy = wrong(hint)
    assert strategy is not None
    value = data.draw(strategy)
    method = data.draw(st.sampled_from(METHODS))
    values = yaml.safe_load((folder / method / "config.yaml").read_text())
    options: list[str] = []
    if data.draw(st.booleans()):
        set_at(values, path, value)
    elif value is not None and str not in (hint, *get_args(hint)) and path != "resume":
        # On the command line anything is a text, and --resume names a checkpoint.
        options = [f"--{path}", yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()]
    else:
        return
    (folder / "random.yaml").write_text(yaml.safe_dump(values))
    message = refused(["train", str(folder / "random.yaml"), *options], folder)
    assert NO_MODEL not in message or path.startswith("model"), message


@examples(20)
@given(st.data())
def test_command_lines_of_a_run(folder: Path, data: st.DataObject) -> None:
    draw = data.draw
    names = st.one_of(
        st.sampled_from([p for p, _ in FIELDS if not p.startswith(("data", "reward", "model"))]),
        TRAINER,
        TEXTS,
    )
    options: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(names.filter(lambda name: name not in ("h", "help") and not name.endswith(".help")))
        value = draw(st.one_of(SCALARS.map(str), VALUES.map(lambda v: yaml.safe_dump(v, default_flow_style=True))))
        form = draw(st.sampled_from(["--{} {}", "--{}={}", "--{}", "{} {}", "--{}+ {}"]))
        options += [part.format(*fill) for part, fill in zip(form.split(" "), ((name, value), (value,)), strict=False)]
    method = draw(st.sampled_from(METHODS))
    refused([draw(st.sampled_from(["train", "check"])), str(folder / method / "config.yaml"), *options], folder)


PLAN = ["--world-size", "--backend", "--method", "--dtype", "--batch-size", "--seq-len", "--memory", "--lora-rank"]
PLAN += ["--gradient-checkpointing"]
COMPARE = ["--limit", "--kind", "--order", "--jsd-weight", "--temperature", "--max-new-tokens", "--samples-per-prompt"]
COMPARE += ["--seed", "--max-length", "--batch-size", "--dtype", "--device", "--top", "--min-count"]
NONSENSE = st.sampled_from(
    ["nonsense", "", "1e400", "nan", "-3", "1,5", "[1]", "💥", "x" * 500, "-inf", "{a: 1}", "0x"]
)


@examples(20)
@given(st.data())
def test_command_lines_of_plan_and_compare(folder: Path, data: st.DataObject) -> None:
    """Each option gets a value that it cannot have."""
    draw = data.draw
    if draw(st.booleans()):
        option, value = draw(st.sampled_from(PLAN)), draw(NONSENSE)
        arguments = ["plan", "--model", str(folder / "model"), f"{option}={value}"]
    else:
        option, value = draw(st.sampled_from(COMPARE)), draw(NONSENSE)
        if (option, value) in (("--seed", "-3"), ("--kind", "")):
            return
        data_file = folder / draw(st.sampled_from(["grpo", "sft"])) / "data.jsonl"
        arguments = ["compare", *[str(folder / "model")] * 2, "--data", str(data_file), f"{option}={value}", "--sample"]
    refused(arguments, folder)
