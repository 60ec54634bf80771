"""`reference.cache`: what was scored once is not scored again, and nothing else is ever answered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from support.launching import accelerate_launch, run
from support.models import batch, byte_tokenizer, llama, scored
from support.trl_runs import COMMON, PAIRS
from torch import nn
from transformers import LlamaForCausalLM
from trl import DPOConfig

from refkl import Reference, ReferenceConfig, SyncConfig, TokenBatch, build_reference, score_pair
from refkl.reference import CloneReference, HeldReference
from refkl.reference import score as base
from refkl.reference.cached import score_files as store
from refkl.reference.cached.row_keys import row_keys
from refkl.sync import SyncReferenceCallback
from refkl.trl import KLDPOTrainer


def lora(alpha: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(llama(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])).eval()


def trained_lora(alpha: int = 8) -> nn.Module:
    policy = lora(alpha)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return policy


POLICIES: dict[str, Callable[[], nn.Module]] = {"clone": llama, "swap": llama, "adapter": lora}


def cached(policy: nn.Module, folder: Path, strategy: str = "clone", **options: Any) -> Reference:
    return build_reference(policy, ReferenceConfig(strategy=strategy, cache=str(folder), **options))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of the batches that a reference's model was run on."""
    shapes: list[tuple[int, int]] = []
    score_model = base.score_model

    def counted(model: nn.Module, tokens: TokenBatch, **options: Any) -> Any:
        shapes.append(tuple(tokens.input_ids.shape))
        return score_model(model, tokens, **options)

    monkeypatch.setattr(base, "score_model", counted)
    return shapes


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """A file that is not used is warned of; where no test expects that, none is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in the cache of scores is not used")
        yield


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.arrow"))


@pytest.mark.parametrize("strategy", POLICIES)
def test_scores_are_those_without_a_cache(strategy: str, tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    policy, tokens = POLICIES[strategy](), batch()
    right = build_reference(policy, strategy).score(tokens, entropy=True)
    for once_more in (False, True):  # the second time in what could be another process
        reference = cached(policy, tmp_path, strategy)
        forwards.clear()
        for _ in range(2):
            scores = reference.score(tokens, entropy=True)
            assert torch.equal(scores.logp, right.logp) and torch.equal(scores.entropy, right.entropy)
            assert scores.fingerprint == right.fingerprint and scores.temperature == 1.0 and scores.hidden is None
        assert len(forwards) == (0 if once_more else 1)
        stats = reference.cache.stats
        assert (stats.hits, stats.misses, stats.rows) == ((6, 0, 3) if once_more else (3, 3, 3))
        reference.cache.write()
        assert reference.cache.stats.bytes == sum(path.stat().st_size for path in files(tmp_path)) > 0


def test_fp64_stays_fp64(tmp_path: Path) -> None:
    policy = llama().double()
    right = build_reference(policy, "clone").score(batch()).logp
    for _ in range(2):
        reference = cached(policy, tmp_path)
        found = reference.score(batch()).logp
        assert found.dtype == torch.float64 and torch.equal(found, right)
        reference.cache.write()


def test_padding_and_company_are_no_part_of_a_row(tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    reference = cached(llama(), tmp_path)
    right = reference.score(batch()).logp
    forwards.clear()
    for tokens in (batch(padding="left"), batch(padding="left", width=17), batch(width=12)):
        tokens = dataclasses.replace(tokens, input_ids=tokens.input_ids.masked_fill(tokens.attention_mask == 0, 77))
        found = reference.score(tokens).logp
        assert torch.equal(scored(found, tokens), scored(right, batch()))
        assert not found[~tokens.completion_mask].any()
    tokens = batch()
    last = TokenBatch(tokens.input_ids[2:, :4], tokens.attention_mask[2:, :4], tokens.completion_mask[2:, :4])
    assert torch.equal(reference.score(last).logp, right[2:, :4])
    assert not forwards


def test_only_what_is_missing_is_scored(tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    policy = llama()
    reference, plain = cached(policy, tmp_path), build_reference(policy, "clone")
    reference.score(batch((9,), padding="left"))
    tokens = batch((9, 6, 4), padding="left")  # its first row is the one above
    expected = plain.score(tokens).logp
    forwards.clear()
    torch.testing.assert_close(reference.score(tokens).logp, expected, rtol=0, atol=1e-6)
    assert forwards == [(2, 6)]  # and no wider than they are
    twice = TokenBatch(*(torch.cat([t, t]) for t in (batch(seed=7).input_ids, batch().attention_mask,
                                                      batch().completion_mask)))  # fmt: skip
    forwards.clear()
    found = reference.score(twice).logp
    assert forwards == [(3, 9)] and torch.equal(found[:3], found[3:])
    assert reference.cache.stats == dataclasses.replace(reference.cache.stats, hits=4, misses=6, rows=6)


def test_a_row_of_which_nothing_is_scored(tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    reference = cached(llama(), tmp_path)
    tokens = batch((9, 6), completion=(3, 0))
    assert not reference.score(tokens).logp[1].any() and forwards == [(1, 9)]
    nothing = batch((6, 1), completion=0)
    assert not reference.score(nothing, entropy=True).entropy.any() and len(forwards) == 1


TOKENS = batch()
_OTHER = {
    "a token": lambda: dataclasses.replace(
        TOKENS, input_ids=TOKENS.input_ids.clone().index_fill_(1, torch.tensor(1), 9)
    ),
    "the mask": lambda: batch(completion=2),
    "the length": lambda: batch((10, 7, 5), completion=3),
    "positions": lambda: batch(position_ids=2 * (TOKENS.attention_mask.cumsum(-1) - 1).clamp(min=0)),
    "an argument of the model": lambda: batch(model_inputs={"output_attentions": False}),
    "another value of it": lambda: batch(model_inputs={"output_attentions": None}),
}


@pytest.mark.parametrize("what", _OTHER)
def test_any_other_row_is_scored_anew(what: str, tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    policy, tokens = llama(), _OTHER[what]()
    reference = cached(policy, tmp_path)
    reference.score(TOKENS)
    reference.score(batch(model_inputs={"output_attentions": True}))
    forwards.clear()
    found = reference.score(tokens).logp
    assert forwards == [tuple(tokens.input_ids.shape)]
    assert torch.equal(found, build_reference(policy, "clone").score(tokens).logp)


def test_temperature_and_entropy_are_in_the_key(tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    policy = llama()
    reference, plain = cached(policy, tmp_path), build_reference(policy, "clone")
    for temperature, entropy in ((1.0, False), (0.7, False), (1.0, True), (0.7, True)):
        for _ in range(2):
            found = reference.score(TOKENS, temperature=temperature, entropy=entropy)
            assert found.temperature == temperature and (found.entropy is not None) == entropy
            assert torch.equal(found.logp, plain.score(TOKENS, temperature=temperature).logp)
    assert reference.cache.stats.misses == 12 and reference.cache.stats.hits == 12
    assert torch.equal(reference.score(TOKENS, temperature=1).logp, plain.score(TOKENS).logp)
    assert reference.cache.stats.misses == 12


def test_inputs_for_each_token_are_in_the_key() -> None:
    def keys(values: torch.Tensor, padding: str = "right") -> list[bytes | None]:
        return row_keys(batch(padding=padding, model_inputs={"token_type_ids": values}), 1.0, False)

    kinds = TOKENS.attention_mask.clone()
    other = kinds.clone()
    other[1, 0] = 2
    assert [a == b for a, b in zip(keys(kinds), keys(other), strict=True)] == [True, False, True]
    other = kinds.masked_fill(TOKENS.attention_mask == 0, 5)  # at padding
    assert keys(kinds) == keys(other) == keys(batch(padding="left").attention_mask, "left")
    assert keys(kinds) != row_keys(TOKENS, 1.0, False) != row_keys(batch(position_ids=kinds), 1.0, False)
    assert keys(kinds) != keys(kinds.float())


def test_inputs_that_belong_to_no_row_are_refused(tmp_path: Path) -> None:
    tokens = batch(model_inputs={"pixel_values": torch.zeros(3, 4, 4)})
    with pytest.raises(ValueError, match=r"model_inputs\['pixel_values'\] of shape \[3, 4, 4\] cannot be split"):
        cached(llama(), tmp_path).score(tokens)


CIRCUMSTANCES: dict[str, Callable[[], Any]] = {
    "one bit of a weight": lambda: _one_bit(),
    "another dtype": lambda: llama().double(),
    "another base of rotary positions": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    "another epsilon": lambda: llama(rms_norm_eps=1e-2),
    "another attention kernel": lambda: llama(attn_implementation="eager"),
}


def _one_bit() -> nn.Module:
    policy = llama()
    policy.model.norm.weight.data.view(torch.int32)[3] ^= 1
    return policy


@pytest.mark.parametrize("what", CIRCUMSTANCES)
def test_another_model_is_scored_anew(what: str, tmp_path: Path) -> None:
    first = cached(llama(), tmp_path)
    first.fill([TOKENS])
    torch.manual_seed(0)
    policy = CIRCUMSTANCES[what]()
    second = cached(policy, tmp_path)
    assert torch.equal(second.score(TOKENS).logp, build_reference(policy, "clone").score(TOKENS).logp)
    assert second.cache.stats.misses == 3
    torch.manual_seed(0)
    same = cached(llama(), tmp_path)
    same.score(TOKENS)
    assert same.cache.stats.misses == 0


def test_what_scales_an_adapter_is_in_the_key(tmp_path: Path) -> None:
    """Two adapters with the same weights, one of which counts twice."""
    for alpha in (8, 16):
        torch.manual_seed(3)
        policy = trained_lora(alpha)
        reference = cached(policy, tmp_path)
        assert torch.equal(reference.score(TOKENS).logp, build_reference(policy, "clone").score(TOKENS).logp)
        assert reference.cache.stats.misses == 3
        reference.cache.write()
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 3.0)
    reference = cached(policy, tmp_path)
    assert torch.equal(reference.score(TOKENS).logp, build_reference(policy, "clone").score(TOKENS).logp)
    assert reference.cache.stats.misses == 3
    # Where the adapter is off it does not matter.
    for alpha in (8, 16):
        reference = cached(lora(alpha), tmp_path, "adapter")
        reference.score(TOKENS)
        assert reference.cache.stats.misses == (3 if alpha == 8 else 0)
        reference.cache.write()


def test_autocast_is_in_the_key(tmp_path: Path) -> None:
    policy = llama()
    reference, plain = cached(policy, tmp_path), build_reference(policy, "clone")
    scores = []
    for _ in range(2):
        for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with context:
                scores.append(reference.score(TOKENS).logp)
                assert torch.equal(scores[-1], plain.score(TOKENS).logp)
    assert not torch.equal(scores[0], scores[1]) and reference.cache.stats.misses == 6


def test_a_saved_and_loaded_policy_has_the_same_key(tmp_path: Path) -> None:
    policy = llama()
    cached(policy, tmp_path / "cache").fill([TOKENS])
    policy.save_pretrained(tmp_path / "model")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    loaded.config.use_cache, loaded.config.pad_token_id = False, 3  # as trainers set them
    for strategy in ("clone", "swap"):
        reference = cached(loaded, tmp_path / "cache", strategy)
        reference.score(TOKENS)
        assert reference.cache.stats.misses == 0


def test_what_needs_more_than_log_probabilities_is_refused(tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    policy = llama()
    reference = cached(policy, tmp_path)
    with pytest.raises(ValueError, match=r"hidden states are not kept by reference\.cache"):
        reference.score(TOKENS, hidden=True)
    with pytest.raises(ValueError, match="an exact divergence needs the reference's hidden states"):
        score_pair(policy, reference, TOKENS, divergence="reverse_kl")
    with pytest.raises(ValueError, match="an exact divergence needs"), reference.logits(TOKENS):
        pass
    pair = score_pair(policy, reference, TOKENS)
    assert torch.equal(pair.policy.logp, pair.reference.logp) and len(forwards) == 1


_VALUE = b""
"""A value of the file that is damaged."""
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off at the end": lambda data: data[:-100],
    "cut off in the values": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit of a value": lambda data: data.replace(_VALUE[:4], bytes([_VALUE[0] ^ 1]) + _VALUE[1:4]),
    "another's": lambda data: b"this is no Arrow file at all",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_and_its_rows_are_scored_anew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = llama()
    right = build_reference(policy, "clone").score(TOKENS).logp
    monkeypatch.setitem(globals(), "_VALUE", scored(right, TOKENS)[:1].numpy().tobytes())
    cached(policy, tmp_path).fill([TOKENS])
    (path,) = files(tmp_path)
    cached(policy, tmp_path).fill([batch(seed=1)])
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[name](whole))
    assert path.read_bytes() != whole
    reference = cached(policy, tmp_path)
    with pytest.warns(UserWarning, match=re.escape(str(path))) as caught:
        assert torch.equal(reference.score(TOKENS).logp, right)
        reference.score(batch(seed=1))
        reference.cache._store.scan()  # it is not named twice
    assert len(caught) == 1 and reference.cache.stats.misses == 3, "the other file holds"
    reference.cache.write()  # the same rows in the same file: it is whole again
    later = cached(policy, tmp_path)
    assert torch.equal(later.score(TOKENS).logp, right) and later.cache.stats.misses == 0


def test_a_file_with_its_checksum_in_its_name_that_is_no_arrow_file(tmp_path: Path) -> None:
    cached(llama(), tmp_path).fill([TOKENS])
    text = b"this is no Arrow file at all"
    foreign = files(tmp_path)[0].with_name(f"{hashlib.sha256(text).hexdigest()[:32]}.arrow")
    foreign.write_bytes(text)
    torch.manual_seed(0)
    reference = cached(llama(), tmp_path)
    with pytest.warns(UserWarning, match=f"{foreign.name} in the cache of scores is not used: it is not an Arrow file"):
        reference.score(TOKENS)


def test_scores_of_another_reference_are_not_taken_from_its_file(tmp_path: Path) -> None:
    """A whole, right file, that somebody copied to where the scores of another reference are."""
    policy = llama()
    cached(policy, tmp_path).fill([TOKENS])
    (first,) = files(tmp_path)
    policy.model.norm.weight.data += 1
    other = cached(policy, tmp_path)
    other.score(batch(seed=1))
    folder = next(path for path in tmp_path.iterdir() if path != first.parent)
    (folder / first.name).write_bytes(first.read_bytes())
    other = cached(policy, tmp_path)
    with pytest.warns(UserWarning, match="scores are of another reference"):
        found = other.score(TOKENS).logp
    assert torch.equal(found, build_reference(policy, "clone").score(TOKENS).logp)


def test_files_are_arrow_that_others_can_read(tmp_path: Path) -> None:
    reference = cached(llama(), tmp_path)
    right = reference.score(TOKENS, entropy=True)
    reference.cache.write()
    (path,) = files(tmp_path)
    table = pa.ipc.open_file(path).read_all()
    assert table.column_names == ["key", "logp", "entropy"]
    assert table["logp"].to_pylist() == [row[mask].tolist() for row, mask in
                                         zip(right.logp, TOKENS.completion_mask, strict=True)]  # fmt: skip
    about = json.loads(table.schema.metadata[b"refkl"])
    assert about["fingerprint"] == reference.fingerprint() and about["model"] == "LlamaForCausalLM"


def _fill(cache: Path, model: Path, first: int, last: int, *how: str, fails: bool = False) -> tuple[int, int]:
    arguments = ["tests/scripts/cached_fill.py", str(cache), str(model), str(first), str(last), *how]
    output = run([sys.executable, *arguments], timeout=120, fails=fails)
    found = re.search(r"scored (\d+), found (\d+)", output)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    policy = llama()
    policy.save_pretrained(tmp_path / "model")
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(_fill, tmp_path / "cache", tmp_path / "model", *part) for part in ((0, 12), (6, 18))]
        results = [job.result() for job in both]
    assert all(scored + found == 36 for scored, found in results)
    reference = cached(policy, tmp_path / "cache")
    stats = reference.fill([batch(seed=seed) for seed in range(18)], free=True)
    assert stats.misses == 0 and stats.rows == 54 and len(files(tmp_path)) >= 18
    plain = build_reference(policy, "clone")
    for seed in range(18):
        assert torch.equal(reference.score(batch(seed=seed)).logp, plain.score(batch(seed=seed)).logp)


def test_what_another_process_writes_is_found_while_running(
    tmp_path: Path, forwards: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = llama()
    reference, other = cached(policy, tmp_path), cached(policy, tmp_path)
    reference.score(TOKENS)
    other.fill([batch(seed=1), batch(seed=2)])
    forwards.clear()
    reference.score(batch(seed=1))
    assert len(forwards) == 1, "the folder is not listed for each row"
    monkeypatch.setattr(store, "SCAN_SECONDS", 0.0)
    reference.score(batch(seed=2))
    assert len(forwards) == 1


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    policy = llama()
    policy.save_pretrained(tmp_path / "model")
    cache = tmp_path / "cache"
    assert _fill(cache, tmp_path / "model", 0, 2, "killed", fails=True) == (-1, -1)
    (left,) = cache.rglob("*.refkl-tmp")
    assert not files(cache)
    assert _fill(cache, tmp_path / "model", 0, 2) == (6, 0)
    assert _fill(cache, tmp_path / "model", 0, 2) == (0, 6)
    assert left.exists(), "its process may still be writing"
    os.utime(left, (time.time() - 2 * store.ABANDONED_SECONDS,) * 2)
    cached(policy, cache).score(batch(seed=0))
    assert not left.exists()


def test_what_is_not_written_yet_is_written_at_the_end_of_the_process(tmp_path: Path) -> None:
    code = (
        "import torch; torch.manual_seed(0)\n"
        "from support.models import batch, llama; from refkl import ReferenceConfig, build_reference\n"
        f"reference = build_reference(llama(), ReferenceConfig(strategy='clone', cache={str(tmp_path)!r}))\n"
        "reference.score(batch())\n"
        "print('files', len(list(reference.cache.folder.rglob('*.arrow'))))"
    )
    assert "files 0" in run([sys.executable, "-c", code], timeout=120)
    assert len(files(tmp_path)) == 1
    reference = cached(llama(), tmp_path)
    reference.score(batch())
    assert reference.cache.stats.misses == 0


@pytest.mark.parametrize("strategy", ["clone", "swap"])
def test_an_updated_reference_is_never_answered_from_before(
    strategy: str, tmp_path: Path, forwards: list[tuple[int, int]]
) -> None:
    policy = llama()
    reference = cached(policy, tmp_path, strategy)
    before = reference.score(TOKENS).logp
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assert torch.equal(reference.score(TOKENS).logp, before)
    reference.save(tmp_path / "saved")
    reference.update(policy, alpha=0.5)
    assert reference.recorded_fingerprint is None
    forwards.clear()
    half = reference.score(TOKENS)
    assert len(forwards) == 1 and half.fingerprint == reference.fingerprint()
    assert torch.equal(reference.score(TOKENS).logp, half.logp) and len(forwards) == 1
    reference.update(policy, alpha=1.0)
    now = reference.score(TOKENS).logp
    assert torch.equal(now, build_reference(policy, "clone").score(TOKENS).logp)
    assert not torch.equal(half.logp, before) and not torch.equal(now, half.logp)
    forwards.clear()
    reference.load(tmp_path / "saved")  # back to what is known
    assert torch.equal(reference.score(TOKENS).logp, before) and not forwards


def test_a_reference_that_follows_the_policys_dtype_has_another_key(tmp_path: Path) -> None:
    policy = llama()
    reference = cached(policy, tmp_path)
    first = reference.score(TOKENS).logp
    policy.bfloat16()
    second = reference.score(TOKENS).logp
    assert not torch.equal(first, second)
    assert torch.equal(second, build_reference(policy, "clone").score(TOKENS).logp)


@pytest.mark.parametrize("strategy", ["clone", "swap"])
def test_freed_weights(strategy: str, tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    policy = llama()
    reference = cached(policy, tmp_path, strategy)
    right, fingerprint = reference.score(TOKENS).logp, reference.fingerprint()
    assert reference.memory().total > 0
    stats = reference.fill([TOKENS, batch(seed=1)], free=True)
    assert reference.freed and reference.memory().total == 0 and (stats.misses, stats.hits) == (6, 3)
    forwards.clear()
    nn.init.normal_(policy.model.norm.weight)
    policy.model.embed_tokens.requires_grad_(False)
    reference.follow_policy()
    assert torch.equal(reference.score(TOKENS).logp, right) and not forwards
    assert reference.fingerprint() == reference.provenance()["fingerprint"] == fingerprint
    for tokens, options in ((batch(seed=9), {}), (TOKENS, {"temperature": 0.5}), (TOKENS, {"entropy": True})):
        with pytest.raises(ValueError, match=r"weights were freed, and row 0 \(9 tokens, 3 of them scored, at"):
            reference.score(tokens, **options)
    for what, call in {
        "be moved": lambda: reference.update(policy),
        "be saved": lambda: reference.save(tmp_path / "saved"),
        "be loaded": lambda: reference.load(tmp_path / "saved"),
    }.items():
        with pytest.raises(ValueError, match=f"weights were freed once its cache was filled, so it cannot {what}"):
            call()
    with pytest.raises(ValueError, match="cannot be moved"):
        SyncReferenceCallback(reference, SyncConfig()).reference.check_movable(policy)
    reference.free()  # again is no matter


def test_another_process_can_fill_what_a_freed_reference_is_asked_for(tmp_path: Path) -> None:
    policy = llama()
    reference, other = cached(policy, tmp_path), cached(policy, tmp_path)
    reference.fill([TOKENS], free=True)
    right = other.score(batch(seed=1)).logp
    other.cache.write()
    assert torch.equal(reference.score(batch(seed=1)).logp, right)  # without waiting for the next look


def test_a_reference_that_has_been_moved_is_not_freed(tmp_path: Path) -> None:
    policy = llama()
    reference = cached(policy, tmp_path)
    reference.update(policy)
    with pytest.raises(ValueError, match="has been moved cannot be freed"):
        reference.fill([TOKENS], free=True)
    assert not reference.freed and reference.score(batch(seed=1)).logp.any()


def test_an_adapter_has_nothing_to_free(tmp_path: Path) -> None:
    reference = cached(lora(), tmp_path, "adapter")
    reference.fill([TOKENS], free=True)
    assert not reference.freed and reference.score(batch(seed=1)).logp.any()


def test_filling_goes_on_where_it_stopped(tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    policy = llama()
    reference = cached(policy, tmp_path)

    def stopped() -> Iterator[TokenBatch]:
        yield from (batch(seed=seed) for seed in range(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference.fill(stopped())
    del reference  # as the end of the process does
    forwards.clear()
    stats = cached(policy, tmp_path).fill([batch(seed=seed) for seed in range(5)])
    assert len(forwards) == 2 and (stats.hits, stats.misses) == (9, 6)


def test_without_a_cache_there_is_nothing_to_fill_or_to_free() -> None:
    reference = build_reference(llama(), "clone")
    assert reference.cache is None
    for call in (lambda: reference.fill([TOKENS]), reference.free):
        with pytest.raises(ValueError, match=r"set reference\.cache to a folder"):
            call()


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"reference\.cache .* cannot be a folder"):
        cached(llama(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"reference\.cache is empty"):
        ReferenceConfig(cache="")


def test_a_strategy_of_ones_own_takes_part_and_says_if_it_cannot_be_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CloneReference, "drop_weights", HeldReference.drop_weights)
    reference = cached(llama(), tmp_path)
    with pytest.raises(ValueError, match="strategy 'clone' cannot free its weights"):
        reference.fill([TOKENS], free=True)
    assert not reference.freed and reference.score(TOKENS).logp.any()


def test_dpo_scores_the_reference_in_its_first_epoch_alone(tmp_path: Path, forwards: list[tuple[int, int]]) -> None:
    logs = []
    llama().save_pretrained(tmp_path / "model")
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        forwards.clear()
        policy = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        args = DPOConfig(str(tmp_path / "run"), **{**COMMON, "num_train_epochs": 3})
        config = ReferenceConfig(strategy="clone", cache=cache)
        data = {"train_dataset": PAIRS.select(range(8)), "processing_class": byte_tokenizer()}
        trainer = KLDPOTrainer(policy, args=args, reference=config, **data)
        trainer.train()
        if cache:
            trainer.reference.cache.write()
        logs.append((len(forwards), [h["loss"] for h in trainer.state.log_history if "loss" in h]))
    without, first, second = logs
    assert (without[0], first[0], second[0]) == (6, 2, 0)
    assert without[1][-1] < without[1][0]
    assert first[1] == pytest.approx(without[1], abs=1e-5) and second[1] == pytest.approx(without[1], abs=1e-5)


RANKS = [
    ("fsdp2", "fsdp2"),
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in (("zero3", "zero3"), ("multi", "clone"), ("fsdp2", "swap"))
    ),
]


@pytest.mark.parametrize(("backend", "strategy"), RANKS)
def test_ranks_score_together_where_weights_are_sharded(backend: str, strategy: str, tmp_path: Path) -> None:
    llama(attention_dropout=0.5).save_pretrained(tmp_path / "model")
    flags = ("--gradient_accumulation_steps", "1", "--gradient_clipping", "1.0") if backend == "zero3" else ()
    launch = "zero3" if backend == "zero3" else "multi"
    script = "tests/scripts/cached_ranks.py"
    output = accelerate_launch(launch, script, backend, strategy, str(tmp_path), flags=flags, timeout=150)
    assert "rank 0 agrees" in output and "rank 1 agrees" in output
