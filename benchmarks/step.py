"""What an optimizer step of a TRL trainer takes with refkl's reference, beside TRL's own on the same work.

python benchmarks/step.py                                       # GRPO and DPO, all weights and LoRA
python benchmarks/step.py --cases grpo-full --rounds 40 --control --json benchmarks/out/step.json
python benchmarks/step.py --vocabulary 1000 --control --prefix off --no-memory     # the same work, and hardly a head
python benchmarks/step.py --cases grpo-full grpo-lora --preset 135m --sequences 8 --generations 8 --prompt 256 \
    --completion 64 --rounds 4 --json benchmarks/out/step_256_64_8.json

Both trainers live in one process and one thread, each in its own `train()`, and take turns: a step of one, a step of
the other, in random order, so that what slows the machine for a while falls on both. Freed memory stays with the
process. GRPO's completions are given (`rollout_func`): nothing is generated unless --generate asks for it, and then
each side's losses are of its own completions and are not compared. A step is all that the loop does from the end of one
optimizer step to the end of the next, less what generates. That both do the same work is checked: the largest
difference of their losses over the steps, and the KL (DPO: the margins) that both report in the end. GRPO is also
measured without a KL, in TRL. With --control a second trainer of TRL's takes part, and how far its ratio is from 1 is
how well this machine measures. The ratio of CPU times is steadier where others use the machine. Memory is the resident
peak of making a trainer and two steps, above what was there before, in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of rollout_func

import torch
from datasets import Dataset, disable_progress_bars
from greenlet import greenlet
from kernel_measure import cuda_peak, host_peak
from kernel_report import machine, write
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from refkl import KLConfig, ScoringConfig
from refkl.trl import KLDPOTrainer, KLGRPOTrainer

CASES = ("grpo-full", "grpo-lora", "dpo-full", "dpo-lora")
THEIRS, OURS, AGAIN, WITHOUT = "TRL", "refkl", "TRL again", "TRL without KL"
PARTS = ("generation", "reference", "policy", "backward", "optimizer", "rest")
COEF = 0.05
REPORTED = {"grpo": "kl", "dpo": "rewards/margins"}
"""What both sides say of the whole training, and what is far from 0 only if policy and reference have come apart."""
MARK = "step-memory:"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of malloc.h."""
PRESETS = {"small": (512, 8, 32000), "135m": (576, 30, 49152)}
"""Hidden width, layers, vocabulary."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm", type=int, default=2, help="rounds before those that count: states are made in them")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="of the three sizes that follow")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--generations", type=int, help="of a prompt; half of the sequences, if not given")
    parser.add_argument("--prefix", choices=["auto", "off"], default="auto", help="refkl's scoring.prefix")
    parser.add_argument("--sequences", type=int, default=4, help="a step; an even number")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--completion", type=int, default=128, help="tokens")
    parser.add_argument("--generate", action="store_true", help="GRPO's completions are sampled from the policy")
    parser.add_argument("--control", action="store_true", help="TRL twice, to see the noise")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--memory-of", nargs=3, metavar=("CASE", "SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sequences < 2 or options.sequences % 2:
        parser.error(f"--sequences {options.sequences}: an even number, since DPO takes pairs")
    for name, size in zip(("hidden", "layers", "vocabulary"), PRESETS[options.preset], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, size)
    if options.generations is None:
        options.generations = max(2, options.sequences // 2)
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        case, side, folder = options.memory_of
        peak = cuda_peak if torch.cuda.is_available() else host_peak
        print(f"{MARK}{peak(lambda: build(case, side, folder, options, steps=2).train())}", flush=True)
        return
    keep_memory()
    rows: list[dict[str, Any]] = []
    here = machine("cuda" if torch.cuda.is_available() else "cpu")
    settings = {**vars(options), "json": str(options.json)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch, "model"))
        model = make_model(options)
        model.save_pretrained(folder)
        size = sum(p.numel() for p in model.parameters())
        del model
        for case in options.cases:
            rows.append(measure(case, folder, options))
            print(f"{case}: {rows[-1]['ratio']['median']:.3f}", file=sys.stderr, flush=True)
            if options.json is not None:
                write(options.json, {"machine": here, "settings": {**settings, "parameters": size}, "cases": rows})
    console = Console(width=190)
    console.print(f"{here}\n{size / 1e6:.1f}M parameters, fp32, {options.sequences} sequences of "
                  f"{options.prompt} + {options.completion} tokens a step, {options.rounds} rounds")  # fmt: skip
    console.print(table(rows))
    console.print(parts_table(rows))


def keep_memory() -> None:
    """Let glibc keep what is freed, as torch does on a GPU.

    Else large blocks are given back, and come anew page by page: of 64 + 16 tokens TRL's step of all weights takes a
    quarter longer by itself, and twice as long beside others in its process; refkl's, of small blocks, a tenth.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        vocab_size=options.vocabulary,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: a text is as many tokens as it has letters. The model's head is wider."""
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build(case: str, side: str, folder: str, options: argparse.Namespace, steps: int, **more: Any) -> Any:
    """A trainer of one side; with the same seed both sides see the same data and the same first adapter."""
    method, weights = case.split("-")
    common = {
        "output_dir": f"{folder}-{case}", "report_to": [], "bf16": False, "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": steps, "seed": options.seed,
    }  # fmt: skip
    if weights == "lora":
        more["peft_config"] = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM.from_pretrained(folder)
    make = grpo if method == "grpo" else dpo
    trainer = make(side, model, common, options, steps, more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def letters(source: random.Random, count: int) -> str:
    return "".join(source.choices("abcdefghijklmnopqrstuvwxyz ", k=count))


def grpo(side: str, model: Any, common: dict[str, Any], options: argparse.Namespace, steps: int, more: Any) -> Any:
    """beta of TRL's is k3, differentiated with the ratio; the loss is a mean over tokens ("dapo")."""
    source, rows = random.Random(options.seed), options.sequences
    prompts = Dataset.from_dict({"prompt": [letters(source, options.prompt) for _ in range(2 * steps)]})
    args = GRPOConfig(
        **common,
        beta=0.0 if side in (OURS, WITHOUT) else COEF,
        per_device_train_batch_size=rows,
        num_generations=options.generations,
        max_completion_length=options.completion,
    )
    tokenizer = byte_tokenizer()
    drawn = random.Random(options.seed + 1)

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ends = [drawn.randint(options.completion * 3 // 4, options.completion) for _ in prompts]
        completions = [[drawn.randint(2, 257) for _ in range(end - 1)] + [1] for end in ends]
        return {"prompt_ids": [tokenizer.encode(p) for p in prompts], "completion_ids": completions, "logprobs": None}

    if side == OURS:
        more["kl"] = KLConfig(coef=COEF, estimator="k3", gradient="autograd", aggregation="token-mean")
        more["scoring"] = ScoringConfig(prefix=options.prefix)
    return (KLGRPOTrainer if side == OURS else GRPOTrainer)(
        model,
        reward_funcs=lambda completions, **columns: [len(set(text)) / 100 for text in completions],
        args=args,
        processing_class=tokenizer,
        train_dataset=prompts,
        rollout_func=None if options.generate else rollout,
        **more,
    )


def dpo(side: str, model: Any, common: dict[str, Any], options: argparse.Namespace, steps: int, more: Any) -> Any:
    source, pairs = random.Random(options.seed), options.sequences // 2
    answers = {
        name: [
            letters(source, source.randint(options.completion * 3 // 4, options.completion) - 1)
            for _ in range(steps * pairs)
        ]
        for name in ("chosen", "rejected")
    }
    prompts = [letters(source, options.prompt) for _ in range(steps * pairs)]
    args = DPOConfig(**common, per_device_train_batch_size=pairs, max_length=None)
    if side == OURS:
        more["scoring"] = ScoringConfig(prefix=options.prefix)
    return (KLDPOTrainer if side == OURS else DPOTrainer)(
        model,
        args=args,
        processing_class=byte_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": prompts, **answers}),
        **more,
    )


class Turns(TrainerCallback):
    """A trainer that makes one optimizer step whenever it is told to, and in between is left where it is.

    All are in one thread: OpenMP keeps workers for each thread that computes, and lets none of them wait awake once
    there are more of them than processors, which costs a small step of any trainer more than its products.
    """

    def __init__(self, case: str, side: str, folder: str, options: argparse.Namespace) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.losses: list[torch.Tensor] = []
        self.clock = Clock()
        self.trainer = build(case, side, folder, options, options.warm + options.rounds, callbacks=[self])
        self.clock.watch(self.trainer, self.losses)
        self.training = greenlet(self.trainer.train)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        assert self.training.parent is not None
        self.training.parent.switch()

    def step(self) -> None:
        """From the end of its last step to the end of the next."""
        self.clock.spent.clear()
        cpu, start = time.process_time(), time.perf_counter()
        self.training.switch()
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
        spent = dict(self.clock.spent)
        self.parts.append({**spent, "rest": total - sum(spent.values())})
        self.seconds.append(total - spent.get("generation", 0.0))
        self.cpu.append(cpu)

    def end(self) -> None:
        self.training.switch()
        assert self.training.dead, "its steps are counted"


class Clock:
    """How long the parts of a step take. A forward pass without gradients is the reference's: no other is made."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.started = 0.0
        self.generating = False

    def watch(self, trainer: Any, losses: list[torch.Tensor]) -> None:
        models = {id(m): m for m in (trainer.model, trainer.ref_model, reference_model(trainer)) if m is not None}
        for model in models.values():
            model.register_forward_pre_hook(self._start)
            model.register_forward_hook(self._forward)
        trainer.accelerator.backward = self._timed("backward", trainer.accelerator.backward)
        if hasattr(trainer, "_generate"):
            trainer._generate = self._generated(trainer._generate)
        create, training_step = trainer.create_optimizer, trainer.training_step

        def created(*args: Any, **kwargs: Any) -> Any:
            optimizer = create(*args, **kwargs)
            optimizer.register_step_pre_hook(self._start)
            optimizer.register_step_post_hook(lambda *_: self._add("optimizer"))
            return optimizer

        def kept(*args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(training_step(*args, **kwargs).detach())
            return losses[-1]

        trainer.create_optimizer, trainer.training_step = created, kept

    def _start(self, *_: Any) -> None:
        if self.generating:
            return
        synchronize()
        self.started = time.perf_counter()

    def _add(self, part: str) -> None:
        synchronize()
        self.spent[part] += time.perf_counter() - self.started

    def _forward(self, *_: Any) -> None:
        if not self.generating:
            self._add("policy" if torch.is_grad_enabled() else "reference")

    def _timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._start()
            result = work(*args, **kwargs)
            self._add(part)
            return result

        return timed

    def _generated(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def generated(*args: Any, **kwargs: Any) -> Any:
            self._start()
            self.generating = True
            try:
                result = work(*args, **kwargs)
            finally:
                self.generating = False
            self._add("generation")
            return result

        return generated


def reference_model(trainer: Any) -> nn.Module | None:
    """A module of the reference's own, where refkl holds one."""
    ours = isinstance(trainer, KLGRPOTrainer | KLDPOTrainer)
    return trainer.reference.model if ours and trainer.reference.strategy == "clone" else None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(case: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    row = timed(case, folder, options)
    gc.collect()  # trainers and their callbacks hold each other
    if not options.no_memory:
        sides = [THEIRS, OURS, *([WITHOUT] if case.startswith("grpo") else [])]
        row["memory"] = {side: memory_of(case, side, folder) for side in sides}
    return row


def timed(case: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    names = [THEIRS, OURS, *([WITHOUT] if case.startswith("grpo") else []), *([AGAIN] if options.control else [])]
    sides = {name: Turns(case, name, folder, options) for name in names}
    shuffle = random.Random(options.seed)
    for _ in range(options.warm + options.rounds):
        shuffle.shuffle(names)
        for name in names:
            sides[name].step()
    for side in sides.values():
        side.end()
    seconds = {name: side.seconds[options.warm :] for name, side in sides.items()}
    cpu = {name: side.cpu[options.warm :] for name, side in sides.items()}
    losses = {name: torch.stack(side.losses).double().cpu() for name, side in sides.items()}
    reported = REPORTED[case.split("-")[0]]
    row: dict[str, Any] = {
        "case": case,
        "strategy": sides[OURS].trainer.reference.strategy,
        "seconds": seconds,
        "cpu": cpu,
        "parts": {
            name: {part: [p.get(part, 0.0) for p in side.parts[options.warm :]] for part in PARTS}
            for name, side in sides.items()
        },
        "loss": None
        if options.generate
        else {
            "largest": float(losses[THEIRS].abs().max()),
            "difference": float((losses[OURS] - losses[THEIRS]).abs().max()),
        },
        "reports": {name: side.trainer.state.log_history[-1].get(reported) for name, side in sides.items()},
        "ratio": compared(seconds, OURS),
        "cpu_ratio": None if options.generate else compared(cpu, OURS),
    }
    if WITHOUT in seconds:
        row["without"] = compared(seconds, OURS, WITHOUT)
    if options.control:
        row["control"] = compared(seconds, AGAIN)
        row["cpu_control"] = None if options.generate else compared(cpu, AGAIN)
    return row


def compared(seconds: dict[str, list[float]], side: str, base: str = THEIRS) -> dict[str, float]:
    """With TRL, within each round."""
    return spread([a / b for a, b in zip(seconds[side], seconds[base], strict=True)])


def spread(ratios: list[float]) -> dict[str, float]:
    """The median, and the order statistics between which it lies with 95 % (sign test; with few rounds all of them)."""
    ordered, n = sorted(ratios), len(ratios)
    low, tail = 0, 0.0
    for below in range(n):
        tail += math.comb(n, below) / 2**n
        if tail > 0.025:
            break
        low = below
    return {"median": statistics.median(ordered), "low": ordered[low], "high": ordered[n - 1 - low]}


def memory_of(case: str, side: str, folder: str) -> int:
    command = [sys.executable, *sys.argv, "--memory-of", case, side, folder]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in child.stdout.splitlines():
        if line.startswith(MARK):
            return int(line.removeprefix(MARK))
    raise SystemExit(f"no memory reading of {side}, {case}, exit {child.returncode}:\n{child.stderr[-3000:]}")


def table(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    view = Table(title="one optimizer step: refkl beside TRL")
    for column in ("case", "TRL, s", "refkl, s", "refkl : TRL", "CPU time", "refkl : TRL without KL", "TRL : TRL",
                   "CPU time", "MiB", "losses differ", "both report"):  # fmt: skip
        view.add_column(column, justify="right")
    for row in rows:
        medians = [f"{statistics.median(row['seconds'][side]):.3f}" for side in (THEIRS, OURS)]
        found = [row.get(name) for name in ("ratio", "cpu_ratio", "without", "control", "cpu_control")]
        ratios = ["" if r is None else f"{r['median']:.3f} ({r['low']:.3f} .. {r['high']:.3f})" for r in found]
        mib = ", ".join(f"{size / 2**20:,.0f}" for size in row.get("memory", {}).values())
        said = ", ".join(f"{row['reports'][side]:.4g}" for side in (THEIRS, OURS))
        differ = f"{row['loss']['difference']:.0e}" if row["loss"] else ""
        view.add_row(f"{row['case']} ({row['strategy']})", *medians, *ratios, mib, differ, said)
    return view


def parts_table(rows: list[dict[str, Any]]) -> Table:
    view = Table(title="of which, median seconds: TRL, refkl")
    for column in ("case", *PARTS):
        view.add_column(column, justify="right")
    for row in rows:
        pairs = [[statistics.median(row["parts"][side][part]) for side in (THEIRS, OURS)] for part in PARTS]
        view.add_row(row["case"], *(f"{theirs:.3f}, {ours:.3f}" for theirs, ours in pairs))
    return view


if __name__ == "__main__":
    main()
