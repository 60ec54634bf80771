"""A GRPO script of TRL's, with refkl's reference and KL by one changed line (README.md has the diff).

python examples/trl_grpo.py                                      # the demo's 135M model on one device
python examples/trl_grpo.py --model FOLDER --steps 200           # any causal language model with a tokenizer
accelerate launch --config_file launch/accelerate/multi.yaml examples/trl_grpo.py             # several devices
accelerate launch --config_file launch/accelerate/zero3.yaml examples/trl_grpo.py             # and the model sharded

The change back gives the script as it was: `beta` asks for the same coefficient in both.
"""

import argparse

import torch
from transformers import AutoTokenizer
from trl import GRPOConfig

from refkl.demo import movies, rewards, smollm2
from refkl.trl import KLGRPOTrainer as GRPOTrainer


def main() -> GRPOTrainer:
    """Train on neutral openings of film reviews, rewarded for friendly endings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; by default the demo's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="completions on each device, four to a prompt")
    parser.add_argument("--output", default="runs/trl_grpo")
    options = parser.parse_args()

    gpu = torch.accelerator.is_available()
    args = GRPOConfig(
        options.output,
        beta=0.2,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        num_generations=4,
        max_completion_length=16,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not gpu,
        bf16=gpu,
    )
    folder = options.model or smollm2.model_folder()
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=rewards.sentiment,
        args=args,
        train_dataset=movies.openings(limit=200),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
