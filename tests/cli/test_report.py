"""`refkl report`: what the page and the picture hold, what damages them, and the page in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from support.browser import CHROMIUM, browser
from support.models import byte_tokenizer
from support.train_inputs import write_config
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from refkl.cli import main
from refkl.cli.inputs import load_data
from refkl.cli.report import picture
from refkl.cli.report.runs import running_mean, thinned
from refkl.cli.report.texts import Scale
from refkl.cli.run_folder import read_lines
from refkl.cli.samples import sample_texts, text_pieces
from refkl.cli.settings import parse_run
from refkl.cli.train import make_trainer
from refkl.config import SamplesConfig

HOSTILE = "</script><script>document.title = 'owned'</script><img src=http://127.0.0.1:9/x>&amp; \u2028 done"


class Parsed(HTMLParser):
    """A page taken apart: its scripts, the tags in it, and the text inside each element of a class or an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.pieces: list[list[tuple[str, str, str]]] = []
        """Of each sample: text, class and numbers of each piece."""
        self.words: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in ("meta", "link", "input", "img"):
            self._open.append((tag, found))
        if tag == "script":
            self.scripts.append("")
        elif found.get("class") == "text":
            self.pieces.append([])
        elif tag == "span" and self._in_text():
            self.pieces[-1].append(("", found.get("class") or "", found.get("data-n") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag = self._open[-1][0] if self._open else ""
        if tag == "script":
            self.scripts[-1] += data
        elif tag == "span" and self._in_text():
            text, classes, numbers = self.pieces[-1][-1]
            self.pieces[-1][-1] = text + data, classes, numbers
        else:
            self.words.append(data)

    def _in_text(self) -> bool:
        return any(found.get("class") == "text" for _, found in self._open)

    @property
    def said(self) -> str:
        """All text that is not in a script or a piece."""
        return " ".join(" ".join(self.words).split())

    def sources(self) -> dict[str, dict[str, list[Any]]]:
        """The columns of each of Bokeh's data sources that has a name."""
        data = json.loads(next(s for (t, a), s in zip(self._scripts(), self.scripts, strict=True) if a.get("id")))
        found: dict[str, dict[str, list[Any]]] = {}

        def walk(node: Any) -> None:
            if isinstance(node, dict):
                if node.get("name") == "ColumnDataSource" and "name" in node["attributes"]:
                    found[node["attributes"]["name"]] = dict(node["attributes"]["data"]["entries"])
                for value in node.values():
                    walk(value)
            elif isinstance(node, list):
                for value in node:
                    walk(value)

        walk(data)
        return found

    def _scripts(self) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, found) for tag, found in self.tags if tag == "script"]


def reward(step: int) -> float:
    return math.sin(step / 3) + step / 40


def write_run(folder: Path, steps: int = 30, scale: float = 1.0, **files: Any) -> Path:
    """A run folder as `refkl train` leaves it; a file of None is left out."""
    still = {"loss": 0.1, "kl/max": 0.5 * scale, "kl/coef": 0.2 * scale, "kl/saturated": 0.0, "kl/clipped": 0.0}
    rows = [
        {"step": i, "reward": reward(i), "kl": scale * i / 100, "kl/sequence": scale * i / 10, **still}
        for i in range(1, steps + 1)
    ]
    sample = {
        "prompt": "once", "completion": " upon a", "tokens": [" upon", " a"], "log_ratio": [-0.5, 2.0],
        "kl_per_token": [0.02, 0.98], "kl": 1.0,
    }  # fmt: skip
    about = {
        "strategy": "clone",
        "reason": "it is small",
        "source": "the policy",
        "updates": 0,
        "fingerprint": "ab" * 32,
    }
    contents = {
        "metrics": [*rows, {"step": steps, "train_runtime": 3.0}],
        "samples": [{"step": 0, **sample}, {"step": steps, **sample}],
        "reference": {
            "before": about,
            "versions": {"torch": "2.13"},
            "status": "finished",
            "after": about,
            "updates": [],
        },
        "config": "method: grpo\nkl:\n  coef: 0.2\n",
        **files,
    }
    folder.mkdir(parents=True)
    for name, content in contents.items():
        if content is None:
            continue
        if isinstance(content, list):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in content))
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{name}.{'yaml' if name == 'config' else 'json'}").write_text(text)
    return folder


