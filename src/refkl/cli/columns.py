"""The columns that a method trains on, and the check of their values, row by row, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets

_COLUMNS = {
    "grpo": ("prompt",),
    "rloo": ("prompt",),
    "dpo": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "sft": ("prompt", "completion"),
}
_INSTEAD = {"sft": ("text", "messages")}
"""Columns of which any one is enough instead, by method."""
PROMPTS = ("prompt", *_INSTEAD["sft"])
"""Fields that hold the prompt of a row, or begin with it. The first one that the row has is used."""


def check_columns(data: datasets.Dataset, method: str, source: str) -> None:
    """Raise ValueError if a column that `method` needs is missing, or a value in it is of another kind than it must be.

    Every row is read: one wrong row would otherwise end the run in the middle of its preparation.
    """
    names, instead = _COLUMNS[method], _INSTEAD.get(method, ())
    if missing := [name for name in names if name not in data.column_names]:
        found = [name for name in reversed(instead) if name in data.column_names]
        if not found:
            other = f", or one of {list(instead)}" if instead else ""
            raise ValueError(
                f"The data for {method} needs the columns {list(names)}{other}; {source} has "
                f"{data.column_names}, so {missing} is missing."
            )
        names = tuple(found[:1])  # TRL reads the messages of rows that have both
    for name in names:
        fits, kind = _KINDS.get(name, (_is_text_or_messages, _TEXT_OR_MESSAGES))
        for at, value in enumerate(_values(data, name)):
            if not fits(value):
                raise ValueError(
                    f"Row {at} of {source} (counted from 0) has {repr(value)[:60]} of type {type(value).__name__} in "
                    f"the column {name!r}, which must hold {kind}. Correct the row, or leave it out of the data."
                )


def check_empty_prompts(data: datasets.Dataset, tokenizer: Any, source: str) -> None:
    """Raise ValueError if a prompt has no token, not even one that the tokenizer adds: nothing can follow it."""
    if tokenizer("")["input_ids"]:
        return
    for at, value in enumerate(_values(data, "prompt")):
        if value == "":
            raise ValueError(
                f"Row {at} of {source} (counted from 0) has an empty prompt, and the tokenizer adds no token of its "
                "own, so there is nothing to sample from. Write a prompt, or leave the row out of the data."
            )


def _values(data: datasets.Dataset, name: str) -> Iterator[Any]:
    """Iterate over a column as Python values. Reading one row at a time takes some ten times as long."""
    for batch in data.select_columns(name).with_format(None).iter(batch_size=_BATCH):
        yield from batch[name]


_BATCH = 1000


def _is_text_or_messages(value: Any) -> bool:
    return isinstance(value, str) or _is_messages(value)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    """Return True for a role with something said. A call of a tool may have no content, but then has another field."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return value.get("content") is not None or any(x is not None for key, x in value.items() if key != "role")


_MESSAGES = "a list of messages such as {'role': 'user', 'content': 'text'}"
_TEXT_OR_MESSAGES = f"text, or {_MESSAGES}"
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda value: isinstance(value, str), "text"),
    "messages": (_is_messages, _MESSAGES),
    "label": (lambda value: isinstance(value, bool | int) and value in (0, 1), "true or false"),
}
"""What a column must hold, if that is not _TEXT_OR_MESSAGES, and its name in a message."""
