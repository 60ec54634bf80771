"""VADER sentiment as a reward: cheap, deterministic, and easy to over-optimise, which is what the demo is about.

C. J. Hutto, E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

Message = dict[str, Any]
"""`{"role": ..., "content": text or a list of parts}`: one turn of a conversational completion."""


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the sentiment reward needs the package vaderSentiment, which is not installed. "
            "Install it with: pip install 'refkl[demo]'",
            name=error.name,
        ) from error
    return SentimentIntensityAnalyzer()


def compound(text: str) -> float:
    """VADER's compound score of a text: from -1 (all bad) to 1 (all good), 0.0 for neutral or empty text."""
    return float(_analyzer().polarity_scores(text)["compound"])


def completion_text(completion: str | Sequence[Message]) -> str:
    """The text of one completion: the string itself, or what the messages of a conversational one say."""
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


def sentiment(completions: Sequence[str | Sequence[Message]], **columns: Any) -> list[float]:
    """A TRL reward function: the compound score of each completion alone, without its prompt, in [-1, 1].

    Args:
        completions: `B` completions, strings or lists of messages.
        columns: whatever else TRL passes (`prompts`, `completion_ids`, columns of the data set); not looked at.

    Returns:
        `B` scores.
    """
    return [compound(completion_text(completion)) for completion in completions]