def report(*runs: Path, output: Path) -> Parsed:
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    return Parsed(output.read_text(encoding="utf-8"))


def test_the_page_holds_what_was_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "leash")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n" and not (run / "report.png").exists()
    assert [path.name for path in run.glob(".*")] == []
    page = Parsed((run / "report.html").read_text(encoding="utf-8"))
    sources, steps = page.sources(), list(range(1, 31))
    values = [reward(i) for i in steps]
    assert sources["reward leash"]["step"] == steps and sources["reward leash"]["value"] == values
    assert sources["reward leash"]["mean"][20] == pytest.approx(sum(values[16:21]) / 5, rel=1e-5)
    frontier = sources["frontier reward leash"]
    assert frontier["kl"] == [i / 100 for i in steps] and frontier["reward"] == values and frontier["step"] == steps
    assert sources["kl/coef leash"]["value"] == [0.2] * 30 and sources["kl/sequence leash"]["value"][-1] == 3.0
    assert not any(name.startswith("kl/saturated") for name in sources)
    assert "Not drawn, because it was always 0: kl/saturated, kl/clipped." in page.said
    for said in (
        "finished",
        "clone",
        "it is small",
        "the policy",
        "abababababababab…",
        "torch 2.13",
        "coef: 0.2",
        "never",
    ):
        assert said in page.said, said
    assert any(found.get("title") == "ab" * 32 for _, found in page.tags)
    # From the mean of the first ten steps to that of the last.
    assert f"{sum(values[:10]) / 10:.3g} → {sum(values[-10:]) / 10:.3g}" in page.said and "0.055 → 0.255" in page.said


