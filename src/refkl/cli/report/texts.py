"""The samples of a report: which are shown, and how strongly each piece of a text is coloured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from refkl.cli.report.runs import Run, finite

PIECES = 30_000
"""Pieces of text on a page, of all runs together."""
LENGTH = 400
"""Pieces of one completion."""
LEVELS = 8
_ROUNDS, _PROMPTS = 6, 12
_LEAST = 0.1
"""Nats at the end of the scale, at least: rounding is not to look like a drift."""


@dataclass(frozen=True)
class Piece:
    """What a token adds to the text, and the classes that colour it: by KL and by log-ratio, which has a sign."""

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
    """Pieces at its end that are not shown."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and each run's completions of it: the run's number, and samples by step."""

    text: str
    runs: list[tuple[int, list[Sample]]]


@dataclass(frozen=True)
class Scale:
    """From nats to one of LEVELS + 1 strengths of colour, by the square root: small differences show."""

    top: float

    def level(self, nats: float) -> int:
        """0 for what is next to nothing, LEVELS for the top and beyond."""
        return min(LEVELS, int(LEVELS * math.sqrt(abs(nats) / self.top)))

    def starts(self) -> list[float]:
        """Where each level begins, in nats."""
        return [self.top * (level / LEVELS) ** 2 for level in range(LEVELS + 1)]


@dataclass(frozen=True)
class Texts:
    """All samples that are shown, and what is left out."""

    prompts: list[Prompt]
    exact: Scale | None
    """Of the exact KL; None where no sample has it."""
    ratio: Scale | None
    """Of the log-ratio; None where no sample has it."""
    notes: list[str]


def texts(runs: Sequence[Run]) -> Texts:
    """The samples by prompt, then run, then step: as many as a page can hold."""
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
        notes.append(f"Of each completion the first {LENGTH} pieces are shown.")
    return Texts(found, exact, ratio, notes)


def _shown(runs: Sequence[Run]) -> tuple[list[str], int, list[str]]:
    """The prompts, and how many rounds of each run's: fewer rounds first, then fewer prompts, until a page holds it."""
    count: dict[str, int] = {}
    for run in runs:
        for prompt in dict.fromkeys(sample["prompt"] for sample in run.samples):
            count[prompt] = count.get(prompt, 0) + 1
    # Those that most runs have first: they can be compared.
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
    """A run's samples of these prompts, of so many of its rounds; by prompt, in order of steps."""
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


# Control characters, which a page does not show or takes for others, as their pictures.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def _visible(text: Any) -> str:
    return str(text).translate(_PICTURES)


def _scale(values: Sequence[Any]) -> Scale | None:
    """To the next round number above nearly all of them; None if there are none."""
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
