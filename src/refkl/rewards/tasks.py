"""Verifiable tasks from reasoning-gym: their questions as data, and their own check of an answer as a reward.

Z. Stojanovski et al., "Reasoning Gym: Reasoning Environments for Reinforcement Learning with Verifiable Rewards",
arXiv:2505.24760.

A row keeps its entry (answer, metadata, and the task's settings) as JSON in a column, from which the reward recreates
the check. Some of the package's checks evaluate the model's answer as Python. They get an answer only if it is a plain
literal or plain arithmetic. Three tasks are refused, because their formulas cannot be restricted in this way.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import datasets

from refkl.messages import nearest, unknown
from refkl.rewards.text import Message, completion_text

TASK_SOURCE = "reasoning_gym:"
"""Prefix of data.source, before the task's name."""
COLUMN = "entry"
"""The data's column with each row's entry."""

Entry = dict[str, Any]
"""`{"task", "config", "answer", "metadata"}`."""


def task_data(
    task: str,
    /,
    *,
    size: int = 500,
    seed: int = 0,
    instructions: str | None = "default",
    chat: bool = False,
    **config: Any,
) -> datasets.Dataset:
    """Make the questions of a task, the same for the same arguments.

    Args:
        task: a data set's name in reasoning-gym, such as "leg_counting".
        size: number of questions.
        seed: chooses the questions.
        instructions: text before each question: the name of one of reasoning-gym's system prompts, which ask for the
            answer in <answer> tags, or a text of your own; None for nothing.
        chat: True for prompts that are conversations (instructions as the system's turn, question as the user's).
        config: the task's own settings.

    Returns:
        A data set with the columns `prompt` and `entry`.

    Raises:
        ValueError: an unknown or refused task; settings that do not fit it.
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    config = {**config, "size": size, "seed": seed}
    dataset = _create(task, config)
    said = _instructions(instructions)
    rows: list[dict[str, Any]] = []
    for at in range(size):
        try:
            item = dataset[at]
        except (AssertionError, LookupError, TypeError, ValueError) as error:  # settings that allow no question
            raise ValueError(f"The task {task} cannot make question {at} with the settings {config}: {error}") from None
        entry = {"task": task, "config": config, "answer": item["answer"], "metadata": item["metadata"]}
        rows.append({"prompt": _prompt(item["question"], said, chat), COLUMN: _to_json(entry)})
    return datasets.Dataset.from_list(rows)


class TaskReward:
    """A TRL reward function: the task's own score of each completion, 1 for a right answer.

    A row of another task gets None, which TRL leaves out of the sum: for a mixture of tasks, add a reward for each.

    Args:
        task: as for task_data.
        answer: "tagged": the answer is the text between the last <answer> and </answer>; a completion without them is
            wrong. "whole": the answer is the whole completion.

    Raises:
        ValueError: an unknown or refused task.
        ModuleNotFoundError: reasoning-gym is not installed.
    """

    def __init__(self, task: str, *, answer: Literal["tagged", "whole"] = "tagged", name: str | None = None) -> None:
        _check_task(task)
        self.task = task
        self.answer = answer
        self.__name__ = name or task
        self._datasets: dict[str, Any] = {}

    def check(self, data: datasets.Dataset) -> None:
        """Raise ValueError if the data has a row that this reward could not score."""
        if COLUMN not in data.column_names:
            raise ValueError(self._no_entry(f"the data has the columns {data.column_names}"))
        tasks = {self._read(text)["task"] for text in data[COLUMN]}
        if self.task not in tasks:
            raise ValueError(self._no_entry(f"the data's rows are of {', '.join(sorted(tasks))}"))

    def __call__(
        self,
        completions: Sequence[str | Sequence[Message]],
        entry: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return `B` scores of `B` completions, from the entries of their rows."""
        if entry is None:
            raise ValueError(self._no_entry("the rows have none"))
        return [self._score(completion_text(c), self._read(e)) for c, e in zip(completions, entry, strict=True)]

    def _score(self, completion: str, entry: Entry) -> float | None:
        if entry["task"] != self.task:
            return None
        from reasoning_gym.utils import extract_answer

        answer = extract_answer(completion) if self.answer == "tagged" else completion.strip()
        try:
            if not _ENTRIES.get(self.task, _any)(entry):
                raise ValueError("it holds an expression that the task would not have made")
            if answer is not None and not _ANSWERS.get(self.task, _any)(answer, entry):
                answer = None
            dataset = self._dataset(entry["config"])
            try:
                return float(dataset.score_answer(answer, entry))
            except _STUMBLES:  # some checks raise if the answer does not have the form that they expect
                return float(dataset.score_answer(None, entry))
        except _STUMBLES as error:
            raise ValueError(
                f"The entry of a row cannot be scored by the task {self.task!r}: {type(error).__name__}: {error}. Make "
                f"the data with data.source {TASK_SOURCE + self.task!r}."
            ) from error

    def _dataset(self, config: dict[str, Any]) -> Any:
        """Return the data set whose check scores; some checks use the task's settings."""
        key = json.dumps(config, sort_keys=True)
        if key not in self._datasets:
            self._datasets[key] = _create(self.task, config)
        return self._datasets[key]

    def _read(self, text: str | None) -> Entry:
        if text is None:
            raise ValueError(self._no_entry("a row has none"))
        try:
            entry = _unpacked(json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(self._no_entry(f"a row has {str(text)[:60]!r}, which is no JSON ({error})")) from None
        fields = ("task", "config", "answer", "metadata")
        if not isinstance(entry, dict) or not all(field in entry for field in fields):
            raise ValueError(self._no_entry(f"a row has {str(text)[:60]!r}, which lacks some of {', '.join(fields)}"))
        return entry

    def _no_entry(self, found: str) -> str:
        return (
            f"reward.task {self.task!r} needs rows of this task with the column {COLUMN!r}, and {found}. Use "
            f"data.source {TASK_SOURCE + self.task!r}."
        )


_STUMBLES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _tasks() -> dict[str, tuple[type, type]]:
    """Return every task's class and the dataclass of its settings, by name."""
    try:
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise ModuleNotFoundError(
            "verifiable tasks come from the package reasoning-gym, which is not installed. Install it with: "
            "pip install 'refkl[tasks]'",
            name=error.name,
        ) from error
    return DATASETS


def _check_task(task: str) -> type:
    """Return the dataclass of a task's settings. Raise ValueError if the task is unknown or refused."""
    tasks = _tasks()
    if task not in tasks:
        raise ValueError(
            f"reasoning-gym has no task {task!r}.{nearest(task, tasks)} reasoning_gym.factory.DATASETS lists its "
            f"{len(tasks)} tasks."
        )
    if task in _REFUSED:
        raise ValueError(f"reasoning-gym's task {task!r} cannot be used: {_REFUSED[task]}.")
    return tasks[task][1]


def _create(task: str, config: dict[str, Any]) -> Any:
    settings = _check_task(task)
    fields = [f.name for f in dataclasses.fields(settings)]
    for name in config:
        if name not in fields:
            raise unknown(f"setting of the task {task}", name, (*fields, "instructions", "chat"))
    for name, least in (("size", 1), ("seed", 0)):
        if not isinstance(value := config.get(name), int) or value < least:
            raise ValueError(f"{name} of the task {task} must be a whole number from {least}, got {value!r}.")
    from reasoning_gym import create_dataset

    try:
        return create_dataset(task, **config)
    except (AssertionError, TypeError, ValueError) as error:  # it asserts that its settings are valid
        raise ValueError(f"The task {task} does not take the settings {config}: {error}") from None


def _instructions(asked: str | None) -> str | None:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    if asked is None or " " in asked:
        return asked
    if asked not in SYSTEM_PROMPTS:
        raise unknown("instructions", asked, SYSTEM_PROMPTS)
    return str(SYSTEM_PROMPTS[asked])


def _prompt(question: str, instructions: str | None, chat: bool) -> str | list[Message]:
    if not chat:
        return "\n\n".join(filter(None, (instructions and instructions.strip(), question.strip()))) + "\n"
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    return [*system, {"role": "user", "content": question}]


def _to_json(entry: Entry) -> str:
    """Serialise an entry.

    Raises:
        ValueError: it would not be restored exactly.
    """
    try:
        text = json.dumps(_packed(entry))
    except TypeError as error:
        raise ValueError(f"Rows of the task {entry['task']} cannot be kept as JSON: {error}.") from None
    if _unpacked(json.loads(text)) != entry:
        raise ValueError(f"Rows of the task {entry['task']} do not come back from JSON as they were.")
    return text


def _packed(value: Any) -> Any:
    """Encode tuples and non-string keys for JSON, which lacks them: checks distinguish them."""
    if isinstance(value, tuple):
        return {"__tuple__": [_packed(v) for v in value]}
    if isinstance(value, list):
        return [_packed(v) for v in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _packed(v) for key, v in value.items()}
        return {"__items__": [[_packed(key), _packed(v)] for key, v in value.items()]}
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__tuple__"}:
        return tuple(_unpacked(v) for v in value["__tuple__"])
    if value.keys() == {"__items__"}:
        return {_unpacked(key): _unpacked(v) for key, v in value["__items__"]}
    return {key: _unpacked(v) for key, v in value.items()}


# Tasks whose checks evaluate text in reasoning-gym 0.1.25; a test searches the package's source for them.


def _any(*given: Any) -> bool:
    return True


def _literal(text: str) -> bool:
    """Return True for numbers, strings and lists of them, which are safe to evaluate."""
    try:
        ast.literal_eval(text)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return False
    return True


def _listed(answer: str, entry: Entry) -> bool:
    """Return True if evaluation is safe: these checks evaluate any answer that is not literally right, as a list."""
    return answer in (entry["answer"], *entry["metadata"].get("valid_answers", ())) or _literal(answer)


def _arithmetic(answer: str, entry: Entry) -> bool:
    """Return True for arithmetic without names and powers: 9**9**9**9 would not end."""
    return re.fullmatch(r"[0-9 ()+*/.-]+", answer) is not None and "**" not in answer


def _numbers(entry: Entry) -> bool:
    return _literal(entry["answer"])


def _hexadecimal(entry: Entry) -> bool:
    problem = entry["metadata"]["problem"]
    return re.fullmatch(r"[0-9a-fA-Fx ()+*<>-]+", problem) is not None and "**" not in problem


_FORMULA = "it evaluates the formula that a model writes as Python code"
_REFUSED: dict[str, str] = {
    "simple_integration": _FORMULA,
    "intermediate_integration": _FORMULA,
    "polynomial_multiplication": _FORMULA,
    "composite": "a mixture has a reward for each of its tasks: concatenate their data",
}
_ANSWERS: dict[str, Callable[[str, Entry], bool]] = {
    "string_insertion": _listed,
    "spiral_matrix": _listed,
    "binary_matrix": _listed,
    "n_queens": _listed,
    "countdown": _arithmetic,
    "puzzle24": _arithmetic,
}
"""The answers that may be evaluated, by task. Any other answer is scored as no answer."""
_ENTRIES: dict[str, Callable[[Entry], bool]] = {"number_sorting": _numbers, "bitwise_arithmetic": _hexadecimal}
"""The entries that may be evaluated, by task: these checks evaluate a part of the entry, and data can come from
anywhere."""
