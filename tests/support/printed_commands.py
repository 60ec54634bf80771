"""Commands that README.md, docs/, the heads of shipped files and `refkl --help` print, and how tests run them.

A command is printed in one of these places:

- a line of a code block of a Markdown file (every line of a ```bash block is one),
- inline code of a Markdown file, if it is a whole command (`refkl train` is only a name),
- a comment in configs/ or launch/, or the docstring at the top of a script in examples/ or benchmarks/,
- the usage that `refkl --help` prints.

Two spaces or `#` end a command. A backslash at the end of a line continues it.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from support.launching import ROOT, free_port
from support.train_inputs import config_models
from transformers import LlamaConfig

from refkl.cli import USAGE

_SUBCOMMANDS = "train|check|plan|compare|export|report"
COMMAND = re.compile(
    r"(?:[A-Z][A-Z_]*=\S+ )*"
    rf"(?:refkl (?:(?:{_SUBCOMMANDS}) \S|--\w)|accelerate launch -|deepspeed --|python3? (?:-m )?[\w./]+(?:\.py| )"
    r"|bash [\w./]|sbatch (?:-|\S+\.sbatch)|torchrun -|(?:\S+/)?mkdocs \w|pip install |source \.)"
)
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_SHELLS = ("bash", "sh", "shell")
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")

Found = Iterator[tuple[str, int]]
"""Commands, each with the line that it begins in."""


def printed_commands() -> dict[str, list[str]]:
    """Return every printed command with the places where it is printed, as in "README.md:45"."""
    commands: dict[str, list[str]] = {}
    for path in [ROOT / "README.md", *_files("docs", "**/*.md")]:
        _add(commands, path, in_markdown(path.read_text(encoding="utf-8")))
    for path in [*_files("configs", "*.yaml"), *_files("launch", "**/*")]:
        _add(commands, path, _of_lines(_comments(path.read_text(encoding="utf-8")), COMMAND.search))
    for path in [*_files("examples", "*.py"), *_files("benchmarks", "*.py")]:
        _add(commands, path, _of_docstring(path.read_text(encoding="utf-8")))
    for command, _ in _of_lines(USAGE.splitlines(), COMMAND.search):
        commands.setdefault(command, []).append("refkl --help")
    return commands


def _files(folder: str, pattern: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).glob(pattern) if path.is_file())


def _add(commands: dict[str, list[str]], path: Path, found: Found) -> None:
    for command, line in found:
        commands.setdefault(command, []).append(f"{path.relative_to(ROOT)}:{line}")


def in_markdown(text: str) -> Found:
    """Yield the commands of a Markdown text."""
    for block in _FENCE.finditer(text):
        begins = re.compile(r"[^#\s]").match if block[1] in _SHELLS else COMMAND.match
        yield from _of_lines(block[2].splitlines(), begins, text[: block.start(2)].count("\n") + 1)
    prose = _FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    lines = prose.splitlines()
    indented = [line[4:] if line.startswith("    ") else "" for line in lines]
    yield from _of_lines(indented, COMMAND.match)
    for code in _INLINE.finditer(prose):
        if COMMAND.match(command := " ".join(code[1].split())):
            yield command, prose[: code.start()].count("\n") + 1


def _of_docstring(source: str) -> Found:
    first = ast.parse(source).body[0]
    lines = source.splitlines()[: first.end_lineno]  # as they are written: Python takes out a backslash at a line's end
    return _of_lines([line.lstrip('"') for line in lines], COMMAND.search)


def _comments(text: str) -> Iterator[str]:
    """Yield the comment of each line; an empty text for a line without one."""
    for line in text.splitlines():
        comment = re.search(r"(?:^|\s)#(?!!)\s?(.*)", line)
        yield "" if comment is None else comment[1]


def _of_lines(lines: Iterable[str], find: Any, first: int = 1) -> Found:
    """Yield the commands that `find` finds in lines; `first` is the number of the first line."""
    joined, begun = "", first
    for number, line in enumerate(lines, first):
        begun = begun if joined else number
        joined += line.strip().removeprefix("$ ")
        if joined.endswith("\\"):
            joined = joined[:-1].rstrip() + " "
            continue
        if found := find(joined):
            yield _without_prose(joined[found.start() :]), begun
        joined = ""


def _without_prose(text: str) -> str:
    command = re.split(r"\s{2,}|\s#", text)[0].rstrip()
    return re.sub(r"(?<=[\w'])\.$", "", command)


TRANSLATIONS: list[tuple[str, str, str]] = [
    (r"\[RUN \.\.\.\]", "runs/no_kl", "a usage: another run"),
    (r"\[([^\[\]]*)\]", r"\1", "a usage: optional parts are given"),
    (r"[ ,]?(?:\.\.\.|…)", "", "a usage: one of several is enough"),
    (r"\b(\w+)(?:\|\w+)+", r"\1", "a usage: the first of the choices"),
    (r"--key value", "--kl.coef 0.1", "a usage: any key"),
    (r"--world-size N\b", "--world-size 8", "a usage: a number"),
    (r"--backend NAME\b", "--backend zero3", "a usage: a name"),
    (r"--data FILE\b", "--data prompts.jsonl", "a usage: a file with data"),
    (r"--output DIR\b", "--output written", "a usage: a folder that does not exist yet"),
    (r"--output FILE\b", "--output written.png", "a usage: a file that does not exist yet"),
    (r"\bCHECKPOINT\b", "runs/dpo/checkpoint-1", "a usage: a checkpoint"),
    (r"^source .*", r"\g<0> && command -v refkl", "which refkl is found then?"),
    (r"\bcheckpoint-50\b", "checkpoint-1", "the run that saves it stops after one step"),
    (r"--num_(?:gpus|accelerators) \d+", "--num_accelerators 2", "two processes, and no GPU"),
    (r"--num_processes \d+", "--num_processes 2", "two processes"),
    (
        r"(accelerate/fsdp2\.yaml.*) -m refkl ",
        rf"\1 {ROOT}/tests/scripts/train_fsdp2.py ",
        "accelerate selects no FSDP on a CPU",
    ),
    (r"^accelerate launch ", "accelerate launch --main_process_port {port} ", "launches of other tests"),
    (r"^deepspeed ", "deepspeed --master_port {port} ", "launches of other tests"),
]
"""Differences between a printed command and the one that is run: a pattern, its replacement, and the reason."""


def as_run(command: str) -> str:
    """Return the command that is run for a printed one."""
    for pattern, replacement, _ in TRANSLATIONS:
        command = re.sub(pattern, replacement, command)
    return command.replace("{port}", str(free_port())) if "{port}" in command else command


def launched(command: str) -> tuple[str, int] | None:
    """Return the backend and the number of processes that a command asks for as it is run; None for one process."""
    if command.startswith("deepspeed "):
        return "zero3", 2
    if (file := re.search(r"^accelerate launch .*?--config_file (\S+)", command)) is None:
        return None
    backends = {"single": "plain", "multi": "ddp"}
    name = Path(file[1]).stem
    return backends.get(name, name), 1 if name == "single" else 2


def trained_config(command: str) -> str | None:
    """Return the configuration file that a `refkl train` command names."""
    found = re.search(r"\btrain (\S+\.yaml)", command)
    return None if found is None else found[1]


BENCHMARKS = {
    "fingerprint": "--mib 8",
    "kernels": "--shapes 16x8x50 --rounds 1 --no-memory",
    "scoring": "--hidden 64 --layers 1 --vocabulary 300 --rounds 2 --most 300",
    "step": "--hidden 64 --layers 1 --vocabulary 300 --prompt 4 --completion 8 --rounds 2 --no-memory",
    "sync": "--layers 1 --rounds 1",
}
"""Options that make a benchmark small."""

LETTERS = {"function": "support.train_inputs:letters"}
"""A reward that random text can win, so that tiny models learn something."""
TASK = "refkl train configs/verifiable.yaml --data.source reasoning_gym:leg_counting ..."
"""The command whose "..." is said in words."""
SAVES = (
    "refkl train configs/dpo.yaml --trainer.save_strategy steps --trainer.save_steps 50 --trainer.save_total_limit 1"
)
"""The command whose checkpoint others resume from."""


def overrides(command: str, scratch: Path, *, tiny: bool) -> list[str]:
    """Return the options that are appended to a command, so that it takes seconds; `tiny`: with a tiny model too."""
    words = shlex.split(command)
    script = next((Path(word) for word in words if word.endswith(".py") and not word.startswith("/")), None)
    if script is not None and script.parts[0] == "benchmarks":
        return BENCHMARKS[script.stem].split()
    if script is not None and script.parts[0] == "examples":
        return ["--steps", "1", "--batch", "4", *(["--model", "MODEL"] if tiny and "--model" not in words else [])]
    if words[:2] == ["refkl", "check"]:
        return ["--model.path", "MODEL"] if tiny else []
    if words[:2] == ["refkl", "compare"] and "pairs.jsonl" not in words:
        return ["--max-new-tokens", "8"]
    if (config := trained_config(command)) is None:
        return []
    values = yaml.safe_load((scratch / config).read_text())
    return [*_size(command, values, tiny), *_inputs(command, values, tiny), *_launch(command)]


def as_shipped(command: str) -> bool:
    """Return whether a command trains with a shipped configuration as it is."""
    return command.endswith(f" train {trained_config(command)}") and "configs/" in command


def _size(command: str, values: dict[str, Any], tiny: bool) -> list[str]:
    saved = 1 if command == SAVES else 2
    steps = ["--trainer.max_steps", str(saved if tiny or "--resume" in command else 1)]
    if command == SAVES:
        steps += ["--trainer.save_steps", "1"]
    if tiny and as_shipped(command):
        return steps
    sizes = {"--samples.prompts": "1", "--trainer.per_device_train_batch_size": "4", "--trainer.logging_steps": "1"}
    if values["method"] in ("grpo", "rloo"):
        sizes |= {"--trainer.num_generations": "4", "--trainer.max_completion_length": "8"}
    return [*steps, *(part for option in sizes.items() for part in option)]


def _inputs(command: str, values: dict[str, Any], tiny: bool) -> list[str]:
    task = {"task": "leg_counting", "answer": "whole"}
    rewards = [task] if command == TASK else values.get("reward", [])
    given = ["--data.kwargs", '{"size": 40, "chat": true, "max_animals": 3}'] if command == TASK else []
    if not tiny:
        return [*given, "--reward", f"[{task}]"] if command == TASK else given
    # Layers by number: the model has as many as the one that the file was written for.
    deep = "model.layers." in str(values) or "layers_to_transform" in str(values)
    given += ["--model.path", "models/deep" if deep else "MODEL"]
    if rewards:
        small = [{**reward, "model": "models/reward"} if "model" in reward else reward for reward in rewards]
        given += ["--reward", yaml.safe_dump([*small, LETTERS], default_flow_style=True, width=10**6).strip()]
    return given


def _launch(command: str) -> list[str]:
    """Return options with which refkl refuses a launch that gave something else than was asked for."""
    if (asked := launched(command)) is None:
        return []
    return ["--launch.backend", asked[0], "--launch.processes", str(asked[1])]


MODELS = ("MODEL", "DIR", "FOLDER", "A", "B", "path/to/model", "models/start")
"""Names that stand for a model folder."""
MADE_BY = {
    "runs/quickstart": "refkl train configs/quickstart.yaml",
    "RUN": "refkl train configs/quickstart.yaml",
    "runs/no_kl": "refkl train configs/no_kl.yaml",
    "runs/mine": "refkl train mine.yaml --kl.coef 0.1",
    "runs/dpo/checkpoint-1": SAVES,
}
"""Paths that commands name, each with the printed command that makes it."""
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def make_scratch(folder: Path, model: Path) -> Path:
    """Make a folder in which every printed command can be run: copies of what is shipped, and all that commands name.

    Args:
        folder: an empty folder.
        model: the model folder that MODELS become.
    """
    for name in ("configs", "launch", "deepspeed", "examples", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "out", "*.png"))
    (folder / ".venv").symlink_to(sys.prefix)
    config_models(folder / "models")
    for name in MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(model)
    LlamaConfig(**LLAMA_8B).save_pretrained(folder / "llama-8b")
    (folder / "RUN").symlink_to("runs/quickstart")
    for name in ("CONFIG", "CONFIG.yaml"):
        shutil.copy(ROOT / "configs/dpo.yaml", folder / name)
    page = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    (folder / "mine.yaml").write_text("".join(re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)))
    (folder / "my_rewards.py").write_text(
        "def helpful(completions, **columns):\n    return [len(set(text)) / 8 for text in completions]\n"
    )
    rows = [{"prompt": text} for text in ("The film is", "I liked", "It begins", "Of all")]
    answers = [{**row, "completion": " a good one"} for row in rows]
    for name, data in (("prompts.jsonl", rows), ("pairs.jsonl", answers)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in data))
    return folder


def clear(scratch: Path) -> None:
    """Delete what export and compare refuse to write over."""
    for path in (*scratch.glob("compare-*"), *scratch.glob("written*"), *scratch.glob("runs/*/export")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def makers(command: str, scratch: Path) -> list[str]:
    """Return the printed commands that have to run before a command as it is run."""
    words = shlex.split(command)
    needed = [path for path in MADE_BY if path in words]
    if "--resume" in words:
        needed.append("runs/dpo/checkpoint-1")
    return list(dict.fromkeys(MADE_BY[path] for path in needed if not (scratch / path).exists()))
