"""Every printed command runs, or is on a list of exceptions that says why not.

A command runs as it is printed, in a copy of the shipped files, with options appended that make it small. By default
`refkl …` and `python …` run in this process with tiny models, and some launched commands in processes of their own.
With --slow every command runs as a process in a shell, with the demo's model, and its seconds are printed.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from support.launching import ROOT, run
from support.printed_commands import (
    MADE_BY,
    SAVES,
    TASK,
    as_run,
    as_shipped,
    clear,
    in_markdown,
    launched,
    make_scratch,
    makers,
    overrides,
    printed_commands,
    trained_config,
)

from refkl import __version__
from refkl.cli import main
from refkl.cli.settings import parse_run

EXCEPTIONS = {
    r"bash launch/(quickstart|test|docs)\.sh.*": "It makes an environment; CI runs launch/test.sh and launch/docs.sh.",
    r"pip install .*": "It changes the environment that the tests run in.",
    r"\.venv/bin/mkdocs serve": "It never ends.",
    r"(\w+=\S+ )?sbatch .*": "There is no Slurm here.",
    r".* --device cuda\b.*": "There is no GPU here.",
    r"(\w+=\S+ )?python -m pytest .*": "It runs these tests.",
}
"""Printed commands that no test runs, as patterns, with the reason."""
PRINTED = printed_commands()
RUN = [command for command in PRINTED if not any(re.fullmatch(pattern, command) for pattern in EXCEPTIONS)]
LAUNCHED_BY_DEFAULT = [
    "accelerate launch --config_file launch/accelerate/zero3.yaml -m refkl train configs/zero3.yaml",
]
QUICK = [c for c in RUN if re.match(r"refkl |python (examples|docs)/|source ", c) or c in LAUNCHED_BY_DEFAULT]
"""Commands that run by default."""
SLOW_TIMEOUT = 900


@dataclass
class Place:
    """A folder to run commands in, and the commands that have run there."""

    folder: Path
    is_tiny: bool
    done: set[str] = field(default_factory=set)

    def run(self, printed: str, run: Callable[[str, Path], str]) -> None:
        """Run a command once, after those that make what it needs, and check what it leaves behind."""
        for maker in makers(as_run(printed), self.folder):
            self._run(maker, run)
        if printed not in self.done:
            self._run(printed, run)

    def _run(self, printed: str, run: Callable[[str, Path], str]) -> None:
        clear(self.folder)
        check(printed, run(printed, self.folder), self.folder, is_tiny=self.is_tiny)
        self.done.add(printed)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("tiny")
    return Place(make_scratch(folder, folder / "models" / "shallow"), is_tiny=True)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Place:
    from refkl.demo.smollm2 import model_folder

    return Place(make_scratch(tmp_path_factory.mktemp("real"), Path(model_folder())), is_tiny=False)


@pytest.mark.parametrize("printed", QUICK, ids=str)
def test_printed_command_runs(
    printed: str, tiny: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.folder)
    monkeypatch.syspath_prepend(tiny.folder)

    def run_here(printed: str, scratch: Path) -> str:
        if not re.match(r"refkl |python ", printed):
            return _run_in_shell(printed, scratch, is_tiny=True)
        words = [*shlex.split(as_run(printed)), *overrides(printed, scratch, tiny=True)]
        monkeypatch.setattr(sys, "argv", words[1:])
        capfd.readouterr()
        status = _status(words)
        output = "".join(capfd.readouterr())
        assert status == 0, f"exit {status}: {shlex.join(words)}\n{output[-6000:]}"
        return output

    tiny.run(printed, run_here)


def _status(words: list[str]) -> int:
    """Run a command in this process, and return its exit status."""
    try:
        if words[0] == "refkl":
            return main(words[1:])
        runpy.run_path(words[1], run_name="__main__")
        return 0
    except SystemExit as ended:  # of --help
        return int(ended.code or 0)


@pytest.mark.slow
@pytest.mark.timeout(3 * SLOW_TIMEOUT)
@pytest.mark.parametrize("printed", RUN, ids=str)
def test_printed_command_runs_in_a_shell(
    printed: str, real: Place, record_property: Callable[[str, Any], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def run_timed(printed: str, scratch: Path) -> str:
        start = time.monotonic()
        output = _run_in_shell(printed, scratch, is_tiny=False)
        seconds = time.monotonic() - start
        record_property(printed, round(seconds, 1))
        with capfd.disabled():
            print(f"\n{seconds:7.1f} s  {printed}", flush=True)
        return output

    real.run(printed, run_timed)


def _run_in_shell(printed: str, scratch: Path, *, is_tiny: bool) -> str:
    line = " ".join([as_run(printed), *map(shlex.quote, overrides(printed, scratch, tiny=is_tiny))])
    environment = {"TRANSFORMERS_VERBOSITY": "info"} if kind_of(printed) == "example" else {}
    if kind_of(printed) == "benchmark":
        environment["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than all else that a small benchmark does
    options: dict[str, Any] = {} if is_tiny else {"timeout": SLOW_TIMEOUT}
    return run(["bash", "-c", line], cwd=scratch, **options, **environment)


# what a command leaves behind


def check(printed: str, output: str, scratch: Path, *, is_tiny: bool) -> None:
    """Assert that a command did what it is for."""
    kind = kind_of(printed)
    if kind == "train":
        _check_trained(printed, output, scratch, is_tiny)
    elif kind == "example":
        _check_example(printed, output, scratch)
    else:
        CHECKS[kind](shlex.split(as_run(printed)), output, scratch)


def kind_of(printed: str) -> str:
    """Return which of the checks is for a command."""
    if trained_config(printed) is not None:
        return "train"
    for pattern, kind in (
        (r"(python|accelerate launch .*) examples/\w+\.py", "example"),
        (r"python benchmarks/\w+\.py", "benchmark"),
        (r"python docs/figures\.py", "figures"),
        (r"refkl train (--\w+\.help|--help)", "help"),
        (r"refkl --version", "version"),
        (r"refkl (check|plan|compare|export|report) ", "{}"),
        (r"source ", "source"),
    ):
        if found := re.match(pattern, printed):
            return kind.format(*found.groups())
    raise AssertionError(f"nothing says what this command is to do, add it to kind_of: {printed}")


def _check_trained(printed: str, output: str, scratch: Path, is_tiny: bool) -> None:
    config = str(trained_config(printed))
    values = yaml.safe_load((scratch / config).read_text())
    folder = scratch / values["trainer"]["output_dir"]
    asked = launched(printed)
    if asked is not None:
        assert re.search(rf"policy: .*\b{asked[1]} process", output), output[-3000:]
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kl = {line["step"]: line["kl"] for line in lines if "loss" in line}
    two_steps = printed != SAVES and (is_tiny or "--resume" in printed)
    assert list(kl) == ([1, 2] if two_steps else [1])
    assert kl[1] == 0.0
    if two_steps and config.startswith("configs/"):
        assert abs(kl[2]) > 0.0
    reference = json.loads((folder / "reference.json").read_text())
    assert reference["status"] == "finished"
    if (strategy := values["reference"]["strategy"]) != "auto":
        assert reference["before"]["strategy"] == strategy
    assert (folder / "model" / "model.safetensors").exists() != ("peft" in values)
    assert (folder / "report.html").stat().st_size > 1e5
    samples = (folder / "samples.jsonl").read_text().splitlines()
    assert len(samples) >= (4 if is_tiny and as_shipped(printed) else 1)


def _check_example(printed: str, output: str, scratch: Path) -> None:
    if "own_loop" in printed:
        kl = re.findall(r"^step 1 .* KL ([-\d.e]+) nats", output, re.MULTILINE)
    else:
        kl = re.findall(r"'kl': '?([-\d.e]+)", output)
        name = re.search(r"(\w+)\.py", printed)
        assert name is not None and (scratch / "runs" / name[1] / "model.safetensors").exists()
    assert [float(value) for value in kl] == [0.0]  # one process of a launch prints
    if (asked := launched(printed)) is not None:  # a batch of four in each of two processes
        assert ("2 processes" if "own_loop" in printed else "distributed & accumulation) = 8\n") in output
        assert ("DeepSpeed ZeRO-3" in output) == (asked[0] == "zero3")


def _check_help(words: list[str], output: str, scratch: Path) -> None:
    assert ("--kl.coef" if "--help" in words else "--reward.function") in output


def _check_version(words: list[str], output: str, scratch: Path) -> None:
    assert output.strip().endswith(__version__)


def _check_checked(words: list[str], output: str, scratch: Path) -> None:
    assert "nothing wrong was found" in output


def _check_plan(words: list[str], output: str, scratch: Path) -> None:
    if "--json" in words:
        assert json.loads(output[output.index("\n{") if not output.startswith("{") else 0 :])["plans"]
        return
    assert re.search(r"^auto: \w+", output, re.MULTILINE) and re.search(r"^(take|no way): ", output, re.MULTILINE)
    if "llama-8b" in words:  # docs/planner.md has what it prints
        page = (ROOT / "docs/planner.md").read_text(encoding="utf-8")
        shown = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0].split()
        assert output.split()[-len(shown) :] == shown


def _check_compare(words: list[str], output: str, scratch: Path) -> None:
    found = re.search(r"written to (\S+)", output)
    assert found is not None
    results = json.loads((scratch / found[1] / "compare.json").read_text())["results"]
    kinds = words[words.index("--kind") + 1].split(",") if "--kind" in words else ["reverse_kl"]
    assert set(kinds) <= set(results)
    for kind in kinds:
        mean = results[kind]["per_token"]["mean"]
        # After the one step of these runs a policy may be where it began: equal rewards have no gradient.
        assert mean == 0.0 if words[2:4] == ["A", "B"] else mean >= 0.0


def _check_export(words: list[str], output: str, scratch: Path) -> None:
    found = re.search(r"exported to (\S+?);? ", output)
    assert found is not None
    assert (scratch / found[1] / "model.safetensors").exists() and (scratch / found[1] / "config.json").exists()


def _check_report(words: list[str], output: str, scratch: Path) -> None:
    assert (scratch / output.split()[-1]).stat().st_size > 1e4


def _check_benchmark(words: list[str], output: str, scratch: Path) -> None:
    assert "refkl" in output
    for option in {"--json", "--plot"} & set(words):
        assert (scratch / words[words.index(option) + 1]).stat().st_size > 100


def _check_figures(words: list[str], output: str, scratch: Path) -> None:
    names = {path.name for path in (ROOT / "docs/images").glob("kl_*.png")}
    assert names and names == {path.name for path in (scratch / "docs/images").glob("kl_*.png")}


def _check_source(words: list[str], output: str, scratch: Path) -> None:
    assert output.strip().endswith("bin/refkl")


CHECKS: dict[str, Callable[[list[str], str, Path], None]] = {
    "help": _check_help,
    "version": _check_version,
    "check": _check_checked,
    "plan": _check_plan,
    "compare": _check_compare,
    "export": _check_export,
    "report": _check_report,
    "benchmark": _check_benchmark,
    "figures": _check_figures,
    "source": _check_source,
}


# the lists


def test_every_exception_is_of_a_printed_command() -> None:
    assert not [pattern for pattern in EXCEPTIONS if not any(re.fullmatch(pattern, c) for c in PRINTED)]
    assert set(LAUNCHED_BY_DEFAULT) | set(MADE_BY.values()) | {SAVES, TASK} <= set(RUN)


def test_every_printed_command_has_a_check() -> None:
    places = [place.split(":")[0] for command in PRINTED for place in PRINTED[command]]
    assert len(PRINTED) > 100 and {"README.md", "docs/getting-started.md", "refkl --help"} <= set(places)
    for command in RUN:
        kind_of(command)


def test_every_config_is_trained_by_a_printed_command() -> None:
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml")}
    assert shipped <= {trained_config(command) for command in RUN}


def test_launched_commands_are_understood(monkeypatch: pytest.MonkeyPatch, tiny: Place) -> None:
    """The launcher's options and the configuration, for those that run only with --slow."""
    monkeypatch.chdir(tiny.folder)
    later = [command for command in RUN if launched(command) is not None and command not in QUICK]
    assert len(later) > 10
    for command in later:
        if command.startswith("accelerate"):
            file = launch_command_parser().parse_args(shlex.split(command)[2:]).config_file
            assert Path(file).exists(), f"there is no {file}: {command}"
    for rest in {command.partition(" train ")[2] for command in later} - {""}:
        parse_run(shlex.split(rest))


@pytest.mark.parametrize(
    "text, commands",
    [
        ("Prose of refkl train configs/a.yaml.\n", []),
        ("`refkl train`, `refkl check CONFIG`, `python x.py\n--all`\n", ["refkl check CONFIG", "python x.py --all"]),
        ("```bash\nrefkl plan \\\n    --json  # all\nls\n# ls -l\n```\n", ["refkl plan --json", "ls"]),
        ("```\nsome output\nrefkl train a.yaml    (CPU)\n```\n", ["refkl train a.yaml"]),
        ("Text:\n\n    pip install -e .\n", ["pip install -e ."]),
    ],
)
def test_commands_are_found_in_markdown(text: str, commands: list[str]) -> None:
    assert [command for command, _ in in_markdown(text)] == commands
