"""`refkl check`: verify the reference of a run without training."""

from __future__ import annotations

from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from refkl.backend import check_launch, detect, set_micro_batch
from refkl.checks import check_reference
from refkl.cli.columns import PROMPTS
from refkl.cli.inputs import load_data, load_reward, model_path
from refkl.cli.settings import ParsedRun
from refkl.cli.train import make_trainer
from refkl.types import TokenBatch

_ROWS, _TOKENS = 4, 64
_COLOURS = {"ok": "green", "note": "yellow", "fault": "red"}


def check(run: ParsedRun) -> int:
    """Print a table of the checks, their results, and what to do. Return 0, or 1 if a check found a fault.

    Raises:
        ValueError: an input that cannot be used.
    """
    console = Console(highlight=False)
    config = run.config
    data = load_data(config.data, config.method)
    args = run.trainer_config()
    with TemporaryDirectory() as nowhere:  # a trainer creates its output folder as soon as it is made
        args.output_dir = nowhere
        trainer = make_trainer(run, args, data, [load_reward(r, data) for r in config.reward])
    accelerator, tokenizer = trainer.accelerator, trainer.processing_class
    backend = detect(trainer.model, accelerator)
    check_launch(backend, expected=config.launch.backend, processes=config.launch.processes)
    trainer.create_optimizer()
    set_micro_batch(accelerator, args.per_device_train_batch_size)
    policy, optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
    batch = replace(_batch(tokenizer, data, accelerator.device), prefix=trainer.scoring.prefix)
    findings = check_reference(policy, trainer.reference, batch, optimizer=optimizer, vocabulary=len(tokenizer))
    if not accelerator.is_main_process:
        accelerator.end_training()
        return 0
    console.print(f"policy: {model_path(config.model)} ({backend})", soft_wrap=True)
    console.print(
        f"reference: {trainer.reference.strategy}: {trainer.reference.reason}; from {trainer.reference.source}",
        soft_wrap=True,
    )
    table = Table("check", "", "found", "what to do")
    for finding in findings:
        verdict = f"[{_COLOURS[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(finding.check, verdict, finding.found, finding.advice)
    console.print(table)
    faults = [finding for finding in findings if finding.verdict == "fault"]
    console.print("nothing wrong was found" if not faults else f"wrong: {'; '.join(f.check for f in faults)}")
    accelerator.end_training()
    return 1 if faults else 0


def _batch(tokenizer: Any, data: Any, device: torch.device) -> TokenBatch:
    """Make a batch from the beginnings of a few texts, of different lengths; the second half of each is scored."""
    rows = []
    for number, row in enumerate(data.select(range(min(_ROWS, len(data))))):
        text = next(row[column] for column in PROMPTS if column in row)
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(text, tokenize=False)
        answer = row.get("chosen", row.get("completion", ""))
        text += answer if isinstance(answer, str) else tokenizer.apply_chat_template(answer, tokenize=False)
        ids = tokenizer(text)["input_ids"][: _TOKENS - 8 * number] or [tokenizer.eos_token_id]
        rows.append(ids if len(ids) > 1 else ids * 2)
    width = max(map(len, rows))
    ids, attention, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        attention[number, : len(row)] = 1
        scored[number, max(1, len(row) // 2) : len(row)] = 1
    return TokenBatch(ids.to(device), attention.to(device), scored.bool().to(device))
