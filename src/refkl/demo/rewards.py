"""VADER sentiment as a reward: cheap, deterministic, and easy to over-optimise, which the demo shows.

C. J. Hutto, E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM
2014.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from refkl.rewards.text import Message, completion_text


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
    """Return VADER's compound score of a text: from -1 (all bad) to 1 (all good), 0.0 for neutral or empty text."""
    return float(_analyzer().polarity_scores(text)["compound"])


def sentiment(completions: Sequence[str | Sequence[Message]], **columns: Any) -> list[float]:
    """Score each completion without its prompt by VADER's compound score, in [-1, 1]. This is a TRL reward function.

    Args:
        completions: `B` completions, strings or lists of messages.
        columns: other arguments from TRL (`prompts`, `completion_ids`, columns of the data set); ignored.

    Returns:
        `B` scores.
    """
    return [compound(completion_text(completion)) for completion in completions]
