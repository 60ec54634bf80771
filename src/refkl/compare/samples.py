"""What is compared on: a model's own samples."""

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
"""Goes through items one by one, and may show how far it is; the string says what is being done."""


def unwatched(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Shows nothing."""
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
    """Completions that a model draws from its whole distribution: nothing is cut off it (no top-k, top-p or penalty,
    whatever the model's generation_config says), so that an estimate on them is unbiased.

    Args:
        model: a causal language model, bare or inside PEFT.
        tokenizer: its own.
        rows: with "prompt", a string or messages.
        samples: completions of each prompt.
        max_new_tokens: their length at most; the end-of-text token that ends one is part of it.
        temperature: divides the logits.
        seed: of the draws; torch's own random numbers are left alone. Another batch size gives other samples.
        batch_size: sequences at once.
        limit: tokens that a sequence has room for; of a prompt that leaves too little the last ones are taken.
        watch: shows how far it is.

    Raises:
        ValueError: a number that makes no sense; no room for a prompt; a prompt without tokens; as `prompt_ids`.
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
    prompts: list[tuple[int, Any, list[int]]] = []
    truncated = 0
    for number, row in enumerate(rows):
        if row.get("prompt") is None:
            raise ValueError(f"Row {number} of the data has no 'prompt'.")
        ids = prompt_ids(tokenizer, row["prompt"], number) or _beginning(tokenizer, number)
        truncated += room is not None and len(ids) > room
        prompts.append((number, row["prompt"], ids if room is None else ids[-room:]))
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


def _draw(model: nn.Module, prompts: list[list[int]], length: int, temperature: float) -> list[list[int]]:
    """One completion each, with what generation puts behind the end of the shorter ones."""
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
    """While open, the model's generation_config does nothing but end; gives the tokens that end."""
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
    """Up to and with the first token that ends it."""
    length = next((at + 1 for at, token in enumerate(completion) if token in ends), len(completion))
    return completion[:length]


def _beginning(tokenizer: PreTrainedTokenizerBase, number: int) -> list[int]:
    """What an empty prompt begins with."""
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"Row {number} of the data has an empty prompt, and the tokenizer has no beginning-of-text token to sample "
            "from."
        )
    return [tokenizer.bos_token_id]
