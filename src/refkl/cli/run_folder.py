"""The folder of a run: resolved configuration, metrics, samples, and a record of its reference."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from refkl.backend import full_shape
from refkl.checkpoint import disk_failure
from refkl.cli.samples import sample_texts
from refkl.cli.tables import first_to_last
from refkl.config import RunConfig
from refkl.files import read_json, write_json, write_text
from refkl.freezing import trainable_parameters
from refkl.messages import RunError
from refkl.output_folder import renamed
from refkl.versions import library_versions

_FILES = ("config.yaml", "samples.jsonl", "reference.json", "model", "report.html", "report.png")
"""What a run writes into its folder besides metrics.jsonl, which says that there was a run, and checkpoints."""


class RunFolder:
    """The files of one run. Only the main process writes."""

    def __init__(self, path: str | Path, *, write: bool, forgiving: bool = False) -> None:
        self.path = Path(path)
        self.write = write
        self.forgiving = forgiving
        """True if a full disk loses lines of the logs instead of ending the run."""
        self.resumed: dict[str, Any] = {}
        """reference.json of the resumed run, on every rank."""

    def start(self, resolved: str, *, resumed: bool) -> None:
        """Write the configuration and empty metrics and samples. An earlier run in the folder is renamed.

        A resumed run continues in the folder that it finds.
        """
        if resumed and (self.path / "reference.json").is_file():
            self.resumed = _run_record(self.path / "reference.json")
        if not self.write:
            return
        if self.resumed:
            write_text(self.path / "config.yaml", resolved)
            return
        if (self.path / "metrics.jsonl").is_file() and (self.path / "metrics.jsonl").stat().st_size:
            if resumed:
                raise ValueError(
                    f"{self.path} has a metrics.jsonl but no reference.json, so the run to resume is not known. Put "
                    "reference.json back, or resume with another trainer.output_dir."
                )
            self._set_aside()
        self._check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        # First, since it says that the other files are a run's.
        self._json("reference.json", {"versions": library_versions(), "status": "running"})
        write_text(self.path / "config.yaml", resolved)
        for name in ("metrics.jsonl", "samples.jsonl"):
            write_text(self.path / name, "")

    def _check_free(self) -> None:
        """Raise ValueError if the run would overwrite files that are not an earlier run's."""
        found = [name for name in _FILES if os.path.lexists(self.path / name)]
        record = self.path / "reference.json"
        if found and not (record.is_file() and {"versions", "status"} <= read_json(record).keys()):
            raise ValueError(
                f"{self.path} holds {found[0]!r}, which is of no earlier run and would be overwritten. Choose another "
                "trainer.output_dir."
            )

    def begin(self, reference: dict[str, Any], step: int, *, initial: bool = False) -> list[dict[str, Any]]:
        """Record the reference before the first step. Return the logged training steps that remain if resumed at
        `step`.

        Args:
            reference: the reference's provenance.
            step: number of training steps so far.
            initial: True if the run was resumed with resume.reference "initial", so it may have another reference.

        Raises:
            ValueError: the run is resumed with another reference than it had.
        """
        recorded = None if initial else self.resumed.get("before")
        if recorded is not None and not reference["updates"] and recorded["fingerprint"] != reference["fingerprint"]:
            raise ValueError(
                f"{self.path} was trained against the reference {recorded['fingerprint'][:12]} from "
                f"{recorded['source']}, and this resumed run has {reference['fingerprint'][:12]}: its model's folder "
                "has changed. Resume from the same model, or start another run folder."
            )
        kept = self._trim(step) if self.resumed else []
        if self.write:
            record = read_json(self.path / "reference.json")
            before = {} if initial else {"before": reference}
            after = {"before": reference} if initial else {}
            self._json("reference.json", {**before, **record, **after, "status": "running"})
        return kept

    def _trim(self, step: int) -> list[dict[str, Any]]:
        """Drop lines logged after the checkpoint, and return the training steps that remain."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            lines = read_lines(self.path / name)
            lines = [line for line in lines if _step_of(line, self.path / name) <= step]
            if name == "metrics.jsonl":
                kept = [line for line in lines if "loss" in line]
            if self.write:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                write_text(self.path / name, text)
        return kept

    def fail(self) -> None:
        """Record that training ended with an error."""
        if self.write:
            record = read_json(self.path / "reference.json")
            self._json("reference.json", {**record, "status": "failed"})

    def finish(self, reference: dict[str, Any], updates: list[dict[str, Any]], *, stopped: bool) -> None:
        """Record the reference after training."""
        if self.write:
            record = read_json(self.path / "reference.json")
            status = "stopped" if stopped else "finished"
            self._json("reference.json", {**record, "after": reference, "updates": updates, "status": status})

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one line of JSON to a file."""
        if not self.write:
            return
        try:
            with (self.path / name).open("a") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            if (failure := disk_failure(error)) is None:
                raise
            message = f"{self.path / name} could not be written ({failure})."
            if not self.forgiving:
                raise RunError(message) from error
            warnings.warn(f"{message} Training goes on without that line.", stacklevel=2)

    def _json(self, name: str, record: dict[str, Any]) -> None:
        write_json(self.path / name, record, ascii_only=False)

    def _set_aside(self) -> None:
        """Rename an earlier run of the same name, adding a number."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        os.replace(self.path, aside)
        renamed(self.path, aside)


def _run_record(path: Path) -> dict[str, Any]:
    """Read a run's reference.json.

    Raises:
        ValueError: it is damaged.
    """
    record = read_json(path)
    if (before := record.get("before")) is not None:
        fields = [before.get(name) for name in ("fingerprint", "source")] if isinstance(before, dict) else [None]
        if not all(isinstance(value, str) for value in fields):
            raise ValueError(f"{path} is damaged: 'before' has no fingerprint and source.")
    return record


def _step_of(line: Any, path: Path) -> int:
    found = line.get("reference_update", line) if isinstance(line, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ValueError(f"{path} is damaged: a line has no step.")
    step: int = found["step"]
    return step


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line. The last line may have been cut short by a kill.

    Raises:
        ValueError: a line before the last is damaged.
    """
    # str.splitlines also splits at characters that a sample may hold. Reads bytes, since the last character may be cut.
    texts = path.read_bytes().removesuffix(b"\n").split(b"\n")
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
            if number < len(texts):
                raise ValueError(f"{path} is damaged in line {number}.") from None
    return lines


