"""The whole flow of refkl in a loop of your own: sample, score policy and reference, penalise, step, sync.

python examples/own_loop.py                                     # the demo's 135M model, about 15 s a step on 2 cores
python examples/own_loop.py --model FOLDER --steps 20           # any causal language model with a tokenizer
accelerate launch --config_file launch/accelerate/multi.yaml examples/own_loop.py
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import cycle, islice

import torch
from accelerate import Accelerator, PartialState
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

import refkl


def train(
    model: torch.nn.Module, batches: Iterator[dict], reward: Callable, optimizer: AdamW, accelerator: Accelerator
) -> list[dict[str, float]]:
    """REINFORCE with a KL penalty: all that a loop needs of refkl is in these lines."""
    reference = refkl.build_reference(model, "auto", accelerator)  # the policy as it stands now
    accelerator.print(f"reference: {reference.strategy}: {reference.reason}.")
    penalty = refkl.KLPenalty(refkl.KLConfig(coef=0.3, estimator="k3"))
    sync = refkl.ReferenceSync(reference, refkl.SyncConfig(every=100, alpha=0.5))  # without: the leash is to the start
    model, optimizer = accelerator.prepare(model, optimizer)
    history = []
    for step, prompts in enumerate(batches, start=1):
        batch = sample(accelerator.unwrap_model(model), prompts)
        rewards = reward(batch).to(accelerator.device)
        advantage = (rewards - rewards.mean())[:, None]

        pair = refkl.score_pair(model, reference, batch)  # policy with grad, reference without
        mask = batch.completion_mask
        normalizer = refkl.global_normalizer(mask, accelerator=accelerator)  # over all ranks
        kl = penalty(pair.policy, pair.reference, mask, normalizer=normalizer)
        loss = kl.loss - refkl.kl.aggregate(advantage * pair.policy.logp, mask, normalizer=normalizer)

        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"reward": rewards.mean().item(), **penalty.step(accelerator), **sync.step(model)})
        accelerator.print(f"step {step}  reward {history[-1]['reward']:.3f}  KL {history[-1]['kl']:.4f} nats per token")
    return history


@torch.no_grad()
def sample(model: torch.nn.Module, prompts: dict[str, torch.Tensor]) -> refkl.TokenBatch:
    """Complete left-padded prompts; what follows an end of text is neither attended to nor scored."""
    length, end = prompts["input_ids"].shape[1], model.generation_config.eos_token_id
    tokens = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=16, pad_token_id=end)
    ended = (tokens[:, length:] == end).cumsum(-1)
    alive = (ended == 0) | ((tokens[:, length:] == end) & (ended == 1))
    attention_mask = torch.cat([prompts["attention_mask"], alive.long()], dim=1)
    completion_mask = torch.cat([torch.zeros_like(prompts["attention_mask"]), alive.long()], dim=1)
    return refkl.TokenBatch(tokens, attention_mask, completion_mask)


def main() -> list[dict[str, float]]:
    """Train on neutral openings of film reviews, rewarded for friendly endings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; by default the demo's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    PartialState(cpu=not torch.accelerator.is_available())  # processes on CPU find each other
    accelerator = Accelerator()
    torch.manual_seed(accelerator.process_index)

    from refkl.demo import movies, rewards, smollm2

    folder = options.model or smollm2.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = AdamW(refkl.trainable_parameters(model), lr=5e-5)
    texts = cycle(movies.openings(limit=200)["prompt"])

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(options.steps):
            inputs = tokenizer(list(islice(texts, options.batch)), return_tensors="pt", padding=True)
            yield {k: inputs[k].to(accelerator.device) for k in ("input_ids", "attention_mask")}

    def reward(batch: refkl.TokenBatch) -> torch.Tensor:
        rows = zip(batch.input_ids, batch.completion_mask, strict=True)
        completions = [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]
        return torch.tensor(rewards.sentiment(completions=completions))

    history = train(model, batches(), reward, optimizer, accelerator)
    accelerator.end_training()
    return history


if __name__ == "__main__":
    main()
