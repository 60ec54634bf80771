"""Texts generated at fixed prompts, with the KL between policy and reference at each token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refkl import Reference, TokenBatch, score_pair
from refkl.backend import evaluating, unwrap
from refkl.config import SamplesConfig


def sample_texts(trainer: Any, settings: SamplesConfig, prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """Generate at the prompts, and score the completions under policy and reference.

    Every rank must call this (shards are gathered), and gets the same result.

    Returns:
        One dict per prompt, with "prompt" and "completion". If `can_score(reference)`, also "tokens", the pieces of the
        completion; "log_ratio", log policy - log reference of each in nats; "kl_per_token", the exact KL(policy ‖
        reference) of the distributions that each was drawn from; and "kl", their sum over the completion. A reference
        with a cache keeps no distributions: then "kl_per_token" is missing, and "kl" sums the log-ratios. The numbers
        are at temperature 1, whatever the sampling temperature: they compare the models, not the sampler.
    """
    tokenizer = trainer.processing_class
    texts = [
        p if isinstance(p, str) else tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True).to(trainer.accelerator.device)
    tokenizer.padding_side = side
    width = inputs["input_ids"].shape[1]
    tokens, ends = _generate(trainer, settings, inputs)
    rows = [tokens[i, width : width + end].tolist() for i, end in enumerate(ends)]
    records = [
        {"prompt": text, "completion": tokenizer.decode(row, skip_special_tokens=True)}
        for text, row in zip(texts, rows, strict=True)
    ]
    if not can_score(trainer.reference):
        return records
    lengths = torch.tensor(ends, device=tokens.device)[:, None]
    scored = torch.arange(tokens.shape[1] - width, device=tokens.device) < lengths
    attention = inputs["attention_mask"].to(tokens.device)
    batch = TokenBatch(
        tokens,
        torch.cat([attention, scored.to(attention.dtype)], 1),
        torch.cat([torch.zeros_like(attention, dtype=torch.bool), scored], 1),
        prefix=trainer.scoring.prefix,
    )
    found = _score(trainer, batch)
    for i, (record, row) in enumerate(zip(records, rows, strict=True)):
        numbers = {name: x[i, width : width + len(row)].tolist() for name, x in found.items()}
        record |= _by_piece(tokenizer, row, record["completion"], numbers)
    return records


def can_score(reference: Reference) -> bool:
    """Return True if the reference can score new texts without side effects.

    It cannot after its weights were freed. A quantised reference measures its floor on the first batch it scores, which
    must be training data.
    """
    return not reference.freed and (reference.config.quantize is None or reference.kl_floor is not None)


def _generate(trainer: Any, settings: SamplesConfig, inputs: Any) -> tuple[Tensor, list[int]]:
    """Return [N, P + C] prompts and completions, and each completion's length, including its end-of-text token."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    length = settings.max_new_tokens or getattr(trainer.args, "max_completion_length", None) or 32
    warm = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    choice = warm if settings.temperature else {"do_sample": False}
    # A fixed seed; the run's own random state is not changed.
    with torch.random.fork_rng(), torch.no_grad(), evaluating(model):
        torch.manual_seed(0)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **choice,
            max_new_tokens=length,
            pad_token_id=trainer.processing_class.pad_token_id,
            use_cache=True,
            synced_gpus=trainer.accelerator.num_processes > 1,
        )
    end = model.generation_config.eos_token_id
    endings = set(end if isinstance(end, list) else [] if end is None else [end])
    completions = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return tokens, [next((i + 1 for i, t in enumerate(row) if t in endings), len(row)) for row in completions]


def _score(trainer: Any, batch: TokenBatch) -> dict[str, Tensor]:
    """Return [N, T] "log_ratio", and "kl_per_token" if it can be computed; nats."""
    # If a head is not redirected, the logits of both models are in memory at once: use half a micro-batch's rows.
    rows = max(1, trainer.args.per_device_train_batch_size // 2)
    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad(), evaluating(unwrap(trainer.model)):
        for start in range(0, len(batch), rows):
            part = slice(start, start + rows)
            tokens = batch.input_ids[part], batch.attention_mask[part], batch.completion_mask[part]
            some = TokenBatch(*tokens, prefix=batch.prefix)
            for name, numbers in _score_some(trainer, some).items():
                parts.setdefault(name, []).append(numbers.float().cpu())
    return {name: torch.cat(numbers) for name, numbers in parts.items()}


def _score_some(trainer: Any, batch: TokenBatch) -> dict[str, Tensor]:
    try:
        pair = score_pair(trainer.model, trainer.reference, batch, divergence="reverse_kl")
    except ValueError:  # no distributions to compare: a cache keeps none, or the two vocabularies differ in size
        pair = score_pair(trainer.model, trainer.reference, batch)
    exact = {} if pair.divergence is None else {"kl_per_token": pair.divergence}
    return {"log_ratio": pair.policy.logp - pair.reference.logp, **exact}


def _by_piece(
    tokenizer: PreTrainedTokenizerBase, row: list[int], text: str, numbers: dict[str, list[float]]
) -> dict[str, Any]:
    """Return the numbers of a completion's tokens by pieces of its text. A character of several tokens has their
    sum."""
    pieces = text_pieces(tokenizer, row, text)
    bounds = [0]
    for _, count in pieces:
        bounds.append(bounds[-1] + count)
    total = sum(numbers.get("kl_per_token", numbers["log_ratio"]))
    sums = {
        name: [_short(sum(values[start:end])) for start, end in pairwise(bounds)] for name, values in numbers.items()
    }
    return {"kl": _short(total), "tokens": [piece for piece, _ in pieces], **sums}


def text_pieces(tokenizer: PreTrainedTokenizerBase, row: list[int], text: str) -> list[tuple[str, int]]:
    """Return the text that each token adds, and the number of tokens: several may make up one character.

    The pieces join to `text`, the tokens decoded without special tokens. A special token is an empty piece.
    """
    pieces: list[tuple[str, int]] = []
    special = set(tokenizer.all_special_ids)

    def decoded(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    position = before = start = 0
    for end in range(1, len(row) + 1):
        # Decode each token together with the piece before it: by itself, it can lose its leading space.
        piece = decoded(row[before:end])[len(decoded(row[before:start])) :]
        if text.startswith(piece, position):  # an incomplete character decodes to another one
            position += len(piece)
            if not piece and pieces and pieces[-1][0].endswith("\ufffd") and special.isdisjoint(row[start:end]):
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + end - start)  # further bytes of the replacement character
            else:
                pieces.append((piece, end - start))
                before = start
            start = end
    if start < len(row):
        pieces.append((text[position:], len(row) - start))
    elif position < len(text):
        pieces[-1] = (pieces[-1][0] + text[position:], pieces[-1][1])
    return pieces


def _short(number: float) -> float:
    """Round to six digits, the precision of 32 bits."""
    return float(f"{number:.6g}")
