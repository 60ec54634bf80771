"""Given texts for a comparison, as tokens, some of which are scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """One sequence: a prompt, which is not scored, and a completion, whose tokens are all scored."""

    row: int
    """Index of its row in the data, from 0."""
    prompt: Any
    """The prompt in the data: a string or messages; None for text without a prompt."""
    prompt_ids: list[int]
    """At least one token; the completion follows them."""
    completion_ids: list[int]
    """At least one token."""
    sample: int | None = None
    """Index among the prompt's samples, from 0; None for given text."""


@dataclass(frozen=True)
class Texts:
    """Texts, and counts of the changes that fitted them to the models."""

    texts: list[Text] = field(default_factory=list)
    limit: int | None = None
    """Largest number of tokens of a sequence, or of a prompt that is sampled from. None for no limit."""
    truncated: int = 0
    """Number of rows that were longer than the limit."""
    left_out: int = 0
    """Number of rows without a token to score: an empty completion, or a prompt that leaves no room for one."""
    moved: int = 0
    """Number of rows in which the last tokens of the prompt change when the completion follows; these are scored
    too."""

    def notes(self) -> list[str]:
        """Return a sentence for each change."""
        said = [
            (self.truncated, f"cut to {self.limit} tokens, the largest length"),
            (self.left_out, "left out: there is no token to score"),
            (self.moved, "scored from before the end of the prompt: its last tokens merge with the completion"),
        ]
        return [f"{count} {'row was' if count == 1 else 'rows were'} {what}" for count, what in said if count]


def column_of(columns: Iterable[str], *, sample: bool = False) -> str | None:
    """Return the column whose text is scored: "completion", "chosen" or "text"; None to sample from the prompts.

    Raises:
        ValueError: no known column.
    """
    found = set(columns)
    if "prompt" in found:
        return None if sample else next((name for name in ("completion", "chosen") if name in found), None)
    if "text" in found and not sample:
        return "text"
    needed = "a column 'prompt' to sample from" if sample else "'prompt' (with 'completion' or 'chosen'), or 'text'"
    raise ValueError(f"The data needs {needed}; it has the columns {sorted(found)}.")


def read_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], *, column: str | None = None, limit: int | None = None
) -> Texts:
    """Tokenize given text, without adding an end-of-text token.

    Args:
        tokenizer: the models'.
        rows: rows with "prompt" and "completion" or "chosen", each a string or messages; or with "text". All tokens of
            a text are scored except the first, which has no token before it.
        column: the column that is scored; None finds it.
        limit: largest number of tokens of a sequence; a longer one is cut after its first tokens.

    Raises:
        ValueError: a row without its text; messages, but no chat template; nothing to score.
    """
    texts: list[Text] = []
    truncated = left_out = moved = 0
    for number, row in enumerate(rows):
        wanted = column or column_of(row)
        if wanted is None:
            raise ValueError(f"Row {number} of the data has only a prompt and nothing to score: sample from it.")
        prompt = None if wanted == "text" else _value(row, "prompt", number)
        ids, start, whole = _tokens(tokenizer, prompt, _value(row, wanted, number), number)
        moved += not whole
        truncated += limit is not None and len(ids) > limit
        ids, start = ids[:limit], max(start, 1)
        if len(ids) <= start:
            left_out += 1
            continue
        texts.append(Text(number, prompt, ids[:start], ids[start:]))
    if not texts:
        raise ValueError(f"No token of the data can be scored: {left_out} rows have no completion, or no room for it.")
    return Texts(texts, limit, truncated, left_out, moved)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, number: int) -> list[int]:
    """Return the tokens of a prompt: a string as it is, messages through the chat template.

    Raises:
        ValueError: neither string nor messages; no chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return _encoded(tokenizer, _rendered(tokenizer, _messages(prompt, number), opened=True))


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: Any, scored: Any, number: int) -> tuple[list[int], int, bool]:
    """Tokenize prompt and completion together.

    Return the tokens, the index at which the completion begins, and True if that is the end of the prompt's own tokens.
    """
    if prompt is None:
        if not isinstance(scored, str):
            raise ValueError(f"Row {number} of the data: text must be a string, got a {type(scored).__name__}.")
        return list(tokenizer(scored)["input_ids"]), 0, True
    if isinstance(prompt, str):
        if not isinstance(scored, str):
            raise ValueError(f"Row {number} of the data: the prompt is a string, and its completion is messages.")
        together = list(tokenizer(prompt + scored)["input_ids"])
    else:
        answer = [{"role": "assistant", "content": scored}] if isinstance(scored, str) else _messages(scored, number)
        together = _encoded(tokenizer, _rendered(tokenizer, [*_messages(prompt, number), *answer], opened=False))
    alone = prompt_ids(tokenizer, prompt, number)
    # The completion begins where the two differ: a tokenizer may merge across the border, or end each text differently.
    parted = (at for at, (one, other) in enumerate(zip(alone, together, strict=False)) if one != other)
    start = next(parted, min(len(alone), len(together)))
    return together, start, start == len(alone)


def _messages(value: Any, number: int) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in value) or not value:
        raise ValueError(
            f"Row {number} of the data: a prompt or completion must be a string, or messages with role and content; "
            f"got {str(value)[:80]!r}."
        )
    # In a column of messages, each message has the keys of all of them, with None for missing ones.
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, opened: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("The data holds messages, and the tokenizer has no chat template to write them with.")
    answering = messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not answering, "continue_final_message": answering} if opened else {}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written the special tokens


def _value(row: Row, column: str, number: int) -> Any:
    if row.get(column) is None:
        raise ValueError(f"Row {number} of the data has no {column!r}.")
    return row[column]
