"""Comparison of two checkpoints: an exact divergence per token, on given text or on samples of the first checkpoint.

a, b = load_checkpoint("runs/mine"), load_checkpoint("models/start")
texts = sample_texts(a.model, a.tokenizer, prompts, max_new_tokens=64)      # or read_texts(a.tokenizer, rows)
found = compare_models(a.model, hold(b.model), texts.texts, sampled=True)
found.per_token("reverse_kl")                                               # mean, and its 95 % interval
"""

from refkl.compare.intervals import Mean, ratio_mean
from refkl.compare.load import Checkpoint, check_vocabularies, hold, load_checkpoint, positions, vocabulary
from refkl.compare.measure import Comparison, PositionMean, TokenMean, compare_models, divergences
from refkl.compare.samples import Watch, sample_texts
from refkl.compare.texts import Text, Texts, column_of, read_texts

__all__ = [
    "Checkpoint",
    "Comparison",
    "Mean",
    "PositionMean",
    "Text",
    "Texts",
    "TokenMean",
    "Watch",
    "check_vocabularies",
    "column_of",
    "compare_models",
    "divergences",
    "hold",
    "load_checkpoint",
    "positions",
    "ratio_mean",
    "read_texts",
    "sample_texts",
    "vocabulary",
]