class RunRecorder(TrainerCallback):
    """Writes metrics and samples during a run, and shows a progress bar with reward and KL."""

    def __init__(
        self, trainer: Any, folder: RunFolder, config: RunConfig, prompts: list[Any], console: Console
    ) -> None:
        self.trainer = trainer
        self.folder = folder
        self.samples = config.samples
        self.prompts = prompts
        self.console = console
        self.before: dict[str, Any] = {}
        self.digests: dict[str, str] = {}
        self.updates: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        self._bar: Progress | None = None
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        # The policy is prepared by now, and the reference has followed it to its device and dtype.
        self.trainer.reference.verify()
        self.before = self.trainer.reference.provenance()
        self.digests = dict(self.trainer.reference.digests)
        initial = self.trainer.resume_reference == "initial"
        self.metrics = self.folder.begin(self.before, state.global_step, initial=initial)
        if self.trainer.sync is not None:
            self.updates = list(self.trainer.sync.updates)  # those of the resumed run
        if state.global_step == 0:
            self._sample(0)
        if self.folder.write:
            if self.console.is_terminal:
                columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
                self._bar = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.console)
                self._bar.start()
                self._bar.add_task("training", total=state.max_steps, status="")
            parameters = sum(full_shape(p).numel() for p in trainable_parameters(self.trainer.model))
            self.console.print(f"{state.max_steps} steps, {parameters:,} parameters train")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sync = self.trainer.sync
        if sync is not None and len(sync.updates) > len(self.updates):
            record = sync.updates[-1]  # the same dict as in the checkpoints
            if sync.config.every != 1:  # a fingerprint reads all weights: too slow for each step
                record["fingerprint"] = self.trainer.reference.fingerprint()
            self.updates.append(record)
            self.folder.append("metrics.jsonl", {"reference_update": record})
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)
        every = self.samples.every or max(1, state.max_steps // 2)
        if state.global_step % every == 0 and state.global_step < state.max_steps:
            self._sample(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs:
            return
        logs = self._by_our_names(logs)
        histogram = self.trainer.kl_state.histogram if "loss" in logs else None
        spread = {} if histogram is None else {"kl/log_ratio": histogram.trimmed()}
        self.folder.append("metrics.jsonl", {"step": state.global_step, **logs, **spread})
        if "loss" in logs:
            self.metrics.append({"step": state.global_step, **logs})
            line = f"step {state.global_step}/{state.max_steps}  {self._status(logs)}"
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], status=self._status(logs))
            elif self.folder.write:
                self.console.print(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._sample(state.global_step)

    def changed_weight(self) -> str | None:
        """Return the first weight of the reference that changed during training without a sync, or None."""
        if self.updates:
            return None
        now = self.trainer.reference.digests
        return next((name for name, digest in self.digests.items() if now.get(name) != digest), None)

    def closing_line(self, stopped: bool) -> str:
        """Return a line with reward and KL in the first and the last logged steps, and the time."""
        seconds = time.perf_counter() - self._started
        parts = []
        for key, name, unit in (
            ("reward", "reward", ""),
            ("rewards/margins", "margin", ""),
            ("kl", "KL", " nats per token"),
        ):
            values = [m[key] for m in self.metrics if m.get(key) is not None]
            if values:
                first, last = first_to_last(values)
                parts.append(f"{name} {first:.3g} → {last:.3g}{unit}")
        verb = "stopped" if stopped else "finished"
        steps, every = self.trainer.state.global_step, self.trainer.args.logging_steps
        said = ", ".join(parts) or f"nothing was logged (trainer.logging_steps is {every:g})"
        return f"{verb} after {steps} step{'s' if steps != 1 else ''}, {seconds:.0f} s: {said}"

    def _by_our_names(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Rename metrics so that "kl" is always the KL per token of the data. KTO's own "kl" is of mismatched pairs."""
        name = self.trainer.kl_metric
        if name == "kl":
            return logs
        renamed = {
            f"{mode}{old}": f"{mode}{new}"
            for mode in ("", "eval_")
            for old, new in ((name, "kl"), ("kl", "kl/mismatched"))
        }
        return {renamed.get(key, key): value for key, value in logs.items()}

    @staticmethod
    def _status(logs: dict[str, Any]) -> str:
        keys = (("reward", "reward"), ("rewards/margins", "margin"), ("loss", "loss"), ("kl", "KL"))
        return "  ".join(f"{name} {logs[key]:.4g}" for key, name in keys if logs.get(key) is not None)

    def _sample(self, step: int) -> None:
        """Generate at the fixed prompts. Every rank must call this; the main one writes."""
        if not self.prompts:
            return
        for record in sample_texts(self.trainer, self.samples, self.prompts):
            self.folder.append("samples.jsonl", {"step": step, **record})


class Stopper(TrainerCallback):
    """Ends the run after the present step on Ctrl-C (or SIGTERM), on every rank; a second one ends it at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.stopped = False
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        # Only a second signal of the same kind ends the run at once: on Ctrl-C the terminal sends SIGINT, and then the
        # deepspeed launcher sends SIGTERM.
        signal.signal(number, self._before[number])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = self._asked
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(asked), device=self.accelerator.device)
            asked = bool(self.accelerator.reduce(flag, reduction="sum").item())
        if asked:
            self.stopped = True
            control.should_training_stop = True
            control.should_save |= args.save_strategy != SaveStrategy.NO  # to resume from here
