"""A frozen sequence-classification model as a reward. The score of a text does not depend on other texts.

TRL accepts the model itself, but refkl gives it a function instead. TRL runs all completions of a step through the
model in one forward, does not truncate texts to the model's length, adds no special tokens (which a BERT was trained
with) and reads only the first label. It also pads with the tokenizer's padding token and sets it as the model's. If
that is the end-of-text token and the model had no padding token, a text that ends in it is read one token short, since
the model looks for its last token that is not padding. The function also places the model under ZeRO-3: it is whole on
each rank, since a partitioned one would need every rank to make the same number of forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from refkl.backend import loading_whole
from refkl.messages import nearest
from refkl.rewards.text import Message

logger = logging.get_logger(__name__)

_NO_LIMIT = 10**9
"""transformers writes a huge number for a tokenizer without a length limit."""


class RewardModel:
    """A TRL reward function: the model's logit (or a label's probability) for each prompt with its completion.

    Args:
        model: frozen and put into eval mode here; it moves to the run's device when it first scores.
        tokenizer: the model's own. Conversations are written with its chat template.
        label: the label whose logit is the reward, by name or number; None for a model with one label.
        probability: use the label's probability instead, between 0 and 1.
        batch_size: number of texts per forward pass.
        max_length: largest number of tokens of a text; a longer one loses its beginning, which is part of the prompt.
            None means the model's limit.
        name: name in logs.

    Raises:
        ValueError: a label that the model lacks, or none although it has several; a length over the model's limit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: int | str | None = None,
        probability: bool = False,
        batch_size: int = 8,
        max_length: int | None = None,
        name: str = "reward_model",
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.column = _column(model.config, label)
        self.probability = probability
        self.batch_size = batch_size
        self.max_length = _settled_length(model.config, tokenizer, max_length)
        self._text_config = model.config.get_text_config()
        self._pad = self._text_config.pad_token_id
        if self._pad is not None and self._pad < 0:
            self._pad = None  # old configurations say -1
        if probability and model.config.num_labels == 1:
            raise ValueError("reward.probability needs several labels, and the model has one logit. Leave it out.")
        self.__name__ = name

    @classmethod
    def load(cls, folder: str, *, dtype: str | None = None, **options: Any) -> RewardModel:
        """Load a model from a folder or hub name, whole on every process, in `dtype` or as it was saved.

        Raises:
            ValueError: nothing there that can be loaded; a model without a trained classification head.
        """
        try:
            with loading_whole():
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    folder, dtype="auto" if dtype is None else getattr(torch, dtype), output_loading_info=True
                )
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"reward.model {folder!r} cannot be loaded: {str(error).splitlines()[0]}") from None
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"reward.model {folder!r} has no {', '.join(missing)}: transformers would initialise them at random. "
                "Use a model that was trained for sequence classification."
            )
        return cls(model, tokenizer, **{"name": Path(folder).name, **options})

    def check(self, prompt: str | Sequence[Message]) -> None:
        """Raise ValueError if this reward could not read the prompt."""
        if not isinstance(prompt, str) and self.tokenizer.chat_template is None:
            raise ValueError(
                f"The prompts are conversations, and the tokenizer of the reward model {self.__name__} has no chat "
                "template to convert them to text. Add one to its folder, or use prompts that are text."
            )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Return the scores of `B` prompts with their completions: strings, or lists of messages."""
        rows = [self._tokens(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        # The longest first: texts of similar length share a forward, and if memory is too small, the first one fails.
        order = sorted(range(len(rows)), key=lambda at: -len(rows[at]))
        scores = [0.0] * len(rows)
        device = PartialState().device
        self.model.to(device)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for at, score in zip(batch, self._score([rows[at] for at in batch], device).tolist(), strict=True):
                scores[at] = score
        return scores

    def _tokens(self, prompt: Any, completion: Any) -> list[int]:
        self.check(prompt)
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + completion, verbose=False)["input_ids"]
        else:  # the template writes the special tokens
            text = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        logger.warning_once(
            f"The reward model {self.__name__} takes {self.max_length} tokens; longer texts lose their beginning."
        )
        first = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        kept = ids[:1] if ids[0] in first and self.max_length > 1 else []
        return kept + ids[len(ids) - self.max_length + len(kept) :]

    @torch.no_grad()
    def _score(self, rows: list[list[int]], device: torch.device) -> Tensor:
        """Return the scores [B] in fp32."""
        pad = self._pad
        if pad is None:  # the model has no padding token: use one that is in none of these rows
            pad = next(token for token in count() if all(token not in row for row in rows))
        self._text_config.pad_token_id = pad
        # Pad on the right: a model that counts positions from the first column then needs no position ids.
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
        if not self.probability:
            return logits[:, self.column]
        independent = self.model.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if independent else logits.softmax(-1))[:, self.column]


def _column(config: PreTrainedConfig, label: int | str | None) -> int:
    """Return the index of the logit that is the reward."""
    assert config.num_labels is not None and config.id2label is not None, "transformers counts the one by the other"
    names = [str(name) for _, name in sorted(config.id2label.items())]
    known = ", ".join(f"{at} {name!r}" for at, name in enumerate(names))
    if label is None:
        if len(names) != 1:
            raise ValueError(f"The reward model has {len(names)} labels: {known}. Choose one with reward.label.")
        return 0
    if isinstance(label, str):
        if label not in names:
            raise ValueError(f"The reward model has no label {label!r}.{nearest(label, names)} It has: {known}.")
        return names.index(label)
    if not 0 <= label < len(names):
        raise ValueError(f"The reward model has no label {label}. It has: {known}.")
    return label


def _settled_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int | None:
    """Return the largest number of tokens of a text, or None for no limit."""
    # Models with relative positions have no such field.
    limits = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    limit = min((n for n in limits if n is not None and 0 < n < _NO_LIMIT), default=None)
    if asked is not None and limit is not None and asked > limit:
        raise ValueError(f"reward.max_length is {asked}, and the reward model takes {limit} tokens at most.")
    return asked or limit
