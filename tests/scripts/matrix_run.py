"""Cases of the matrix (tests/support/matrix.py), one after the other in one launch.

accelerate launch --config_file launch/accelerate/CONFIG.yaml tests/scripts/matrix_run.py BACKEND FOLDER

FOLDER has cases.json and the models; the results are appended to its results.jsonl.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from scripts.train_fsdp2 import called_gpus
from support.matrix import EXACT, OPTIONS, TRAINERS, Case, Result, append_result
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig, SFTConfig

import refkl.trl
from refkl import KLConfig, ReferenceConfig, SyncConfig, freeze
from refkl.backend import detect, gathered

STEPS, ROWS = 2, 4
SECONDS = 100
"""After which a case hangs; the first one may also compile an op of DeepSpeed's."""
TEXTS = (" good", " bad one", "!", " yes it is", " no", " perhaps, or not", " it depends", " nothing at all")
PROMPTS = ("hello", "a b", "what is it", "so")
CONFIGS: dict[str, Any] = {"grpo": GRPOConfig, "rloo": RLOOConfig, "dpo": DPOConfig, "kto": KTOConfig, "sft": SFTConfig}


def letters(completions: list[str], **columns: Any) -> list[float]:
    """A reward: distinct letters."""
    return [len(set(text)) / 8 for text in completions]


class FixedCompletions:
    """Completions that depend on the prompt and the row's place in the batch of all ranks, and not on sampling."""

    def completions(self, prompts: list[list[int]]) -> list[list[int]]:
        first = self.accelerator.process_index * len(prompts)  # type: ignore[attr-defined]
        found = []
        for row, prompt in enumerate(prompts, start=first):
            digest = hashlib.sha256(f"{prompt} {row % 2}".encode()).digest()
            found.append([2 + byte % 250 for byte in digest[: 3 + digest[-1] % 5]] + [1])
        return found


class GRPO(FixedCompletions, refkl.trl.KLGRPOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return self.completions(prompt_ids), None


class RLOO(FixedCompletions, refkl.trl.KLRLOOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return self.completions(prompt_ids)


def data(trainer: str) -> datasets.Dataset:
    if trainer in ("grpo", "rloo"):
        return datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    if trainer == "dpo":
        rows = [{"prompt": PROMPTS[i % 4], "chosen": text, "rejected": TEXTS[i - 1]} for i, text in enumerate(TEXTS)]
    elif trainer == "kto":
        rows = [{"prompt": PROMPTS[i % 4], "completion": t, "label": i % 3 == 0} for i, t in enumerate(TEXTS)]
    else:
        rows = [{"prompt": PROMPTS[i % 4], "completion": text} for i, text in enumerate(TEXTS)]
    return datasets.Dataset.from_list(rows)


def arguments(case: Case, folder: Path, processes: int) -> Any:
    """TRL's configuration; making it also makes DeepSpeed's, under which a model is partitioned as it is loaded."""
    shared: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "per_device_train_batch_size": ROWS // processes,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    if case.trainer in ("grpo", "rloo"):
        shared |= {"num_generations": 2, "max_completion_length": 10, "shuffle_dataset": False}
    else:
        shared |= {"train_sampling_strategy": "sequential", "max_length": 48}
    if case.trainer == "kto":
        shared["loss_type"] = "apo_zero_unpaired"  # without a term that each rank takes from its own rows
    if case.trainer == "rloo":
        shared["beta"] = 0.0
    return CONFIGS[case.trainer](**shared)


def policy(case: Case, folder: Path) -> nn.Module:
    model: nn.Module = LlamaForCausalLM.from_pretrained(folder / "model")
    if case.policy in ("full", "frozen"):
        if case.policy == "frozen":
            freeze(model, ["model.embed_tokens", "model.layers.0"])
        return model
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    if case.policy == "trained":
        factors = [p for name, p in model.named_parameters() if "lora_B" in name]
        with gathered(factors, write=True):
            for factor in factors:
                nn.init.normal_(factor, std=0.3)
    return model


def penalty(case: Case) -> KLConfig:
    if case.trainer == "rloo":
        return KLConfig(coef=0.1, placement="reward", estimator="k1", reward="sequence")
    return KLConfig(coef=0.1, estimator="exact" if case.trainer in EXACT else "k3")


class Watcher(TrainerCallback):
    before = ""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = self.trainer.reference.recorded_fingerprint or self.trainer.reference.fingerprint()


def run(case: Case, folder: Path, processes: int) -> Result:
    args = arguments(case, folder, processes)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    options = {
        k: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for k, v in OPTIONS[case.option].items()
    }
    model = policy(case, folder)
    kind: Any = {"grpo": GRPO, "rloo": RLOO}.get(case.trainer) or getattr(refkl.trl, TRAINERS[case.trainer])
    extra = {"reward_funcs": letters} if case.trainer in ("grpo", "rloo") else {}
    torch.manual_seed(0)
    trainer = None
    try:
        trainer = kind(
            model,
            args=args,
            train_dataset=data(case.trainer),
            processing_class=tokenizer,
            reference=ReferenceConfig(strategy=case.strategy, **options),
            kl=penalty(case),
            sync=SyncConfig(every=1, alpha=0.5) if case.sync else None,
            **extra,
        )
        strategy = trainer.reference.strategy  # it may become another with the first sync
        trainer.add_callback(watcher := Watcher(trainer))
        trainer.train()
    except ValueError as error:
        if trainer is not None and trainer.state.global_step:
            raise
        return Result("refused", str(error))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = Result(
        "trained",
        strategy=strategy,
        losses=tuple(entry["loss"] for entry in logged),
        kls=tuple(entry[trainer.kl_metric] for entry in logged),
        norms=tuple(entry["grad_norm"] for entry in logged),
        before=watcher.before,
        after=trainer.reference.fingerprint(),
        processes=trainer.accelerator.num_processes,
        backend=detect(trainer.model_wrapped, trainer.accelerator).name,
    )
    if hasattr(trainer.model_wrapped, "destroy"):
        trainer.model_wrapped.destroy()
    trainer.accelerator.free_memory()
    return result


def main() -> None:
    backend, folder = sys.argv[1], Path(sys.argv[2])
    if backend == "fsdp2":
        PartialState.__init__ = called_gpus  # type: ignore[method-assign]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    state = PartialState(cpu=True)
    main_process, processes = state.is_main_process, state.num_processes
    assert processes == (1 if backend == "plain" else 2)
    for number, fields in enumerate(json.loads((folder / "cases.json").read_text())):
        case = Case(**fields)
        if main_process:
            (folder / "running").write_text(str(case))
        faulthandler.dump_traceback_later(SECONDS if number else 6 * SECONDS, exit=True)
        start = time.perf_counter()
        try:
            result = run(case, folder, processes)
        except Exception:
            if processes > 1:
                raise  # the other rank may wait for this one: the launch ends
            result = Result("failed", traceback.format_exc()[-3000:])
        gc.collect()
        gc.freeze()  # what is left is not looked at again: a collection takes 0.7 s with it, and a case makes several
        AcceleratorState._reset_state()
        if processes > 1:
            dist.barrier()
        if main_process:
            append_result(folder, case, Result(**{**vars(result), "seconds": time.perf_counter() - start}))
    faulthandler.cancel_dump_traceback_later()
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
