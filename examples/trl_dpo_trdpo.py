"""DPO whose reference follows the policy (TR-DPO): TRL's script, and `sync=`.

python examples/trl_dpo_trdpo.py                                 # the demo's 135M model on one device
python examples/trl_dpo_trdpo.py --model FOLDER --steps 2000 --every 512
accelerate launch --config_file launch/accelerate/multi.yaml examples/trl_dpo_trdpo.py        # several devices
accelerate launch --config_file launch/accelerate/zero3.yaml examples/trl_dpo_trdpo.py        # and the model sharded

Logged: `kl` to the reference as it is, `kl/first` to what it was first, and `sync/updates`, how often it has moved.
"""

import argparse

import torch
from transformers import AutoTokenizer
from trl import DPOConfig

from refkl import SyncConfig
from refkl.demo import movies, smollm2
from refkl.trl import KLDPOTrainer


def main() -> KLDPOTrainer:
    """Train on pairs of reviews of one film: the fresh one is preferred to the rotten one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; by default the demo's")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="pairs on each device")
    parser.add_argument("--every", type=int, default=10, help="optimizer steps between two moves of the reference")
    parser.add_argument("--output", default="runs/trl_dpo_trdpo")
    options = parser.parse_args()

    gpu = torch.accelerator.is_available()
    args = DPOConfig(
        options.output,
        beta=0.1,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        max_length=64,
        learning_rate=5e-6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not gpu,
        bf16=gpu,
    )
    folder = options.model or smollm2.model_folder()
    trainer = KLDPOTrainer(
        folder,
        args=args,
        train_dataset=movies.preferences(limit=512, max_words=30),
        processing_class=AutoTokenizer.from_pretrained(folder),
        sync=SyncConfig(every=options.every, alpha=0.6, first_kl_every=options.every),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
