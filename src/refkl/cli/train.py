"""`refkl train`: train from a parsed configuration and write a run folder."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback

from refkl.backend import check_can_save, check_launch, detect, peer_gone
from refkl.checkpoint import disk_failure, newest_whole, set_later_aside
from refkl.cli.columns import PROMPTS, check_empty_prompts
from refkl.cli.failures import Interruptible
from refkl.cli.inputs import load_data, load_model, load_reward, load_tokenizer, model_path
from refkl.cli.report import draw_report, write_page
from refkl.cli.run_folder import RunFolder, RunRecorder, Stopper
from refkl.cli.settings import ParsedRun, peft_config
from refkl.config import REWARDED, ResumeConfig
from refkl.messages import RunError
from refkl.output_folder import writing_into


def train(run: ParsedRun) -> int:
    """Train, and write a run folder. Return 0, or 130 if a signal stopped the run (the folder is usable then too).

    Raises:
        ValueError: an input cannot be used, the launch differs from the configuration, or there is no complete
            checkpoint to resume from.
        RunError: a checkpoint could not be written and checkpoint.on_error is "stop", or another process of the run
            ended.
    """
    Interruptible.check()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    config = run.config
    data = load_data(config.data, config.method)
    rewards = [load_reward(r, data) for r in config.reward]
    args = run.trainer_config()
    args.disable_tqdm = True  # the run's own progress bar shows reward and KL
    wanted = _resumed_from(config.resume, args.resume_from_checkpoint)
    trainer = make_trainer(run, args, data, rewards)
    Interruptible.check()
    accelerator = trainer.accelerator
    found = detect(trainer.model, accelerator)
    check_launch(found, expected=config.launch.backend, processes=config.launch.processes)
    check_can_save(accelerator)

    main = accelerator.is_main_process
    if main:
        console.print(f"reference: {trainer.reference.strategy}: {trainer.reference.reason}.")
        console.print(f"policy: {model_path(config.model)} ({found}, {accelerator.device})")
    checkpoint = trainer.checkpoint_to_resume(wanted)
    if main and checkpoint is not None:
        console.print(f"resumes from {checkpoint}")
    with writing_into(Path(args.output_dir), accelerator):
        return _train_in(args.output_dir, trainer, run, data, checkpoint, console)


def _train_in(
    output_dir: str, trainer: Any, run: ParsedRun, data: Any, checkpoint: str | None, console: Console
) -> int:
    """Train in a folder that is locked for this run; see `train`."""
    accelerator, config = trainer.accelerator, run.config
    main = accelerator.is_main_process
    folder = RunFolder(output_dir, write=main, forgiving=config.checkpoint.on_error == "continue")
    _start(folder, run, checkpoint, console if main else None)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    recorder = RunRecorder(trainer, folder, config, _prompts(data, config.samples.prompts), console)
    trainer.add_callback(recorder)
    ended = False
    try:
        with Stopper(accelerator) as stopper:
            trainer.add_callback(stopper)
            trainer.train(resume_from_checkpoint=checkpoint)
        ended = True
    except RuntimeError as error:
        if not peer_gone(error):
            raise
        raise RunError(_lost(error, folder.path, run.path)) from error
    finally:
        if not ended:
            _keep_what_there_is(trainer, folder)
    _save_trained(trainer, folder.path)
    trainer.reference.fingerprint()  # recomputed: `changed_weight` compares it with the earlier one
    folder.finish(trainer.reference.provenance(), recorder.updates, stopped=stopper.stopped)
    if main:
        reports = write_page(folder.path).name, draw_report(folder.path).name
        console.print(recorder.closing_line(stopper.stopped))
        console.print(f"run folder: {folder.path}  (model/, metrics.jsonl, samples.jsonl, {', '.join(reports)})")
    if (changed := recorder.changed_weight()) is not None:
        folder.fail()
        raise ValueError(
            f"The reference changed during training, although no sync is configured: {changed} has new values. The KL "
            "of this run is not to one reference. Look for code that writes to the policy's frozen weights."
        )
    accelerator.end_training()  # a process group that is still open when the interpreter exits can abort
    return 130 if stopper.stopped else 0


def _start(folder: RunFolder, run: ParsedRun, checkpoint: str | None, console: Console | None) -> None:
    """Begin the run's folder. `console` is the first rank's; the others have none."""
    # Resuming from a checkpoint in another run's folder starts a new run.
    here = checkpoint is not None and Path(checkpoint).resolve().parent == folder.path.resolve()
    folder.start(run.resolved, resumed=here)
    if here and console is not None:
        for path in set_later_aside(Path(str(checkpoint))):
            console.print(f"renamed, since it is of a later step than the one that this run begins at: {path}")


def _resumed_from(resume: ResumeConfig, of_trainer: str | None) -> str | bool | None:
    """Return the checkpoint to resume from: True for the newest complete one, or a folder.

    Raises:
        ValueError: it is given twice, or resume.reference is set for a run that is not resumed.
    """
    if resume.checkpoint is not None and of_trainer is not None:
        raise ValueError(
            f"Both resume.checkpoint {resume.checkpoint!r} and trainer.resume_from_checkpoint {of_trainer!r} name "
            "a checkpoint. Leave one out."
        )
    if resume.checkpoint is None and of_trainer is None and resume.reference == "initial":
        raise ValueError("resume.reference 'initial' is only for a resumed run: add --resume, or leave it out.")
    return True if resume.checkpoint == "newest" else resume.checkpoint or of_trainer


def _lost(error: RuntimeError, folder: Path, config: Path) -> str:
    """Return the error message for a rank that has ended, including what to do."""
    whole = newest_whole(folder, contents=False).path
    last = "There is no whole checkpoint yet." if whole is None else f"The newest whole checkpoint is {whole}."
    how = "start again" if whole is None else f"go on, launched as before, with: refkl train {config} --resume"
    return (
        f"Another process of this run is gone, or does not respond ({str(error).splitlines()[0]}). Its own output "
        f"says why. {last} When the cause is fixed, {how}."
    )


def _save_trained(trainer: Any, folder: Path) -> None:
    """Save the trained model; every rank must call this.

    Raises:
        RunError: the disk is full, or fails.
    """
    try:
        trainer.save_model(str(folder / "model"))
    except (OSError, RuntimeError, SafetensorError) as error:
        if (failure := disk_failure(error)) is None:
            raise
        last = newest_whole(folder, contents=False).path
        where = "" if last is None else f" The newest whole checkpoint is {last}."
        raise RunError(f"{folder / 'model'} could not be written ({failure}).{where}") from error


def _keep_what_there_is(trainer: Any, folder: RunFolder) -> None:
    """Save the present model after an error, if there is one process: others may be in another collective."""
    try:
        folder.fail()
        if trainer.accelerator.num_processes == 1:
            trainer.save_model(str(folder.path / "model"))
    except Exception as error:
        if disk_failure(error) is None:
            raise  # a disk failure is not reported here: the error that ended the run says more


def make_trainer(run: ParsedRun, args: Any, data: Any, rewards: list[Any]) -> Any:
    """Make the configured trainer, including its reference."""
    from refkl.trl import KLDPOTrainer, KLGRPOTrainer, KLKTOTrainer, KLRLOOTrainer, KLSFTTrainer

    config = run.config
    shared: dict[str, Any] = {
        "model": load_model(config.model),
        "args": args,
        "train_dataset": data,
        "peft_config": peft_config(config.peft),
        "reference": config.reference,
        "kl": config.kl,
        "sync": config.sync,
        "scoring": config.scoring,
        "resume_reference": config.resume.reference,
        "on_checkpoint_error": config.checkpoint.on_error,
    }
    if config.method not in REWARDED:
        offline = {"dpo": KLDPOTrainer, "kto": KLKTOTrainer, "sft": KLSFTTrainer}[config.method]
        return offline(processing_class=load_tokenizer(config.model, "right"), **shared)
    if args.reward_weights is not None:
        raise ValueError("trainer.reward_weights would be ignored: each entry of `reward` has its weight.")
    args.reward_weights = [r.weight for r in config.reward]
    online = {"grpo": KLGRPOTrainer, "rloo": KLRLOOTrainer}[config.method]
    tokenizer = load_tokenizer(config.model, "left")
    check_empty_prompts(data, tokenizer, config.data.source)
    return online(processing_class=tokenizer, reward_funcs=rewards, **shared)


def _prompts(data: Any, count: int) -> list[Any]:
    """Return the first `count` different prompts; for data without prompts, the beginnings of its texts."""
    distinct: list[Any] = []
    column = next(column for column in PROMPTS if column in data.column_names)
    for text in data[column]:
        if len(distinct) == count:
            break
        prompt = text if column == "prompt" else _beginning(text)
        if prompt not in distinct:
            distinct.append(prompt)
    return distinct


_WORDS = 6
"""Number of words in the beginning of a text."""


def _beginning(text: Any) -> Any:
    """Return the first words of a text, or the messages of a conversation before its first answer."""
    if isinstance(text, str):
        return " ".join(text.split()[:_WORDS])
    return list(takewhile(lambda message: message["role"] != "assistant", text))
