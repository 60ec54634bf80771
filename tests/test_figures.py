"""The pictures of docs/estimators.md: their numbers by closed forms in fp64, and each drawn from its own numbers.

docs/figures.py takes its numbers from `kl.estimate`; here they are written out over the four symbols, without it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from support.launching import ROOT
from torch import Tensor

PAGE = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
EYE = torch.eye(4, dtype=torch.float64)
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: (-d).exp() - 1 + d,
    "abs": torch.abs,
}
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": torch.ones_like,
    "k2": lambda d: d,
    "k3": lambda d: 1 - (-d).exp(),
    "abs": torch.sign,
}


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(figures: ModuleType, name: str) -> Any:
    """What the committed picture says that it was drawn from."""
    return figures.read(figures.IMAGES / f"{name}.png")[0]


def close(found: list[float], expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-8, atol=1e-9)


Q = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
OLD = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)


def policies(*end: float) -> Tensor:
    """[40, 4]: q^(1-t) · end^t, normalised, for t from .01 to 1."""
    t = torch.logspace(-2, 0, 40, dtype=torch.float64)[:, None]
    product = Q ** (1 - t) * torch.tensor(end, dtype=torch.float64) ** t
    return product / product.sum(-1, keepdim=True)


FAR, LEFT = policies(0.2, 0.2, 0.2, 0.4), policies(0.989, 0.005, 0.005, 0.001)


def kl_of(p: Tensor) -> Tensor:
    return (p * (p / Q).log()).sum(-1)


def score_times(p: Tensor, coefficient: Tensor) -> Tensor:
    """[40, 4]: Σ p(x) · coefficient(x) · ∇log p(x) by the logits."""
    return torch.einsum("nx,nxj->nj", p * coefficient, EYE - p[:, None, :])


def test_the_tail(figures: ModuleType) -> None:
    data = numbers(figures, "kl_tail")
    d = torch.linspace(-16, 16, 257, dtype=torch.float64)
    close(data["d"], d)
    for estimator, value in VALUES.items():
        close(data["autograd"][estimator]["value"], value(d))
        close(data["autograd"][estimator]["slope"], SLOPES[estimator](d))
    close(data["reverse_kl"]["value"], VALUES["k3"](d))
    close(data["reverse_kl"]["slope"], d)
    close(data["clamped k3"]["value"], VALUES["k3"](d).clamp(max=10))
    close(data["clamped k3"]["slope"], SLOPES["k3"](d) * (VALUES["k3"](d) <= 10))


def test_the_page_says_where_a_clamped_k3_stops_pulling() -> None:
    """e^-d - 1 + d = 10 at two places."""

    def root(low: float, high: float) -> float:
        rises = math.exp(-high) - 1 + high > 10
        for _ in range(100):
            middle = (low + high) / 2
            over = math.exp(-middle) - 1 + middle > 10
            low, high = (low, middle) if over == rises else (middle, high)
        return low

    below, above = root(-5.0, 0.0), root(0.0, 20.0)
    assert f"below d = {below:.2f} and above d = {above:.2f}".replace("-", "\N{MINUS SIGN}") in PAGE


def test_the_bias_of_the_gradient(figures: ModuleType) -> None:
    data, d = numbers(figures, "kl_gradient_bias"), (FAR / Q).log()
    close(data["kl"], kl_of(FAR))
    truth = score_times(FAR, d)
    weight = FAR / OLD
    found: dict[str, dict[str, Tensor]] = {name: {} for name in data["error"]}
    for estimator, value in VALUES.items():
        f, slope = value(d), SLOPES[estimator](d)
        found["loss, reverse_kl, on-policy"][estimator] = truth
        found["loss, autograd, on-policy"][estimator] = score_times(FAR, slope)
        # Σ s w (f + f') ∇log p: the weight is differentiated too
        sampled = OLD * weight * (f + slope)
        found["loss, autograd, off-policy"][estimator] = torch.einsum("nx,nxj->nj", sampled, EYE - FAR[:, None, :])
        found["reward, on-policy"][estimator] = score_times(FAR, f)
    for name, by_estimator in found.items():
        for estimator, gradient in by_estimator.items():
            close(data["error"][name][estimator], (gradient - truth).norm(dim=-1) / truth.norm(dim=-1))


def test_the_spread(figures: ModuleType) -> None:
    data, d = numbers(figures, "kl_spread"), (LEFT / Q).log()
    close(data["kl"], kl_of(LEFT))
    for estimator, value in VALUES.items():
        f = value(d)
        variance = (LEFT * f * f).sum(-1) - (LEFT * f).sum(-1).square()
        close(data["value"][estimator], variance.sqrt() / kl_of(LEFT))

    scores = EYE - LEFT[:, None, :]
    length = score_times(LEFT, d).norm(dim=-1)
    earlier = 0.9 * LEFT + 0.1 * Q
    w = LEFT / earlier
    cases = {
        "reverse_kl, on-policy": (LEFT, d),
        "k3, autograd, on-policy": (LEFT, 1 - (-d).exp()),
        "reverse_kl, off-policy": (earlier, w * d),
        "k1, autograd, off-policy": (earlier, w * (d + 1)),
    }
    assert cases.keys() == data["gradient"].keys()
    for name, (share, slope) in cases.items():
        each = slope[..., None] * scores
        mean = torch.einsum("nx,nxj->nj", share, each)
        variance = (share * (each - mean[:, None]).square().sum(-1)).sum(-1)
        close(data["gradient"][name], variance.sqrt() / length)


def test_what_the_page_says_of_the_spread(figures: ModuleType) -> None:
    data = numbers(figures, "kl_spread")
    apart, values, gradients = data["kl"], data["value"], data["gradient"]
    near = f"at a KL of {apart[0]:.4f} a k1 is off by {values['k1'][0]:.0f} times"
    near += f" the KL and a k3 by {values['k3'][0]:.2f} times"
    far = f"at {apart[-1]:.2f} a k1 by {values['k1'][-1]:.1f} times and a k3 by {values['k3'][-1]:.1f}"
    assert f"{near}, {far}." in PAGE.replace("\n", " ")
    ours = gradients["reverse_kl, on-policy"]
    assert all(a <= b for a, b in zip(ours, gradients["k3, autograd, on-policy"], strict=True))
    rows = zip(apart, ours, gradients["k1, autograd, off-policy"], strict=True)
    assert all(a < b for kl, a, b in rows if kl < 0.1)


def test_the_numbers_are_what_refkl_gives_today(figures: ModuleType) -> None:
    """The picture's, to its ten digits: a change of kl.estimate without `python docs/figures.py` shows."""
    for name, (compute, _) in figures.FIGURES.items():
        ours, committed = figures._rounded(compute()), numbers(figures, name)
        assert _flat(ours).keys() == _flat(committed).keys()
        for key, values in _flat(ours).items():
            assert values == pytest.approx(_flat(committed)[key], rel=1e-8, abs=1e-12), (name, key)


@pytest.mark.parametrize("name", ["kl_tail", "kl_gradient_bias", "kl_spread"])
def test_the_picture_is_drawn_from_its_numbers(figures: ModuleType, name: str, tmp_path: Path) -> None:
    committed = figures.IMAGES / f"{name}.png"
    data, drawn_by = figures.read(committed)
    assert name in figures.FIGURES and f"images/{name}.png" in PAGE
    if drawn_by != f"matplotlib {matplotlib.__version__}":
        pytest.skip(f"the picture was drawn by {drawn_by}, which may place a pixel elsewhere")
    again = figures.save(name, data, tmp_path)
    pixels = [np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in (committed, again)]
    assert pixels[0].shape == pixels[1].shape
    assert (np.abs(pixels[0] - pixels[1]).max(-1) > 8).mean() < 1e-3


def _flat(data: Any, prefix: str = "") -> dict[str, list[float]]:
    if isinstance(data, dict):
        return {k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}/{key}").items()}
    return {prefix: data}
