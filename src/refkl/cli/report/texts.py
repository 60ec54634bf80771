"""The samples of a report: their selection, and the colour of each piece of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from refkl.cli.report.runs import Run, finite

PIECES = 30_000
"""Largest number of pieces of text on a page, over all runs."""
LENGTH = 400
"""Largest number of pieces of one completion."""
LEVELS = 8
_ROUNDS, _PROMPTS = 6, 12
_LEAST = 0.1
"""Smallest upper end of the scale in nats, so that rounding does not look like drift."""


@dataclass(frozen=True)
class Piece:
    """The text that a token adds, and the classes that colour it: by KL, and by log-ratio, which has a sign."""

    text: str
    classes: str
    tip: str


@dataclass(frozen=True)
class Sample:
    """One completion."""

    step: int
    summary: list[str]
    pieces: list[Piece]
    plain: str
    """The text of a completion without numbers."""
    left_out: int
    """Number of pieces at its end that are not shown."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and each run's completions of it: the run's number, and samples by step."""

    text: str
    runs: list[tuple[int, list[Sample]]]


@dataclass(frozen=True)
class Scale:
    """A map from nats to one of LEVELS + 1 strengths of colour, by the square root, so that small differences show."""

    top: float

    def level(self, nats: float) -> int:
        """Return 0 for a negligible value, and LEVELS for the top of the scale and beyond."""
        return min(LEVELS, int(LEVELS * math.sqrt(abs(nats) / self.top)))

    def starts(self) -> list[float]:
        """Return the start of each level, in nats."""
        return [self.top * (level / LEVELS) ** 2 for level in range(LEVELS + 1)]


@dataclass(frozen=True)
class Texts:
    """All samples that are shown, and what is left out."""

    prompts: list[Prompt]
    exact: Scale | None
    """The scale of the exact KL; None if no sample has it."""
    ratio: Scale | None
    """The scale of the log-ratio; None if no sample has it."""
    notes: list[str]


def texts(runs: Sequence[Run]) -> Texts:
    """Select samples by prompt, then run, then step: as many as a page can hold."""
    prompts, rounds, notes = _shown(runs)
    chosen = [_samples(run, prompts, rounds) for run in runs]
    shown = [sample for by_prompt in chosen for samples in by_prompt.values() for sample in samples]
    exact, ratio = (_scale([x for s in shown for x in s.get(name, ())]) for name in ("kl_per_token", "log_ratio"))
    found = []
    for prompt in prompts:
        rows = [
            (number, [_sample(one, exact, ratio) for one in by_prompt[prompt]])
            for number, by_prompt in enumerate(chosen)
            if prompt in by_prompt
        ]
        found.append(Prompt(_visible(prompt), rows))
    if any(len(sample.get("tokens", ())) > LENGTH for sample in shown):
        notes.append(f"Only the first {LENGTH} pieces of each completion are shown.")
    return Texts(found, exact, ratio, notes)


def _shown(runs: Sequence[Run]) -> tuple[list[str], int, list[str]]:
    """Return the prompts and the number of rounds to show.

    To fit the page, first rounds are dropped, then prompts.
    """
    count: dict[str, int] = {}
    for run in runs:
        for prompt in dict.fromkeys(sample["prompt"] for sample in run.samples):
            count[prompt] = count.get(prompt, 0) + 1
    # Prompts that most runs have come first: they can be compared.
    known = sorted(count, key=lambda prompt: -count[prompt])
    most = max((len({sample["step"] for sample in run.samples}) for run in runs), default=0)
    prompts, rounds = known[:_PROMPTS], min(most, _ROUNDS)
    while (rounds > 2 or len(prompts) > 1) and _pieces(runs, prompts, rounds) > PIECES:
        if rounds > 2:
            rounds -= 1
        else:
            prompts = prompts[:-1]
    notes = []
    if rounds < most:
        notes.append(f"{rounds} rounds of {most} are shown: the first, the last and some between.")
    if len(prompts) < len(known):
        notes.append(f"{len(prompts)} prompts of {len(known)} are shown.")
    return prompts, rounds, notes


def _pieces(runs: Sequence[Run], prompts: list[str], rounds: int) -> int:
    samples = (s for run in runs for found in _samples(run, prompts, rounds).values() for s in found)
    return sum(min(LENGTH, len(sample.get("tokens", ()))) for sample in samples)


def _samples(run: Run, prompts: Sequence[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Return a run's samples of these prompts from this many of its rounds, by prompt, in order of steps."""
    steps = sorted({sample["step"] for sample in run.samples})
    if len(steps) > rounds:
        steps = [steps[i * (len(steps) - 1) // max(1, rounds - 1)] for i in range(rounds)]
    at = {(sample["prompt"], sample["step"]): sample for sample in run.samples}
    found = {prompt: [at[prompt, step] for step in steps if (prompt, step) in at] for prompt in prompts}
    return {prompt: samples for prompt, samples in found.items() if samples}


def _sample(sample: dict[str, Any], exact: Scale | None, ratio: Scale | None) -> Sample:
    tokens = sample.get("tokens")
    if tokens is None:
        return Sample(sample["step"], [], [], _visible(sample["completion"])[: 10 * LENGTH], 0)
    kl = finite(sample.get("kl"))
    summary = []
    if kl is not None and tokens:
        summary = [f"{_nats(kl)} nats", f"{_nats(kl / len(tokens))} a piece"]
    return Sample(sample["step"], summary, list(_each(sample, exact, ratio)), "", max(0, len(tokens) - LENGTH))


def _each(sample: dict[str, Any], exact: Scale | None, ratio: Scale | None) -> Iterator[Piece]:
    kls, ratios = sample.get("kl_per_token"), sample.get("log_ratio")
    for i, text in enumerate(sample["tokens"][:LENGTH]):
        classes, tips = [], []
        if not text:
            classes.append("end")
            tips.append("no text of its own")
        elif "\n" in text:
            classes.append("line")
        if exact is not None and kls is not None:
            if (kl := finite(kls[i])) is not None and exact.level(kl):
                classes.append(f"k{exact.level(kl)}")
            tips.append(f"KL {_nats(kl)}")
        if ratio is not None and ratios is not None:
            if (nats := finite(ratios[i])) is not None and ratio.level(nats):
                classes.append(f"{'m' if nats > 0 else 'l'}{ratio.level(nats)}")
            tips.append(f"log-ratio {_nats(nats, '+')}")
        yield Piece(_visible(text), " ".join(classes), " · ".join(tips))


# Pictures of control characters, which a page would not show or would misread.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def _visible(text: Any) -> str:
    return str(text).translate(_PICTURES)


def _scale(values: Sequence[Any]) -> Scale | None:
    """Return a scale up to the next round number above nearly all values; None if there are none."""
    sizes = sorted(abs(x) for value in values if (x := finite(value)) is not None)
    if not sizes:
        return None
    most = max(_LEAST, sizes[int(0.99 * (len(sizes) - 1))])
    ten: float = 10.0 ** math.floor(math.log10(most))
    return Scale(next(digit * ten for digit in (1, 2, 5, 10) if digit * ten >= most * (1 - 1e-9)))


def _nats(value: float | None, sign: str = "") -> str:
    if value is None:
        return "not finite"
    return (
        "0" if abs(value) < 5e-5 else f"{value:{sign}.{4 if abs(value) < 0.1 else 3}{'f' if abs(value) < 1 else 'g'}}"
    )
