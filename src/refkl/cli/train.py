"""`refkl train`: from a parsed configuration to a run folder."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback

from refkl.backend import check_can_save, check_launch, detect
from refkl.cli.inputs import load_data, load_model, load_reward, load_tokenizer, model_path
from refkl.cli.report import draw_report
from refkl.cli.run_folder import RunFolder, RunRecorder, Stopper
from refkl.cli.settings import ParsedRun, peft_config


def train(run: ParsedRun) -> int:
    """Train, and leave a run folder; returns 0, or 130 if it was stopped by a signal (the folder is usable then too).

    Raises:
        ValueError: an input that cannot be used, or a launch that gave something else than was asked for.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    config = run.config
    data = load_data(config.data, config.method)
    rewards = [load_reward(r) for r in config.reward]
    args = run.trainer_config()
    args.disable_tqdm = True  # the run's own progress bar shows reward and KL
    trainer = make_trainer(run, args, data, rewards)
    accelerator = trainer.accelerator
    found = detect(trainer.model, accelerator)
    check_launch(found, expected=config.launch.backend, processes=config.launch.processes)
    check_can_save(accelerator)

    main = accelerator.is_main_process
    if main:
        console.print(f"reference: {trainer.reference.strategy}: {trainer.reference.reason}.")
        console.print(f"policy: {model_path(config.model)} on {found}, {accelerator.device}")
    checkpoint = args.resume_from_checkpoint
    folder = RunFolder(args.output_dir, write=main)
    folder.start(run.resolved, resumed=checkpoint is not None)
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
    finally:
        # One process can save what it has whatever went wrong; of several, the others may be in another collective.
        if ended or accelerator.num_processes == 1:
            trainer.save_model(str(folder.path / "model"))
        if not ended:
            folder.fail()
    trainer.reference.fingerprint()  # anew: `changed_weight` compares it with what it was
    folder.finish(trainer.reference.provenance(), recorder.updates, stopped=stopper.stopped)
    if main:
        picture = draw_report(folder.path)
        console.print(recorder.closing_line(stopper.stopped))
        console.print(f"run folder: {folder.path}  (model/, metrics.jsonl, samples.jsonl, {picture.name})")
    if (changed := recorder.changed_weight()) is not None:
        folder.fail()
        raise ValueError(
            f"The reference changed during training though nothing was to update it: {changed} is another. The KL of "
            "this run is not to one reference; look for code that writes to the policy's frozen weights."
        )
    accelerator.end_training()  # a process group that is left to the interpreter's end can abort there
    return 130 if stopper.stopped else 0


def make_trainer(run: ParsedRun, args: Any, data: Any, rewards: list[Any]) -> Any:
    """The trainer that the configuration asks for, its reference built."""
    from refkl.trl import KLDPOTrainer, KLGRPOTrainer

    config = run.config
    shared: dict[str, Any] = {
        "model": load_model(config.model),
        "args": args,
        "train_dataset": data,
        "peft_config": peft_config(config.peft),
        "reference": config.reference,
        "kl": config.kl,
        "sync": config.sync,
    }
    if config.method == "dpo":
        return KLDPOTrainer(processing_class=load_tokenizer(config.model, "right"), **shared)
    if args.reward_weights is not None:
        raise ValueError("trainer.reward_weights would be ignored: each entry of `reward` has its weight.")
    args.reward_weights = [r.weight for r in config.reward]
    return KLGRPOTrainer(processing_class=load_tokenizer(config.model, "left"), reward_funcs=rewards, **shared)


def _prompts(data: Any, count: int) -> list[Any]:
    """The first `count` different prompts."""
    distinct: list[Any] = []
    for prompt in data["prompt"]:
        if len(distinct) == count:
            break
        if prompt not in distinct:
            distinct.append(prompt)
    return distinct
