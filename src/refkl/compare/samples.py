"""Samples of a model, as texts for a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from refkl.backend import base_model, evaluating
from refkl.compare.texts import Row, Text, Texts, prompt_ids

Watch = Callable[[Sequence[Any], str], Iterable[Any]]
"""Iterates over items, and may show the progress; the string describes the task."""


def unwatched(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Iterate without showing progress."""
    return items


def sample_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    limit: int | None = None,
    watch: Watch = unwatched,
) -> Texts:
    """Draw completions from a model's whole distribution.

    Sampling has no top-k, top-p or penalty, whatever the model's generation_config says, so that an estimate on the
    samples is unbiased.

    Args:
        model: a causal language model, bare or inside PEFT.
        tokenizer: the model's.
        rows: rows with "prompt", a string or messages.
        samples: completions per prompt.
        max_new_tokens: largest length of a completion, including its end-of-text token.
        temperature: divides the logits.
        seed: seed of the draws; torch's own random state is not changed. Another batch size gives other samples.
        batch_size: sequences per forward pass.
        limit: largest number of tokens of a sequence; a prompt that is too long loses its first tokens.
        watch: shows the progress.

    Raises:
        ValueError: an invalid number; no room for a prompt; a prompt without tokens; as `prompt_ids`.
    """
    for name, number in (("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: at 0 there is no distribution to compare.")
    room = None if limit is None else limit - max_new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt: the models take {limit} tokens in all."
        )
    prompts, truncated = _prompts(tokenizer, rows, room)
    wanted = [(*prompt, sample) for prompt in prompts for sample in range(samples)]
    chunks = [wanted[at : at + batch_size] for at in range(0, len(wanted), batch_size)]
    device = next(model.parameters()).device
    texts = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), evaluating(model):
        torch.manual_seed(seed)
        with _neutral(model, tokenizer) as ends:
            for chunk in watch(chunks, "sampling"):
                drawn = _draw(model, [ids for _, _, ids, _ in chunk], max_new_tokens, temperature)
                texts += [
                    Text(number, prompt, ids, _ended(completion, ends), sample)
                    for (number, prompt, ids, sample), completion in zip(chunk, drawn, strict=True)
                ]
    return Texts(texts, room, truncated)


def _prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], room: int | None
) -> tuple[list[tuple[int, Any, list[int]]], int]:
    """Return number, prompt and token ids of each row, of at most `room` tokens, and how many were truncated."""
    prompts: list[tuple[int, Any, list[int]]] = []
    truncated = 0
    for number, row in enumerate(rows):
        if row.get("prompt") is None:
            raise ValueError(f"Row {number} of the data has no 'prompt'.")
        ids = prompt_ids(tokenizer, row["prompt"], number) or _beginning(tokenizer, number)
        truncated += room is not None and len(ids) > room
        prompts.append((number, row["prompt"], ids if room is None else ids[-room:]))
    return prompts, truncated


def _draw(model: nn.Module, prompts: list[list[int]], length: int, temperature: float) -> list[list[int]]:
    """Draw one completion per prompt, including the padding that generation adds to the shorter ones."""
    width, device = max(map(len, prompts)), next(model.parameters()).device
    rows = [[0] * (width - len(ids)) + ids for ids in prompts]
    real = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    tokens = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(real, device=device),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
    )
    return [row[width:] for row in tokens.tolist()]


@contextmanager
def _neutral(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[set[int]]:
    """Set a generation_config that only ends sequences while open; yield the end tokens."""
    base: Any = base_model(model)
    before = base.generation_config
    found = before.eos_token_id if before.eos_token_id is not None else tokenizer.eos_token_id
    ends = [] if found is None else [found] if isinstance(found, int) else list(found)
    base.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)
    try:
        yield set(ends)
    finally:
        base.generation_config = before


def _ended(completion: list[int], ends: set[int]) -> list[int]:
    """Cut a completion after its first end token."""
    length = next((at + 1 for at, token in enumerate(completion) if token in ends), len(completion))
    return completion[:length]


def _beginning(tokenizer: PreTrainedTokenizerBase, number: int) -> list[int]:
    """Return the tokens that replace an empty prompt."""
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"Row {number} of the data has an empty prompt, and the tokenizer has no beginning-of-text token to sample "
            "from."
        )
    return [tokenizer.bos_token_id]
