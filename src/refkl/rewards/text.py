"""The text of a completion, which is a string or the turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
"""`{"role": ..., "content": text or a list of parts}`: one turn of a conversational completion."""


def completion_text(completion: str | Sequence[Message]) -> str:
    """Return the text of one completion: the string itself, or the text of a conversation's messages."""
    if isinstance(completion, str):
        return completion
    texts: list[str] = []
    for message in completion:
        content = message["content"]
        if isinstance(content, str):
            texts.append(content)
        elif content is not None:  # a list of parts; None is a turn that only calls tools
            texts.extend(part["text"] for part in content if part["type"] == "text")
    return "\n".join(texts)
