"""Verifiable tasks: a row keeps what its check needs, the check is the task's own, what a model writes is never run."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from datasets import Dataset
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import SYSTEM_PROMPTS

from refkl.cli.inputs import load_data, load_reward
from refkl.config import DataConfig, RewardConfig
from refkl.rewards import TaskReward, task_data
from refkl.rewards.tasks import _ANSWERS, _ENTRIES, _REFUSED

LEGS = {"size": 3, "seed": 5, "min_animals": 1, "max_animals": 2}


def own(task: str, **config: Any) -> Any:
    """The package's data set itself."""
    return reasoning_gym.create_dataset(task, **{"size": 2, "seed": 0, **config})


def rows(task: str, **kwargs: Any) -> list[str]:
    """The entries of a task's data."""
    return list(task_data(task, **{"size": 1, **kwargs})["entry"])


def tagged(answer: str) -> str:
    return f"I think <answer>1</answer>, no: <answer> {answer}</answer> it is"


def test_rows_are_the_tasks_own_questions() -> None:
    data = load_data(DataConfig(source="reasoning_gym:leg_counting", kwargs=LEGS), "grpo")
    items = [own("leg_counting", **LEGS)[at] for at in range(3)]
    begins = SYSTEM_PROMPTS["default"].strip()
    assert data["prompt"] == [f"{begins}\n\n{item['question'].strip()}\n" for item in items]
    assert [json.loads(text)["answer"] for text in data["entry"]] == [item["answer"] for item in items]
    assert json.loads(data["entry"][0])["metadata"]["animals"] == items[0]["metadata"]["animals"]
    assert rows("leg_counting", **LEGS) == list(data["entry"])

    bare = task_data("leg_counting", **LEGS, instructions=None)
    assert bare["prompt"][1] == items[1]["question"].strip() + "\n"
    chat = task_data("leg_counting", **LEGS, instructions="Count the legs.", chat=True)
    turns = [{"role": "system", "content": "Count the legs."}, {"role": "user", "content": items[2]["question"]}]
    assert chat["prompt"][2] == turns
    assert task_data("leg_counting", **LEGS, chat=True)["prompt"][2][0]["content"] == SYSTEM_PROMPTS["default"]


def test_the_tasks_own_check_scores_what_is_in_the_tags() -> None:
    data = task_data("leg_counting", **LEGS)
    right = own("leg_counting", **LEGS)[0]["answer"]
    completions = [tagged(right), tagged(f"{right} legs"), tagged("none"), right]
    scores = [1.0, len(right) / len(f"{right} legs"), 0.0, 0.0]
    reward = TaskReward("leg_counting")
    assert reward.__name__ == "leg_counting"
    assert reward(completions=completions, entry=[data["entry"][0]] * 4, prompts=[""] * 4) == scores
    turns = [[{"role": "assistant", "content": text}] for text in completions]
    assert reward(completions=turns, entry=[data["entry"][0]] * 4) == scores
    whole = load_reward(RewardConfig(task="leg_counting", answer="whole", name="legs"), data)
    assert whole.__name__ == "legs"
    expected = [len(right) / len(tagged(right)), 1.0, len(right) / (len(right) + 5)]
    assert whole(completions=[tagged(right), f" {right}\n", f"{right} legs"], entry=[data["entry"][0]] * 3) == expected


def test_a_check_looks_at_its_rows_settings() -> None:
    """puzzle24 refuses numbers that its settings do not have; they are 1 to 10 if nothing is said."""
    entries = [*rows("puzzle24"), *rows("puzzle24", min_value=5)]
    assert TaskReward("puzzle24", answer="whole")(completions=["4 * 6 * 1 * 1"] * 2, entry=entries) == [1.0, 0.01]


@pytest.mark.parametrize("task", sorted(set(DATASETS) - set(_REFUSED)))
def test_json_changes_no_score(task: str) -> None:
    """Tuples and numbers as keys come back: the checks of the ARC tasks, of some graphs and games, tell them apart."""
    dataset = own(task, size=1, seed=1)
    item = dataset[0]
    answer = str(item["answer"])
    found = TaskReward(task, answer="whole")(completions=[answer], entry=rows(task, seed=1))
    assert found == [dataset.score_answer(answer, item)]


def test_rows_of_another_task_are_left_alone() -> None:
    legs, chain = (rows(task)[0] for task in ("leg_counting", "chain_sum"))
    answer = json.loads(chain)["answer"]
    inputs = {"completions": [tagged(answer)] * 2, "entry": [legs, chain]}
    assert TaskReward("chain_sum")(**inputs) == [None, 1.0]
    assert TaskReward("leg_counting")(**inputs)[1] is None


@pytest.mark.parametrize(
    ("task", "answer", "score"),
    [
        ("prime_factorization", "abc", 0.0),
        ("boxnet", "42", 0.0),
        ("coin_flip", "1e400", 0.0),
        ("game_of_life", "{}", 0.0),
    ],
)
def test_an_answer_that_a_check_stumbles_over_is_a_wrong_one(task: str, answer: str, score: float) -> None:
    item = own(task)[0]
    with pytest.raises((ValueError, TypeError, OverflowError, KeyError)):
        own(task).score_answer(answer, item)
    assert own(task).score_answer(None, item) == score
    reward = TaskReward(task, answer="whole")
    assert reward(completions=[answer], entry=rows(task, size=2)[:1]) == [score]