def test_each_piece_is_coloured_by_its_numbers(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run"), output=tmp_path / "page.html")
    # The scale ends at 1, by the square root in eighths: .02 is in the second, .98 in the last but one.
    one = [(" upon", "k1 l4", "KL 0.0200 · log-ratio -0.500"), (" a", "k7 m8", "KL 0.980 · log-ratio +2")]
    assert page.pieces == [one, one] and "1 nats 0.500 a piece" in page.said
    assert "KL, nats 0 0.016 0.062 0.14 0.25 0.39 0.56 0.77 1+" in page.said
    scale = Scale(2.0)
    assert [scale.level(x) for x in (0.0, 0.03, 0.04, -0.5, 1.99, 2.0, 50.0)] == [0, 0, 1, 4, 7, 8, 8]
    assert all(scale.level(start * (1 + 1e-9)) == i for i, start in enumerate(scale.starts()))


def test_nothing_is_loaded_and_no_text_is_markup(tmp_path: Path) -> None:
    sample = {"step": 0, "prompt": HOSTILE, "completion": HOSTILE, "tokens": [HOSTILE[:10], HOSTILE[10:]]}
    numbers = {"log_ratio": [0.1, 0.2], "kl_per_token": [0.1, 0.2], "kl": 0.3}
    about = {"strategy": HOSTILE, "reason": HOSTILE, "source": HOSTILE, "fingerprint": "f" * 64}
    run = write_run(
        tmp_path / "<b onload=x>'\"", samples=[{**sample, **numbers}], reference={"before": about, "status": HOSTILE},
        config=f"name: {json.dumps(HOSTILE)}\n",
    )  # fmt: skip
    text = (tmp_path / "page.html", report(run, output=tmp_path / "page.html"))[0].read_text(encoding="utf-8")
    page = Parsed(text)
    assert "".join(piece for piece, _, _ in page.pieces[0]) == HOSTILE
    assert len(page.scripts) == 3 and {tag for tag, _ in page.tags}.isdisjoint({"img", "b", "iframe", "object"})
    addresses = {found[name] for _, found in page.tags for name in ("src", "href") if name in found}
    assert addresses == {"data:,"} and not any(name.startswith("on") for _, found in page.tags for name in found)
    policy = next(found["content"] for _, found in page.tags if found.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    for script in page.scripts[1:]:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    for word in ("unsafe-eval", "http", "*", "'self'"):
        assert word not in policy


def test_runs_are_overlaid_and_told_apart(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", 20, config="kl: {coef: 0.0}\n")
    record = json.loads((other / "reference.json").read_text())
    record["before"]["fingerprint"] = "cd" * 32
    (other / "reference.json").write_text(json.dumps({**record, "status": "running"}))
    page = report(one, other, output=tmp_path / "page.html")
    assert len(page.sources()["kl a/run"]["step"]) == 30 and len(page.sources()["kl b/run"]["step"]) == 20
    buttons = [found["data-run"] for tag, found in page.tags if tag == "button"]
    assert buttons == ["0", "1"] and len(page.pieces) == 4
    assert "These runs began from different references" in page.said
    assert "b/run is not finished: running at step 20." in page.said
    assert "kl.coef 0.2 0.0" in page.said and "Different settings: 2" in page.said  # and the method


def test_dpo_shows_margins_and_where_the_reference_moved(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for i in range(1, 21):
        rows.append({"step": i, "loss": 0.5, "rewards/margins": i / 7, "kl": 0.1, "kl/k1": -0.1, "kl/p99": 0.3,
                     "kl/target": 0.2, "kl/new": 1.0})  # fmt: skip
        if i % 4 == 0:
            rows[-1]["kl/first"] = i / 50
            rows.append({"reference_update": {"step": i, "alpha": 0.5, "fingerprint": f"{i:02d}" * 32}})
    rows[3]["kl"], rows[5]["kl"], rows[7]["kl/p99"] = float("nan"), None, float("inf")
    rows.append({"reference_update": {"step": 20, "alpha": 1.0, "kl": 0.7}})
    run = write_run(tmp_path / "dpo", metrics=rows, config="method: dpo\nkl:\n  unit: token\n")
    page = report(run, output=tmp_path / "page.html")
    sources = page.sources()
    assert sources["frontier rewards/margins dpo"]["reward"] == [i / 7 for i in range(1, 21) if i not in (4, 5)]
    assert sources["kl/first dpo"]["value"] == [i / 50 for i in (4, 8, 12, 16, 20)]
    assert sources["kl/target dpo"]["value"] == [0.2] * 20 and sources["kl/k1 dpo"]["value"] == [-0.1] * 20
    assert len(sources["kl/p99 dpo"]["value"]) == 19
    assert sources["moves dpo"]["step"] == [4, 8, 12, 16, 20, 20]
    assert "frontier reward dpo" not in sources
    assert "The reference of dpo moved 6 times" in page.said and "kl/first is to the first one" in page.said
    assert "step 4 (alpha 0.5, to 040404040404)" in page.said and "step 20 (alpha 1, as the KL was 0.7)" in page.said


def test_an_old_folder_and_one_that_just_began(tmp_path: Path) -> None:
    old = write_run(
        tmp_path / "old", samples=[{"step": 0, "prompt": "a", "completion": "b <c>"}], reference=None, config=None
    )
    new = write_run(tmp_path / "new", metrics=[], samples=[], reference={"versions": {}, "status": "running"})
    page = report(old, new, output=tmp_path / "page.html")
    assert "This run recorded no KL" in page.said and "b <c>" in page.said
    assert "old has no reference.json, no config.yaml." in page.said
    assert "new has logged no training step yet." in page.said and "new has no samples.jsonl." in page.said
    alone = report(new, output=tmp_path / "alone.html")
    assert "No numbers were logged that can be drawn." in alone.said and alone.sources() == {}


def test_long_runs_are_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    text = {"completion": "x" * 450, "tokens": ["x"] * 450, "kl": 4.5}
    numbers = {"log_ratio": [0.01] * 450, "kl_per_token": [0.01] * 450}
    rounds = range(0, 10_001, 1000)
    samples = [{"step": step, "prompt": f"prompt {i}", **text, **numbers} for step in rounds for i in range(13)]
    runs = [write_run(tmp_path / str(n), 10_000, samples=samples) for n in range(2)]
    rows = read_lines(runs[0] / "metrics.jsonl")
    rows[6543]["reward"] = 99.0  # one step that stands out is not lost
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(*runs, output=tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    shown = page.sources()["reward 0"]
    assert len(shown["step"]) <= 1000 and (shown["step"][0], shown["step"][-1]) == (1, 10_000)
    assert dict(zip(shown["step"], shown["value"], strict=True))[6544] == 99.0
    assert all(value == reward(step) for step, value in zip(shown["step"], shown["value"], strict=True) if step != 6544)
    assert "thinned to at most 1000 points" in page.said
    assert sum(map(len, page.pieces)) <= 30_000 and {len(pieces) for pieces in page.pieces} == {400}
    for said in ("3 rounds of 11 are shown", "12 prompts of 13 are shown", "the first 400 pieces", "50 more pieces"):
        assert said in page.said, said


def test_thinning_keeps_ends_and_extremes() -> None:
    values = [float(x) for x in torch.randn(5000, generator=torch.Generator().manual_seed(0))]
    kept = thinned(values, 100)
    assert len(kept) <= 100 and kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] == 4999
    assert {min(range(5000), key=values.__getitem__), max(range(5000), key=values.__getitem__)} <= set(kept)
    assert thinned(values[:7], 7) == list(range(7))
    assert running_mean([1.0, 3.0, 5.0, 7.0, 9.0, 11.0]) == [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]


def damage(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text)


WRONG: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no run folder": (lambda run: (run / "metrics.jsonl").unlink(), [], "is not a run folder: it has no metrics.jsonl"),
    "a damaged line": (damage("metrics.jsonl", '{"step": 1\n{"step": 2, "loss": 1}\n'), [], "is damaged in line 1"),
    "a line that is no object": (damage("metrics.jsonl", "[1]\n{}\n"), [], "is damaged in line 1"),
    "a line without a step": (damage("metrics.jsonl", '{"loss": 1}\n'), [], "a line has no step"),
    "a sample without text": (damage("samples.jsonl", '{"step": 1}\n'), [], "lacks step, prompt or completion"),
    "too few numbers": (
        damage("samples.jsonl", '{"step": 1, "prompt": "", "completion": "a", "tokens": ["a"], "log_ratio": []}\n'),
        [], "must have one number per token",
    ),
    "a cut reference": (damage("reference.json", '{"before": '), [], r"reference.json is damaged"),
    "a cut configuration": (damage("config.yaml", "a: [1"), [], r"config.yaml is not valid YAML"),
    "another kind of file": (lambda run: None, ["--output", "page.pdf"], "must end in .html or .htm or .png"),
    "a page and a picture": (lambda run: None, ["--png", "--output", "page.html"], "must end in .png"),
    "no folder for it": (lambda run: None, ["--output", "nowhere/page.html"], "there is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, options, message = WRONG[case]
    run = write_run(tmp_path / "run")
    prepare(run)
    assert main(["report", str(run), *options]) == 2
    assert message in capsys.readouterr().err and not (run / "report.html").exists()


def test_a_run_that_is_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), str(run / ".." / "run")]) == 2 and "is given twice" in capsys.readouterr().err


def test_a_last_line_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    for name, cut in (("metrics.jsonl", b'{"step": 4, "lo'), ("samples.jsonl", '{"prompt": "é'.encode()[:-1])):
        with (run / name).open("ab") as file:
            file.write(cut)
    assert report(run, output=tmp_path / "page.html").sources()["kl run"]["step"] == [1, 2, 3]


def test_a_text_with_line_breaks_of_other_kinds_is_one_line(tmp_path: Path) -> None:
    texts = ["a\u2028b", "\x85", "c\x1cd\r\n"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "lines").write_bytes(lines.encode())
    assert [line["text"] for line in read_lines(tmp_path / "lines")] == texts
    (tmp_path / "lines").write_text("")
    assert read_lines(tmp_path / "lines") == []


def test_a_run_has_one_colour_in_all_panels_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first panel is of a number that the first run does not have."""
    first, second = write_run(tmp_path / "plain"), write_run(tmp_path / "margins")
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "reward"} for line in lines]
    (first / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    drawn: list[Any] = []
    monkeypatch.setattr(picture.plt, "close", drawn.append)
    picture.draw_report(first, second, output=tmp_path / "two.png")
    reward, kl = drawn[0].axes[:2]
    assert {line.get_color() for line in reward.lines} == {"C1"}
    assert {line.get_color() for line in kl.lines} == {"C0", "C1"}
    assert [text.get_text() for text in reward.get_legend().get_texts()] == ["plain", "margins"]
    assert [line.get_color() for line in reward.get_legend().get_lines()] == ["C0", "C1"]


def test_the_picture_is_drawn_when_asked_for(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run") for name in "ab"]
    assert main(["report", str(runs[0]), "--png"]) == 0
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "two.png")]) == 0
    one, two = (matplotlib.image.imread(path) for path in (runs[0] / "report.png", tmp_path / "two.png"))
    assert one.shape == two.shape and not (one == two).all() and not (runs[0] / "report.html").exists()


def trainer(folder: Path, **sections: Any) -> Any:
    """A real one, with a policy that has gone some way from its reference."""
    run = parse_run([str(write_config(folder, "dpo", **sections))])
    made = make_trainer(run, run.trainer_config(), load_data(run.config.data, "dpo"), [])
    made.reference.follow_policy()
    made.model.train()
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def plain_logp(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """[C, V] of one sequence, without padding."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


def test_samples_are_scored_token_by_token(tmp_path: Path) -> None:
    made = trainer(tmp_path, trainer={"per_device_train_batch_size": 2})  # one row at a time
    settings, prompts = SamplesConfig(max_new_tokens=10, temperature=0.7), ["hello", "a", "hi there"]
    state = torch.random.get_rng_state()
    records = sample_texts(made, settings, prompts)
    assert torch.equal(torch.random.get_rng_state(), state) and made.model.training

    tokenizer = byte_tokenizer()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    made.model.eval()
    tokens = made.model.generate(
        **{name: inputs[name] for name in ("input_ids", "attention_mask")}, do_sample=True, temperature=0.7, top_k=0,
        top_p=1.0, max_new_tokens=10, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.no_grad():
        for prompt, row, record in zip(prompts, tokens, records, strict=True):
            completion = row[inputs["input_ids"].shape[1] :].tolist()
            if tokenizer.eos_token_id in completion:
                completion = completion[: completion.index(tokenizer.eos_token_id) + 1]
            ids = tokenizer(prompt)["input_ids"]
            policy, reference = (plain_logp(m, ids, completion) for m in (made.model, made.reference.model))
            ratio = (policy - reference).gather(1, torch.tensor(completion)[:, None])[:, 0]
            exact = (policy.exp() * (policy - reference)).sum(-1)
            counts = [count for _, count in text_pieces(tokenizer, completion, record["completion"])]
            assert "".join(record["tokens"]) == record["completion"] and sum(counts) == len(completion)
            for name, numbers in (("log_ratio", ratio), ("kl_per_token", exact)):
                sums = [float(part.sum()) for part in numbers.split(counts)]
                assert record[name] == pytest.approx(sums, rel=1e-4, abs=1e-5), name
            assert record["kl"] == pytest.approx(float(exact.sum()), rel=1e-4) and record["kl"] > 0.01


def test_samples_without_distributions_or_without_a_reference(tmp_path: Path) -> None:
    settings = SamplesConfig(max_new_tokens=4, temperature=0.0)
    cached = trainer(tmp_path, reference={"cache": str(tmp_path / "cache")})
    (record,) = sample_texts(cached, settings, ["hello"])
    assert "kl_per_token" not in record and record["kl"] == pytest.approx(sum(record["log_ratio"]), rel=1e-4)
    cached.reference.free()
    assert sample_texts(cached, settings, ["hello"]) == [{"prompt": "hello", "completion": record["completion"]}]
    # A quantised reference is to measure what rounding cost on the training data, not on these few tokens.
    quantised = trainer(tmp_path, reference={"quantize": "int8"})
    assert "kl" not in sample_texts(quantised, settings, ["hello"])[0] and quantised.reference.kl_floor is None


@pytest.mark.parametrize("text", ["plain", "naïve 😀 €5\n", "ends in é", "", "日本語", "a\ufffdb"])
def test_pieces_of_bytes_join_to_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    row = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pieces = text_pieces(tokenizer, row, text)
    assert [piece for piece, _ in pieces] == [*text, ""]
    assert [count for _, count in pieces] == [*(len(character.encode()) for character in text), 1]


def test_pieces_of_what_is_no_text_join_to_what_it_decodes_to() -> None:
    tokenizer = byte_tokenizer()
    for seed in range(200):
        row = torch.randint(0, 258, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        text = tokenizer.decode(row, skip_special_tokens=True)
        pieces = text_pieces(tokenizer, row, text)
        assert "".join(piece for piece, _ in pieces) == text and sum(count for _, count in pieces) == 12
        assert all(count > 0 for _, count in pieces)


def test_pieces_keep_the_space_that_a_word_begins_with() -> None:
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "▁so": 1, "▁it": 2, "s": 3}, unk_token="<eos>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    row = [1, 2, 3, 2, 0]
    text = tokenizer.decode(row, skip_special_tokens=True)
    assert text == "so its it"
    assert text_pieces(tokenizer, row, text) == [("so", 1), (" it", 1), ("s", 1), (" it", 1), ("", 1)]


PAINTED = """(() => {
  const [r, g, b] = %s;
  let plots = 0;
  for (const plot of document.querySelectorAll(".plot")) {
    const canvases = [];
    (function walk(node) {
      if (node.tagName === "CANVAS") canvases.push(node);
      for (const inner of [...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children]) walk(inner);
    })(plot);
    const count = canvases.reduce((sum, canvas) => {
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      for (let i = 0; i < pixels.length; i += 4) {
        const far = Math.abs(pixels[i] - r) + Math.abs(pixels[i + 1] - g) + Math.abs(pixels[i + 2] - b);
        if (pixels[i + 3] > 250 && far < 9) sum += 1;
      }
      return sum;
    }, 0);
    plots += count > 50;
  }
  return plots;
})()"""
"""In how many plots a colour is seen."""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    sample = {"step": 30, "prompt": "once", "completion": f" upon{HOSTILE}", "tokens": [" upon", HOSTILE]}
    numbers = {"log_ratio": [-0.5, 2.0], "kl_per_token": [0.02, 0.98], "kl": 1.0}
    runs = [write_run(tmp_path / "leash", samples=[{**sample, **numbers}]), write_run(tmp_path / "loose", 20, 3.0)]
    path = tmp_path / "page.html"
    names = {found["id"] for _, found in report(*runs, output=path).tags if (found.get("id") or "").startswith("plot-")}
    assert names == {f"plot-{n}" for n in ("frontier-reward", "reward", "kl", "coef", "sequence", "tail")}
    ready = f"document.documentElement.dataset.plots === '{len(names)}'"
    with browser() as page:
        # That what is asserted of the page below would be seen if it were otherwise.
        (tmp_path / "control.html").write_text("<img src=http://127.0.0.1:9/x><script>throw Error('seen')</script>")
        page.open(tmp_path / "control.html", 800, 600)
        assert page.requests == ["http://127.0.0.1:9/x"] and any("seen" in error for error in page.errors)
        page.requests, page.errors = [], []

        page.open(path, 1200, 900)
        page.wait(ready)
        assert page.ask("document.title") == "refkl report: leash, loose"
        assert page.wait(PAINTED % [0, 114, 178]) >= 5 and page.ask(PAINTED % [213, 94, 0]) >= 5
        page.ask("document.querySelector('button[data-run=\"1\"]').click()")
        page.wait(f"{PAINTED % [213, 94, 0]} === 0")
        assert page.ask(PAINTED % [0, 114, 178]) >= 5
        assert page.ask("[...document.querySelectorAll('[data-of=\"1\"]')].every((e) => !e.offsetParent)")

        piece = "document.querySelector('.text span')"
        # Scrolling is told to the page a frame later, and hides the tip.
        page.ask(
            f"{piece}.scrollIntoView({{block: 'center'}});"
            "requestAnimationFrame(() => requestAnimationFrame(() => { window.still = true; }))"
        )
        page.wait("window.still")
        x, y = page.ask(f"(b => [b.x + 9, b.y + 9])({piece}.getBoundingClientRect())")
        page.move(x, y)
        assert page.wait("!tip.hidden && tip.textContent") == "KL 0.0200 · log-ratio -0.500"
        colour = f"getComputedStyle({piece}).backgroundColor"
        assert page.ask(colour).startswith("rgba(213, 94, 0")
        page.ask("document.querySelector('input[value=ratio]').click()")
        assert page.ask(colour).startswith("rgba(0, 114, 178")
        page.picture(tmp_path / "light.png")

        page.open(path, 390, 800, dark=True, phone=True)
        page.wait(ready)
        assert page.ask("document.documentElement.scrollWidth") == 390
        assert page.wait(PAINTED % [0x4A, 0xA3, 0xDF]) >= 5
        page.picture(tmp_path / "dark.png")
        assert page.errors == [] and page.requests == []
    light, dark = (matplotlib.image.imread(tmp_path / name) for name in ("light.png", "dark.png"))
    assert light.shape[:2] == (900, 1200) and dark.shape[:2] == (800, 390)
    assert (light[5, 5, :3] == 1).all() and light.std() > 0.05 and dark[5, 5, :3].max() < 0.15 and dark.std() > 0.05
