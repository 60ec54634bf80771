"""YAML that would be read in part, or without end, is refused with a sentence."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from support.train_inputs import write_config

from refkl.cli import main
from refkl.cli.settings import parse_run
from refkl.yaml_files import YamlRefused, parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 15)
)
REFUSED = {
    "twice": ("a: 1\nb: 2\na: 3\n", r"line 3: the key 'a' is given twice in one section, first in line 1"),
    "twice, inside": ("kl:\n  coef: 1\n  estimator: k3\n  coef: 2\n", r"line 4: the key 'coef' .* line 2"),
    "twice, in a list": ("a:\n- b: 1\n  c: {d: {e: 1, f: 2, e: 3}}\n", r"line 3: the key 'e' .* line 3"),
    "twice, quoted": ("a: 1\n'a': 2\n", "line 2: the key 'a'"),
    "twice, as one number": ("1: a\n1.0: b\n", "line 2: the key '1.0'"),
    "twice, behind an alias": ("a: &x {b: 1, b: 2}\nc: *x\n", "line 1: the key 'b'"),
    "a bomb": (BOMB, r"line \d+: with its aliases written out"),
    "a bomb of merged sections": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{b: *a{i - 1}, c: *a{i - 1}}}\n" for i in range(1, 40)),
        "aliases written out",
    ),
    "an alias of itself": ("a: &a [1, *a]\n", "line 1: an alias stands inside the value that it names"),
    "brackets": ("a: " + "[" * 100_000, "line 1: values are nested too deeply"),
    "braces": ("{a: " * 50_000, "nested too deeply"),
    "lists": ("- " * 50_000 + "x", "nested too deeply"),
    "levels": ("".join(" " * i + "a:\n" for i in range(3000)), "nested too deeply"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_within_a_second(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = REFUSED[case]
    start = time.monotonic()
    with pytest.raises(YamlRefused, match=message):
        parse_yaml(text)
    assert time.monotonic() - start < 1.0
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}, line " in error and "Traceback" not in error


def test_what_is_unambiguous_is_read_as_before() -> None:
    for text in (
        "",
        "a: 1\nb: {a: 2}\n",
        "- a: 1\n- a: 2\n",
        "base: &base {k: 1, l: 2}\nown: {<<: *base, k: 3}\nlist: [*base, *base]\n",
        "a: [1, 2.5, true, null, 1e-3, 2020-01-01]\n",
    ):
        assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("level", ["top", "section", "on the command line", "in a file of a section"])
def test_a_key_given_twice_in_a_configuration(level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, "dpo")
    options = []
    lines = config.read_text().splitlines()
    if level == "top":
        config.write_text("\n".join([*lines, "kl:", "  coef: 5"]))
        expected = f"{config}, line {len(lines) + 1}: the key 'kl' is given twice"
    elif level == "section":
        at = lines.index("  coef: 0.1")
        config.write_text("\n".join([*lines[: at + 1], "  coef: 5", *lines[at + 1 :]]))
        expected = f"{config}, line {at + 2}: the key 'coef' is given twice"
    elif level == "on the command line":
        options, expected = ["--kl", "{coef: 1, coef: 2}"], "line 1: the key 'coef' is given twice"
    else:
        (tmp_path / "kl.yaml").write_text("coef: 1\ncoef: 2\n")
        options, expected = ["--kl", str(tmp_path / "kl.yaml")], "line 2: the key 'coef' is given twice"
    assert main(["train", str(config), *options]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_values_of_the_command_line_are_read_as_before(tmp_path: Path) -> None:
    config = write_config(tmp_path, "dpo")
    options = ["--kl.coef", "1e-3", "--kl", "{coef: 0.25}", "--trainer.learning_rate", "1e-5"]
    run = parse_run([str(config), *options])
    assert run.config.kl.coef == 0.25 and run.trainer["learning_rate"] == 1e-5
    assert parse_run([str(config), "--model.path", "a: b: c"]).config.model.path == "a: b: c"


@pytest.mark.parametrize("text", ["\x00", "[a", "{a: 1", "a: b: c", "&a [*a"])
@pytest.mark.parametrize("option", ["--imports", "--peft", "--model.freeze", "--kl"])
def test_a_value_of_the_command_line_that_is_not_yaml(
    option: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_config(tmp_path, "dpo")), option, text]) == 2
    error = capsys.readouterr().err
    assert "refkl: error: " in error and option[2:] in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
