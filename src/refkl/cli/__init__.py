"""The command line: `refkl train`, `refkl check`, `refkl plan`, `refkl compare`, `refkl export`, `refkl report`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from refkl.cli.failures import Interruptible, print_failure, print_uncaught_failures
from refkl.messages import RunError

USAGE = """\
usage: refkl train CONFIG.yaml [--key value ...]     train; any key of the file can be overridden (--kl.coef 0.1)
       refkl train CONFIG.yaml --resume [CHECKPOINT]   goes on from the newest whole checkpoint, or from this one
       refkl train --help [--method grpo|rloo|dpo|kto|sft]   lists every key and its meaning
       refkl check CONFIG.yaml [--key value ...]     verifies the reference without training
       refkl plan --model DIR [--world-size N] [--backend NAME] [--method full|lora] [--memory 80GiB]
                                                     the memory of a run on each rank; needs no weights
       refkl compare A B --data FILE [--sample] [--kind reverse_kl,jsd,...] [--output DIR]
                                                     the exact KL between two checkpoints, on text or on A's samples
       refkl export RUN [--merge] [--output DIR]     a run's trained policy as a model folder
       refkl report RUN [RUN ...] [--png] [--output FILE]
                                                     one HTML page of runs, or one picture
       refkl --version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    The status is 0 for success, 1 for a check that found a fault or a run that could not continue, 2 for an input that
    cannot be used, and 130 for a run that was stopped.
    """
    arguments = _without_local_rank(list(sys.argv[1:] if argv is None else argv))
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    print_uncaught_failures()
    with Interruptible():
        return _run(command, rest)
    return 130


def _run(command: str, rest: list[str]) -> int:
    try:
        if command == "train":
            from refkl.cli.settings import parse_run
            from refkl.cli.train import train

            return train(parse_run(rest))
        if command == "check":
            from refkl.cli.check import check
            from refkl.cli.settings import parse_run

            return check(parse_run(rest))
        if command == "plan":
            from refkl.cli.plan import plan_command

            return plan_command(rest)
        if command == "compare":
            from refkl.cli.compare import compare_command

            return compare_command(rest)
        if command == "export":
            from refkl.cli.export import export_command

            return export_command(rest)
        if command == "report":
            from refkl.cli.report import report_command

            return report_command(rest)
        if command == "--version":
            from refkl import __version__

            print(__version__)
            return 0
        if command in ("-h", "--help"):
            print(USAGE)
            return 0
        from refkl.messages import unknown

        raise unknown("command", command, ["train", "check", "plan", "compare", "export", "report"])
    except (ValueError, ModuleNotFoundError, RunError) as error:
        if os.environ.get("REFKL_TRACEBACK"):
            raise
        print_failure(f"refkl: error: {error}\n(REFKL_TRACEBACK=1 in the environment shows where)")
        return 1 if isinstance(error, RunError) else 2


def _without_local_rank(arguments: list[str]) -> list[str]:
    """Remove `--local_rank=N`, which the deepspeed launcher puts first; the rank is in the environment."""
    kept = []
    for argument in arguments:
        if match := re.fullmatch(r"--local[-_]rank=(\d+)", argument):
            os.environ.setdefault("LOCAL_RANK", match[1])
        else:
            kept.append(argument)
    return kept
