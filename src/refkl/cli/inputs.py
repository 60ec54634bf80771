"""Loading of the model, data and rewards that a configuration names. Errors say what to do if one is missing."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from refkl.cli.columns import check_columns
from refkl.config import DataConfig, ModelConfig, RewardConfig, is_import_path
from refkl.freezing import freeze
from refkl.loading import load_causal_lm
from refkl.messages import nearest
from refkl.rewards import TASK_SOURCE, RewardModel, TaskReward, task_data

_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def import_module(name: str, asked: str) -> ModuleType:
    """Return a module; those in the working directory are found too.

    Raises:
        ValueError: there is no such module; the message begins with `asked`.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{asked}, and importing it failed: {error}.") from None


def import_function(path: str, key: str) -> Callable[..., Any]:
    """Return the function that "package.module:function" names; modules in the working directory are found too.

    Raises:
        ValueError: no such module or function.
    """
    module_name, name = path.split(":")
    module = import_module(module_name, f"{key} is {path!r}")
    if not callable(function := getattr(module, name, None)):
        raise ValueError(f"{key} is {path!r}, but {module_name} has no function {name!r}.{nearest(name, dir(module))}")
    return function


def load_model(config: ModelConfig) -> PreTrainedModel:
    """Return the policy, with the configured parts frozen.

    Raises:
        ValueError: no complete causal language model there, or a freeze pattern that matches nothing.
    """
    folder = model_path(config)
    what = f"model.path {folder!r} cannot be loaded"
    model = load_causal_lm(folder, what, dtype=getattr(torch, config.dtype), **config.init_kwargs)
    if config.freeze:
        freeze(model, config.freeze)
    return model


def load_tokenizer(config: ModelConfig, padding_side: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model. If it has no padding token, the end-of-text token pads."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(config), padding_side=padding_side)
    except OSError as error:
        raise ValueError(f"model.path {config.path!r} holds no tokenizer: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_path(config: ModelConfig) -> str:
    """Return the folder or hub name of the policy."""
    return _folder(config.path, "model.path")


def _folder(path: str, key: str) -> str:
    return str(import_function(path, key)()) if is_import_path(path) else path


def load_data(config: DataConfig, method: str) -> datasets.Dataset:
    """Return the training data.

    Raises:
        ValueError: no such source, a missing column, a value that is no text, no rows.
    """
    data = load_rows(config)
    check_columns(data, method, config.source)
    return data


def load_rows(config: DataConfig, key: str = "data.source") -> datasets.Dataset:
    """Return the rows of a file, a folder or a function, with any columns.

    `key` is the option that names the source; error messages show it.

    Raises:
        ValueError: no such source, no rows.
    """
    if config.source.startswith(TASK_SOURCE):
        data = task_data(config.source.removeprefix(TASK_SOURCE), **config.kwargs)
    elif is_import_path(config.source):
        function = import_function(config.source, key)
        try:
            inspect.signature(function).bind(**config.kwargs)
        except TypeError as error:
            raise ValueError(f"data.kwargs {config.kwargs} do not fit {config.source}: {error}") from None
        data = function(**config.kwargs)
    else:
        data = _read(Path(config.source), key)
    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"{key} {config.source!r} gave a {type(data).__name__}; it must give a datasets.Dataset.")
    if config.limit is not None:
        data = data.select(range(min(config.limit, len(data))))
    if not len(data):
        raise ValueError(f"The data set {config.source} is empty.")
    return data


def _read(path: Path, key: str) -> datasets.Dataset:
    if path.is_dir():
        try:
            return datasets.load_from_disk(str(path))
        except FileNotFoundError as error:
            raise ValueError(f"{key}: the folder {path} holds no data set: {error}") from None
    if path.suffix not in _FILES:
        raise ValueError(f"{key} {str(path)!r} is neither a folder nor one of {', '.join(_FILES)}.")
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}.")
    if not path.stat().st_size:
        raise ValueError(f"The data set {path} is empty.")
    try:
        return datasets.load_dataset(_FILES[path.suffix], data_files=str(path), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{key} {path} cannot be read: {error.__cause__ or error}") from None


def load_reward(config: RewardConfig, data: datasets.Dataset | None = None) -> Callable[..., list[float | None]]:
    """Return the reward as TRL calls it. Each result is checked: one finite number (or None) per completion.

    Raises:
        ValueError: no such function, model or task; `data` that it could not score.
    """
    settled = config.settled()
    name = settled.name
    function: Callable[..., Any]
    if config.model is not None:
        options = {key: getattr(config, key) for key in ("label", "probability", "dtype", "batch_size", "max_length")}
        given = {key: value for key, value in options.items() if value is not None}
        folder = _folder(config.model, "reward.model")
        function = model = RewardModel.load(folder, name=name, **given)
        if data is not None:
            model.check(data[0]["prompt"])
    elif config.task is not None:
        assert settled.answer is not None, "a task has one"
        function = task = TaskReward(config.task, answer=settled.answer, name=name)
        if data is not None:
            task.check(data)
    else:
        assert config.function is not None, "one of the three is set"
        function = import_function(config.function, "reward.function")
    return _checked(function, name, config.function or name)


def _checked(function: Callable[..., Any], name: str, called: str) -> Callable[..., list[float | None]]:
    def checked(**inputs: Any) -> list[float | None]:
        wanted = len(inputs["completions"])
        values = _listed(function(**inputs), called, wanted)
        if len(values) != wanted:
            raise ValueError(f"{called} returned {len(values)} rewards for {wanted} completions.")
        for at, value in enumerate(values):
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                text = str(inputs["completions"][at])[:80]
                raise ValueError(f"{called} returned {value!r} for completion {at} ({text!r}): not a finite number.")
        return values

    checked.__name__ = name
    return checked


def _listed(returned: Any, called: str, wanted: int) -> list[Any]:
    """Return a reward function's result as a list. Raise ValueError if it cannot be one number per completion."""
    if returned is None:
        raise ValueError(f"{called} returned nothing; it must return one number per completion.")
    if inspect.iscoroutine(returned):
        returned.close()
        raise ValueError(f"{called} is an async function, whose result would have to be awaited. Make it a plain one.")
    plain = returned.tolist() if isinstance(returned, torch.Tensor | np.ndarray) else returned
    if not isinstance(plain, Iterable) or isinstance(plain, str | bytes | Mapping | Set):
        kind = type(returned).__name__
        raise ValueError(
            f"{called} returned {str(returned)[:60]!r} of type {kind} for {wanted} completions; it must return a list "
            "with one number per completion, in their order."
        )
    return [x.item() if isinstance(x, torch.Tensor) and x.numel() == 1 else x for x in plain]
