"""What is maximised."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from refkl.config.options import DtypeName, check_offered, is_import_path


@dataclass(frozen=True, kw_only=True)
class SettledReward:
    """What a RewardConfig means where it leaves a field open."""

    name: str
    """What it is called in the logs."""
    answer: Literal["tagged", "whole"] | None
    """For `task`: where the completion has its answer; None for the others."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What GRPO maximises: one of `function`, `model` and `task`.

    A field that is for another one of the three is refused when it is set. A config is frozen and keeps what it was
    given; `settled` says what a field means that is left open.
    """

    function: str | None = None
    """"package.module:function": called as TRL calls a reward function, with `prompts`, `completions` and the data's
    columns as keyword arguments; returns one number per completion, or None for one that it does not apply to."""
    model: str | None = None
    """A folder (or hub name) with a sequence-classification model and its tokenizer, or "package.module:function" for a
    function that returns one. It scores prompt and completion together. Every process holds it whole."""
    task: str | None = None
    """A reasoning-gym task, such as "leg_counting", whose own check scores the completion, 1 for a right answer. For
    data from data.source "reasoning_gym:leg_counting"; rows of another task are left to their own reward."""
    weight: float = 1.0
    """Share of this reward in the sum."""
    name: str | None = None
    """What it is called in the logs, as in rewards/NAME/mean. None takes the function's, the folder's or the task's."""
    label: int | str | None = None
    """For `model`: which of its labels is the reward, by name or number. A reward model has one: none is needed."""
    probability: bool | None = None
    """For `model` with `label`: true takes the label's probability, not its logit."""
    dtype: DtypeName | None = None
    """For `model`: kind of number its weights are held in; None is what they were saved in."""
    batch_size: int | None = None
    """For `model`: texts in one forward. None is 8."""
    max_length: int | None = None
    """For `model`: tokens of prompt and completion; a longer text loses its beginning. None is what the model takes."""
    answer: Literal["tagged", "whole"] | None = None
    """For `task`: where the completion has its answer. "tagged" (the default): between the last <answer> and </answer>,
    without which it is a wrong one. "whole": the completion is the answer."""

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
            raise ValueError("reward.probability is that of a label: set reward.label to its name or number.")
        for name in ("batch_size", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"reward.{name} must be at least 1, got {value}.")
        if not re.fullmatch(r"\w[\w.+-]*", name := self.settled().name):
            raise ValueError(
                f"A reward would be called {name!r} in the logs (rewards/NAME/mean). Set reward.name to a word of "
                "letters, digits and .+-_ for it."
            )

    def settled(self) -> SettledReward:
        """The fields that may be left open: the name by the source, and where a task's answer is."""
        source = next(x for x in (self.function, self.model, self.task) if x is not None)
        name = self.name or (source.split(":")[1] if is_import_path(source) else PurePath(source).name)
        return SettledReward(name=name, answer=self.answer or (None if self.task is None else "tagged"))


_REWARD_OPTIONS: dict[str, tuple[str, ...]] = {
    "model": ("label", "probability", "dtype", "batch_size", "max_length"),
    "task": ("answer",),
}
"""Fields of RewardConfig that are for one kind of reward."""
