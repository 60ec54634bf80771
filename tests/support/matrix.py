"""The matrix of runs: each trainer, with each strategy and option, on each backend, for each kind of policy.

`CASES` lists all of them, made from the registry of strategies and the trainers. `runs(case)` says which must train;
each other one must be refused, by name, before its first step. `covering` picks a subset in which each pair of values
occurs. `run_cases` runs many cases in one launch (tests/scripts/matrix_run.py): starting processes takes longer than a
case.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from support.launching import accelerate_launch
from support.models import byte_tokenizer, llama

from refkl import STRATEGIES

BACKENDS = {"plain": "single", "ddp": "multi", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}
"""Each backend, as refkl names it, with the NAME of the launch/accelerate/NAME.yaml that gives it."""
TRAINERS = {"grpo": "KLGRPOTrainer", "rloo": "KLRLOOTrainer", "dpo": "KLDPOTrainer", "kto": "KLKTOTrainer"} | {
    "sft": "KLSFTTrainer"
}
EXACT = ("kto", "sft")
"""The trainers that take the exact divergence here, the others an estimate."""
POLICIES = ("full", "frozen", "fresh", "trained")
"""All weights; all above the lowest layer; a new LoRA adapter; one that was trained before."""
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "dtype": {"dtype": "bfloat16"},
    "device": {"device": "cpu"},
    "offload": {"offload": True},
    "int8": {"quantize": "int8", "max_kl_floor": 1e9},
    "cache": {"cache": "FOLDER/cache"},
    "parts": {"max_tokens": 12},
    "base": {"source": "base"},
    "folder": {"source": "FOLDER/other"},
}
ANOTHER_MODEL = ("dtype", "int8", "base", "folder")
"""Options with which the reference is not the policy to the bit."""
ALLOWED = {
    "adapter": ("none", "cache", "parts", "base"),
    "swap": ("none", "device", "offload", "cache", "parts"),
    "clone": ("none", "dtype", "device", "offload", "int8", "cache", "parts", "folder"),
    "shared_trunk": ("none", "cache", "parts"),
    "zero3": ("none", "offload", "cache", "parts", "folder"),
    "fsdp2": ("none", "offload", "cache", "parts"),
}
"""The options that each strategy takes (docs/strategies.md has the same table); `parts` goes with all."""


AUTO = ("none", "cache", "base", "folder")
"""Options that auto's choice is tried with: those that it may depend on."""
TOLERANCE = 1e-5
"""How far losses, KLs (nats) and gradient norms may be from those of one process; relative to values above 1."""


@dataclass(frozen=True, order=True)
class Case:
    """One run of two steps."""

    backend: str
    trainer: str
    strategy: str
    option: str
    policy: str
    sync: bool

    def __str__(self) -> str:
        named = f"{self.trainer} {self.strategy}" + (f":{self.option}" if self.option != "none" else "")
        return f"{named} of {self.policy} on {self.backend}" + (" with sync" if self.sync else "")


@dataclass(frozen=True)
class Result:
    """What a case did."""

    outcome: str
    """"trained"; "refused" (a ValueError before the first step); or "failed", with what."""
    message: str = ""
    strategy: str = ""
    """The strategy that was built."""
    losses: tuple[float, ...] = ()
    kls: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    """Gradient norms; the value of an RLOO loss is always 0, so it says nothing."""
    before: str = ""
    """The reference's fingerprint before the first step."""
    after: str = ""
    processes: int = 0
    backend: str = ""
    seconds: float = 0.0


def runs(case: Case) -> bool:
    """Return True if the case must train, from the rules of docs/strategies.md and not from the code."""
    if case.option == "cache" and case.trainer in EXACT:
        return False  # it keeps log-probabilities
    if case.strategy == "auto":
        able = {name for name in STRATEGIES if runs(replace(case, strategy=name))}
        # These have to be asked for by name: where lower layers are frozen, where all trains, where nothing is sharded.
        by_name = {"shared_trunk"} | ({"swap"} if case.policy == "full" else set())
        return bool(able - by_name - ({"zero3"} if case.backend == "zero2" else set()))
    if case.option not in ALLOWED[case.strategy]:
        return False
    adapter = case.policy in ("fresh", "trained")
    if case.option == "folder" and case.sync and adapter:
        return False  # the folder's model has no adapter to move
    whole = case.backend in ("plain", "ddp", "zero2")
    if case.strategy == "adapter":
        return case.policy == "fresh" or (case.policy == "trained" and case.option == "base")
    if case.strategy == "clone":
        return whole and not (case.option == "int8" and adapter)
    if case.strategy == "shared_trunk":
        return whole and case.policy == "frozen"
    if case.strategy == "zero3":
        return case.backend in ("zero2", "zero3") and (not adapter or case.option == "folder")
    if case.strategy == "fsdp2":
        return case.backend == "fsdp2" and not adapter
    return True  # swap


def _all_cases() -> list[Case]:
    """Return all that must train, and each reason to refuse with all that it holds for but the trainer and the sync."""
    options = {**dict.fromkeys(STRATEGIES, OPTIONS), "auto": AUTO}
    found = []
    for strategy, allowed in options.items():
        for values in itertools.product(BACKENDS, TRAINERS, [strategy], allowed, POLICIES, (False, True)):
            case = Case(*values)
            simplest = replace(case, trainer="grpo", sync=False)
            if runs(case) or runs(simplest) or case == simplest:
                found.append(case)
    return found


CASES = _all_cases()


