"""Supervised fine-tuning with transformers' Trainer on a KL leash: learn new texts, and forget little.

python examples/hf_trainer_sft_kl.py                             # the demo's 135M model on one device
python examples/hf_trainer_sft_kl.py --coef 0                    # without the leash: `kl` says how far the model goes
python examples/hf_trainer_sft_kl.py --model FOLDER --steps 2000
accelerate launch --config_file launch/accelerate/multi.yaml examples/hf_trainer_sft_kl.py    # several devices
accelerate launch --config_file launch/accelerate/zero3.yaml examples/hf_trainer_sft_kl.py    # and the model sharded
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from refkl import KLConfig
from refkl.demo import movies, smollm2
from refkl.hf import KLTrainer


def tokenized(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """Tokens of a prompt and its completion, of which the completion's have labels."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def main() -> KLTrainer:
    """Train on film reviews."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; by default the demo's")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="texts on each device")
    parser.add_argument("--coef", type=float, default=0.3, help="what the KL is multiplied by")
    parser.add_argument("--output", default="runs/hf_trainer_sft_kl")
    options = parser.parse_args()

    gpu = torch.accelerator.is_available()
    args = TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=2e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not gpu,
        bf16=gpu,
    )
    folder = options.model or smollm2.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    reviews = movies.verdicts(limit=512, max_words=30)
    trainer = KLTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args=args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels too
        train_dataset=reviews.map(tokenized, fn_kwargs={"tokenizer": tokenizer}, remove_columns=reviews.column_names),
        processing_class=tokenizer,
        kl=KLConfig(coef=options.coef, estimator="exact"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