@pytest.mark.parametrize(
    "task", [*_ANSWERS, "simple_integration", "intermediate_integration", "polynomial_multiplication"]
)
def test_what_a_model_writes_is_never_run(task: str, tmp_path: Path) -> None:
    written = tmp_path / "written"
    code = f"__import__('pathlib').Path({str(written)!r}).write_text('x')"
    dataset = own(task)
    dataset.score_answer(code, dataset[0])
    assert written.exists()  # the package does
    written.unlink()
    if task in _REFUSED:
        with pytest.raises(ValueError, match=f"{task!r} cannot be used: it evaluates the formula"):
            task_data(task)
        with pytest.raises(ValueError, match=f"{task!r} cannot be used"):
            TaskReward(task)
        return
    entry = rows(task)
    for answer in (code, f"[{code}]", f"({code}, 9**9**9**9)"):
        found = TaskReward(task)(completions=[tagged(answer)], entry=entry)
        assert found == [dataset.score_answer(None, dataset[0])]
    assert not written.exists()


@pytest.mark.parametrize("task", _ENTRIES)
def test_nor_what_a_row_holds(task: str, tmp_path: Path) -> None:
    written = tmp_path / "written"
    code = f"__import__('pathlib').Path({str(written)!r}).write_text('x')"
    entry = json.loads(rows(task)[0])
    right = entry["answer"]
    assert TaskReward(task)(completions=[tagged(right)], entry=[json.dumps(entry)]) == [1.0]
    entry["answer"] = entry["metadata"]["problem"] = code
    with pytest.raises(
        ValueError, match=r"cannot be scored by the task.*an expression that the task would not have made"
    ):
        TaskReward(task)(completions=[tagged(right)], entry=[json.dumps(entry)])
    assert not written.exists()


def test_literals_and_arithmetic_are_scored_as_ever() -> None:
    row = rows("string_insertion")
    right = json.loads(row[0])["answer"]
    reward = TaskReward("string_insertion", answer="whole")
    assert reward(completions=[right, str(list(right)), "wrong"], entry=row * 3) == [1.0, 0.1, 0.0]
    config = {"size": 1, "min_numbers": 3, "max_numbers": 3}
    row, item = rows("countdown", **config), own("countdown", **config)[0]
    found = TaskReward("countdown", answer="whole")(
        completions=[item["metadata"]["expression"], "9**9**9"], entry=row * 2
    )
    assert found == [1.0, 0.01]


def test_every_check_that_evaluates_is_known() -> None:
    """Looks for evaluation in all of the package: a new version may have more of it."""
    names = {"eval", "exec", "compile", "parse_expr", "sympify", "lambdify", "literal_eval"}
    found = set()
    for path in Path(str(reasoning_gym.__file__)).parent.rglob("*.py"):
        if not any(name in (text := path.read_text()) for name in names):
            continue
        calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        called = {c.id for c in calls if isinstance(c, ast.Name)}
        called |= {c.attr for c in calls if isinstance(c, ast.Attribute)} - {"compile"}  # of regular expressions
        if called & names:
            found.add(path.stem)
    # Of text of their own, where they make a question; propositional_logic by a parser of its own.
    making = {"basic_arithmetic", "codeio", "generators_00_49", "generators_50_99", "propositional_logic"}
    assert found - making == (set(_REFUSED) | set(_ANSWERS) | set(_ENTRIES)) - {"composite"}


@pytest.mark.parametrize(
    ("task", "kwargs", "message"),
    [
        ("leg_countin", {}, r"no task 'leg_countin'\. Did you mean 'leg_counting'\?"),
        ("composite", {}, r"'composite' cannot be used: a mixture has a reward for each of its tasks"),
        ("leg_counting", {"max_animal": 3}, r"Unknown setting.*'max_animal'\. Did you mean 'max_animals'\?"),
        ("leg_counting", {"max_animals": 0}, r"does not take the settings.*max_animals must be >= min_animals"),
        ("leg_counting", {"max_animals": "few"}, r"does not take the settings"),
        ("leg_counting", {"size": 0}, r"size of the task leg_counting must be a whole number from 1, got 0"),
        ("leg_counting", {"seed": None}, r"seed of the task leg_counting must be a whole number from 0, got None"),
        ("leg_counting", {"instructions": "defalt"}, r"Unknown instructions 'defalt'\. Did you mean 'default'\?"),
    ],
)
def test_settings_that_do_not_fit(task: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(source=f"reasoning_gym:{task}", kwargs=kwargs), "grpo")


def test_rows_that_cannot_be_scored() -> None:
    config = RewardConfig(task="leg_counting")
    with pytest.raises(ValueError, match=r"with the column 'entry', and the data has the columns \['prompt'\]"):
        load_reward(config, Dataset.from_dict({"prompt": ["a"]}))
    with pytest.raises(ValueError, match=r"rows are of chain_sum\. Use data\.source 'reasoning_gym:leg_counting'"):
        load_reward(config, task_data("chain_sum", size=2))
    with pytest.raises(ValueError, match="a row has none"):
        load_reward(
            config,
            Dataset.from_dict({"prompt": ["a", "b"], "entry": [*rows("leg_counting"), None]}),
        )
    reward = TaskReward("leg_counting")
    for entry, message in (
        (None, "and the rows have none"),
        (["{"], "which is no JSON"),
        (["[]"], "which lacks some of task, config, answer, metadata"),
        (
            [json.dumps({"task": "leg_counting", "config": {}, "answer": "1", "metadata": {}})],
            "seed of the task|size of",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            reward(completions=["1"], entry=entry)
    with pytest.raises(ValueError, match="no task 'leg'"):
        TaskReward("leg")