def baseline(case: Case) -> Case:
    """Return the run in one process that must have the same losses, whatever holds the reference there."""
    option = case.option if case.option in ANOTHER_MODEL else "none"
    strategy = "adapter" if option == "base" else "clone"
    return Case("plain", case.trainer, strategy, option, case.policy, case.sync)


def twin(case: Case) -> Case:
    """Return the run in one process that must have the same fingerprint: "adapter" holds the base's weights only."""
    by_name = replace(case, strategy="adapter")
    adapter = case == by_name or (case.strategy == "auto" and case.policy == "fresh" and runs(by_name))
    return replace(baseline(case), strategy="adapter") if adapter else baseline(case)


def needed(cases: Iterable[Case]) -> list[Case]:
    """Return the runs in one process that these cases are compared with."""
    return sorted({other for case in cases if runs(case) for other in (baseline(case), twin(case))})


def faults(case: Case, results: dict[Case, Result]) -> list[str]:
    """Return what is wrong with a case's result: a phrase each, none if all is right."""
    found = results[case]
    if not runs(case):
        right = found.outcome == "refused" and _named(case, found.message)
        return [] if right else [f"{found.outcome}: {found.message}"]
    if found.outcome != "trained":
        return [f"{found.outcome}: {found.message}"]
    alone = results[baseline(case)]
    where = (found.backend, found.processes)
    wrong = [] if where == (case.backend, 1 if case.backend == "plain" else 2) else [f"ran on {where}"]
    if case.strategy != "auto" and found.strategy != case.strategy:
        wrong.append(f"built {found.strategy}")
    is_the_policy = case.option not in ANOTHER_MODEL or (case.option, case.policy) == ("base", "fresh")
    # A part of a batch, or what of it is not in the cache, has products of other shapes and so other rounding.
    if is_the_policy and abs(found.kls[0]) > {"parts": 1e-5, "cache": 1e-6}.get(case.option, 0.0):
        wrong.append(f"KL {found.kls[0]:g} at step 0")
    if found.before != results[twin(case)].before:
        wrong.append("fingerprint differs from that in one process")
    if (found.after != found.before) != case.sync:
        wrong.append("fingerprint changed without a sync" if not case.sync else "the sync changed nothing")
    for what in ("losses", "kls", "norms"):
        ours, theirs = getattr(found, what), getattr(alone, what)
        tolerance = 1e-2 if case.option == "dtype" else TOLERANCE  # bf16 rounds a batch of other rows otherwise
        near = (abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=False))
        if len(ours) != 2 or not all(near):
            wrong.append(f"{what} {ours} and not {theirs}")
    return wrong


def _named(case: Case, message: str) -> bool:
    """Return True if a refusal names the strategy or the option that it is about."""
    strategies = ["auto", *STRATEGIES] if case.strategy == "auto" else [case.strategy]
    return any(name in message for name in (*map(repr, strategies), *OPTIONS[case.option]))


def covering(cases: Iterable[Case], *, of: Collection[str] = ()) -> list[Case]:
    """Return some of the cases, in which each pair of values that occurs in all of them occurs (pairwise testing).

    With `of`, only pairs that include the value of one of these fields count.
    """
    names = [field.name for field in fields(Case)]
    counted = {at for at, name in enumerate(names) if not of or name in of}

    def pairs(case: Case) -> set[Any]:
        found = itertools.combinations(enumerate(astuple(case)), 2)
        return {pair for pair in found if counted & {at for at, _ in pair}}

    left = {case: pairs(case) for case in cases}
    missing = set().union(*left.values())
    chosen = []
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        chosen.append(best)
        missing -= left.pop(best)
    return chosen


def make_inputs(folder: Path) -> None:
    """Write the models that all cases start from."""
    import torch

    for name, seed in (("model", 0), ("other", 1)):
        torch.manual_seed(seed)
        llama().save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)


def run_cases(
    cases: Iterable[Case], folder: Path, *, timeout: int = 600, tell: Callable[[str], None] = lambda line: None
) -> dict[Case, Result]:
    """Run the cases that have no result in `folder` yet, a launch for each backend; return the results of all of them.

    A launch that a case ends, by an error on one rank or by hanging, is followed by another for the rest.
    """
    wanted = list(cases)
    for backend in BACKENDS:
        results = read_results(folder)
        while left := [case for case in wanted if case.backend == backend and case not in results]:
            (folder / "cases.json").write_text(json.dumps([asdict(case) for case in left]))
            (folder / "running").unlink(missing_ok=True)
            try:
                output = _launch(backend, folder, timeout)
            except AssertionError as error:
                output = str(error)
            results = read_results(folder)
            running = (folder / "running").read_text() if (folder / "running").exists() else ""
            if ended := next((case for case in left if case not in results and str(case) == running), None):
                results[ended] = Result("failed", output[-3000:])
                append_result(folder, ended, results[ended])
            tell(f"{backend}: {len(left)} cases to run, {sum(case not in results for case in left)} left")
            if not any(case in results for case in left):
                raise AssertionError(f"no case of {backend} ran:\n{output[-3000:]}")
    results = read_results(folder)
    return {case: results[case] for case in wanted}


def _launch(backend: str, folder: Path, timeout: int) -> str:
    arguments = ("tests/scripts/matrix_run.py", backend, str(folder))
    return accelerate_launch(BACKENDS[backend], *arguments, timeout=timeout)


def append_result(folder: Path, case: Case, result: Result) -> None:
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps([asdict(case), asdict(result)]) + "\n")


def read_results(folder: Path) -> dict[Case, Result]:
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {
        Case(**case): Result(**{k: tuple(v) if isinstance(v, list) else v for k, v in result.items()})
        for case, result in map(json.loads, lines)
    }
