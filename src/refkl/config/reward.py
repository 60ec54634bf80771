"""Configuration of a reward."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from pathlib import PurePath
from typing import Literal

from refkl.config.options import DtypeName, check_offered, is_import_path


@dataclass(frozen=True, kw_only=True)
class SettledReward:
    """The values of a RewardConfig, with its open fields filled in."""

    name: str
    """Name of the reward in the logs."""
    answer: Literal["tagged", "whole"] | None
    """Position of the answer in the completion, for `task`; None for other rewards."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward to maximise: one of `function`, `model` and `task`.

    A field that belongs to another one of the three is refused if it is set. A config is frozen and keeps the given
    values; `settled` returns the values that open fields stand for.
    """

    function: str | None = None
    """"package.module:function": a function that is called as TRL calls a reward function, with `prompts`,
    `completions` and the data's columns as keyword arguments. It returns one number per completion, or None for a
    completion that it does not apply to."""
    model: str | None = None
    """A folder (or hub name) with a sequence-classification model and its tokenizer, or "package.module:function" for a
    function that returns one. It scores prompt and completion together. Every process holds it whole."""
    task: str | None = None
    """A reasoning-gym task, such as "leg_counting". Its own check scores the completion: 1 for a right answer. The data
    must come from data.source "reasoning_gym:leg_counting"; rows of another task are left to the reward of that
    task."""
    weight: float = 1.0
    """Weight of this reward in the sum."""
    name: str | None = None
    """Name of the reward in the logs, as in rewards/NAME/mean. None means the name of the function, folder or task."""
    label: int | str | None = None
    """Label of the model that is the reward, by name or number, for `model`. A reward model has only one and needs
    none."""
    probability: bool | None = None
    """True to use the probability of the label instead of its logit, for `model` with `label`."""
    dtype: DtypeName | None = None
    """Dtype of the model's weights, for `model`; None means the dtype that they were saved in."""
    batch_size: int | None = None
    """Number of texts per forward pass, for `model`. None means 8."""
    max_length: int | None = None
    """Largest number of tokens of prompt and completion, for `model`; a longer text loses its beginning. None means the
    limit of the model."""
    answer: Literal["tagged", "whole"] | None = None
    """Position of the answer in the completion, for `task`. "tagged" (the default): between the last <answer> and
    </answer>; a completion without them is wrong. "whole": the completion is the answer."""

    def __post_init__(self) -> None:
        check_offered("reward", self)
        kinds = ("function", "model", "task")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            found = f"it has {' and '.join(given)}" if given else "it has none of them"
            raise ValueError(f"An entry of `reward` is a function, a model or a task, and {found}. Give one.")
        for kind, names in _REWARD_OPTIONS.items():
            for name in names:
                if kind != given[0] and getattr(self, name) is not None:
                    raise ValueError(f"reward.{name} has no use with reward.{given[0]}: it is for reward.{kind}.")
        if self.function is not None and not is_import_path(self.function):
            raise ValueError(f"reward.function must read 'package.module:function', got {self.function!r}.")
        if self.probability and self.label is None:
            raise ValueError("reward.probability needs a label: set reward.label to its name or number.")
        for name in ("batch_size", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"reward.{name} must be at least 1, got {value}.")
        if not isfinite(self.weight):
            raise ValueError(f"reward.weight must be finite, got {self.weight}.")
        if not re.fullmatch(r"\w[\w.+-]*", name := self.settled().name):
            raise ValueError(
                f"A reward cannot be called {name!r} in the logs (rewards/NAME/mean). Set reward.name to a word of "
                "letters, digits and .+-_."
            )

    def settled(self) -> SettledReward:
        """Return the values of the fields that may be left open: the name, from the source, and the position of the
        answer."""
        source = next(x for x in (self.function, self.model, self.task) if x is not None)
        name = self.name or (source.split(":")[1] if is_import_path(source) else PurePath(source).name)
        return SettledReward(name=name, answer=self.answer or (None if self.task is None else "tagged"))


_REWARD_OPTIONS: dict[str, tuple[str, ...]] = {
    "model": ("label", "probability", "dtype", "batch_size", "max_length"),
    "task": ("answer",),
}
"""Fields of RewardConfig that belong to one kind of reward."""
