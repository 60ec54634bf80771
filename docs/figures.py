"""Draws the pictures of docs/estimators.md: python docs/figures.py

Every number comes from `kl.estimate`, in fp64, over all outcomes of one token of four symbols: nothing is sampled. A
picture carries the numbers that it was drawn from (PNG text "Description"); tests/test_figures.py compares them with
closed forms, and draws each picture anew.

p the policy, q the reference, s the policy that sampled when it is another, d = log p - log q.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from refkl import kl

IMAGES = Path(__file__).parent / "images"
ESTIMATORS = ["k1", "k2", "k3", "abs"]
STYLES: dict[str, dict[str, Any]] = {
    "k1": {"color": "#0072b2", "linewidth": 4.5, "alpha": 0.4},
    "k2": {"color": "#009e73", "linestyle": "--", "linewidth": 2.2},
    "k3": {"color": "#d55e00", "linewidth": 1.4},
    "abs": {"color": "#cc79a7", "linestyle": ":", "linewidth": 1.8},
}
"""Where lines lie on each other all are to be seen."""
Data = dict[str, Any]


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


Q = fp64(0.50, 0.25, 0.15, 0.10)
FAR = fp64(0.20, 0.20, 0.20, 0.40)
LEFT = fp64(0.989, 0.005, 0.005, 0.001)
"""A policy that has left symbols of the reference behind."""
OLD = fp64(0.30, 0.30, 0.20, 0.20)


def true_kl(p: Tensor) -> float:
    """KL(p ‖ q), nats."""
    return kl.divergence(p.log(), Q.log()).item()


def way(end: Tensor, steps: int = 40) -> list[Tensor]:
    """Policies from near q to `end`, each q^(1-t) · end^t, normalised."""
    shares = torch.logspace(-2, 0, steps, dtype=torch.float64)
    return [torch.lerp(Q.log(), end.log(), share).softmax(-1) for share in shares]


def gradients(p: Tensor, estimator: str, gradient: str, sampler: Tensor | None = None) -> Tensor:
    """[sample, logit]: what each symbol would give, were it the one that was sampled."""
    old_logp = None if sampler is None else sampler.log()

    def values(logits: Tensor) -> Tensor:
        return kl.estimate(logits.log_softmax(-1), Q.log(), estimator, gradient=gradient, old_logp=old_logp)

    return torch.autograd.functional.jacobian(values, p.log())


def truth(p: Tensor) -> Tensor:
    """[logit]: gradient of KL(p ‖ q)."""
    return torch.autograd.functional.jacobian(lambda x: kl.divergence(x, Q.log()), p.log())


# the tail: one token, whatever d


def tail() -> Data:
    """Value and slope by logp over d; and of k3 clamped to ±10 where its value is, as others have it."""
    d = torch.linspace(-16, 16, 257, dtype=torch.float64)

    def curve(f: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        logp = d.clone().requires_grad_()
        value = f(logp)
        (slope,) = torch.autograd.grad(value.sum(), logp)
        return {"value": value.tolist(), "slope": slope.tolist()}

    def estimated(estimator: str, gradient: str) -> dict[str, list[float]]:
        return curve(lambda logp: kl.estimate(logp, torch.zeros_like(d), estimator, gradient=gradient))

    return {
        "d": d.tolist(),
        "autograd": {estimator: estimated(estimator, "autograd") for estimator in ESTIMATORS},
        "reverse_kl": estimated("k3", "reverse_kl"),
        "clamped k3": curve(lambda logp: (torch.expm1(-logp) + logp).clamp(-10, 10)),
    }


def draw_tail(data: Data) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for estimator in ESTIMATORS:
        style, curve = STYLES[estimator], data["autograd"][estimator]
        left.plot(data["d"], curve["value"], label=estimator, **style)
        right.plot(data["d"], curve["slope"], label=f"{estimator}, autograd", **style)
    clamped = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.6}
    left.plot(data["d"], data["clamped k3"]["value"], label="k3 clamped to ±10", **clamped)
    right.plot(data["d"], data["clamped k3"]["slope"], label="k3 clamped to ±10, autograd", **clamped)
    right.plot(
        data["d"], data["reverse_kl"]["slope"], color="black", linewidth=6, alpha=0.2, label="reverse_kl, of any"
    )
    left.set(title="value, nats", yscale="asinh", ylim=(-30, 1e7))
    right.set(title="slope: the gradient is slope · ∇log p", yscale="asinh", ylim=(-1e7, 30))
    for axes in (left, right):
        axes.set_xlabel("d = log p - log q of the sampled token, nats")
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.legend(fontsize=8, loc="lower right" if axes is right else "upper right")
        axes.grid(alpha=0.2)
    return figure


# the bias of the expected gradient


def bias() -> Data:
    """Length of the error of the expected gradient, by the length of ∇KL, for policies ever farther from q."""
    policies = way(FAR)
    found: dict[str, dict[str, list[float]]] = {}
    placements: dict[str, Callable[[Tensor, str], Tensor]] = {
        "loss, reverse_kl, on-policy": lambda p, e: p @ gradients(p, e, "reverse_kl"),
        "loss, autograd, on-policy": lambda p, e: p @ gradients(p, e, "autograd"),
        "loss, autograd, off-policy": lambda p, e: OLD @ gradients(p, e, "autograd", OLD),
        "reward, on-policy": _in_reward,
    }
    for name, expected in placements.items():
        found[name] = {e: [_error(expected(p, e), truth(p)) for p in policies] for e in ESTIMATORS}
    return {"kl": [true_kl(p) for p in policies], "error": found}


def _in_reward(p: Tensor, estimator: str) -> Tensor:
    reward = kl.estimate(p.log(), Q.log(), estimator, gradient="none")
    return p @ (reward[:, None] * (torch.eye(4, dtype=torch.float64) - p))


def _error(found: Tensor, true: Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()


def draw_bias(data: Data) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for axes, (name, errors) in zip(panels, data["error"].items(), strict=True):
        for estimator in ESTIMATORS:
            axes.plot(data["kl"], [100 * x for x in errors[estimator]], label=estimator, **STYLES[estimator])
        axes.set(title=name, xscale="log", yscale="asinh", ylim=(-0.6, 3e4), xlabel="KL(p ‖ q), nats")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("error of the expected gradient, %")
    panels[0].set_yticks([0, 1, 10, 100, 1000, 10000], minor=False)
    panels[0].set_yticklabels(["0", "1", "10", "100", "1,000", "10,000"])
    panels[0].minorticks_off()
    panels[0].legend(fontsize=8)
    return figure


# how far one sample is from the mean


def spread() -> Data:
    """Standard deviation of one sample: of the value by the KL, of the gradient by the length of ∇KL."""
    policies = way(LEFT)
    values = {e: [_value_spread(p, e) / true_kl(p) for p in policies] for e in ESTIMATORS}
    cases: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "reverse_kl, on-policy": lambda p: (p, gradients(p, "k3", "reverse_kl")),
        "k3, autograd, on-policy": lambda p: (p, gradients(p, "k3", "autograd")),
        "reverse_kl, off-policy": lambda p: (_earlier(p), gradients(p, "k3", "reverse_kl", _earlier(p))),
        "k1, autograd, off-policy": lambda p: (_earlier(p), gradients(p, "k1", "autograd", _earlier(p))),
    }
    slopes = {
        name: [_gradient_spread(*case(p)) / truth(p).norm().item() for p in policies] for name, case in cases.items()
    }
    return {"kl": [true_kl(p) for p in policies], "value": values, "gradient": slopes}


def _earlier(p: Tensor) -> Tensor:
    """A policy that sampled: a tenth of the way back to q."""
    return 0.9 * p + 0.1 * Q


def _value_spread(p: Tensor, estimator: str) -> float:
    value = kl.estimate(p.log(), Q.log(), estimator, gradient="none")
    return (p @ (value - p @ value).square()).sqrt().item()


def _gradient_spread(share: Tensor, each: Tensor) -> float:
    return (share @ (each - share @ each).square().sum(-1)).sqrt().item()


def draw_spread(data: Data) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for estimator in ESTIMATORS:
        left.plot(data["kl"], data["value"][estimator], label=estimator, **STYLES[estimator])
    right_styles = [{"color": "black"}, STYLES["k3"], {"color": "grey", "linestyle": "--"}, STYLES["k1"]]
    for (name, curve), style in zip(data["gradient"].items(), right_styles, strict=True):
        right.plot(data["kl"], curve, label=name, **style)
    left.set(title="value: standard deviation / KL", ylabel="of one sample")
    right.set(title="gradient: standard deviation / length of ∇KL")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="KL(p ‖ q), nats")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.2)
    return figure


FIGURES: dict[str, tuple[Callable[[], Data], Callable[[Data], Figure]]] = {
    "kl_tail": (tail, draw_tail),
    "kl_gradient_bias": (bias, draw_bias),
    "kl_spread": (spread, draw_spread),
}


def save(name: str, data: Data, folder: Path) -> Path:
    """Draw a picture, with its numbers in it."""
    path = folder / f"{name}.png"
    metadata = {"Description": json.dumps(_rounded(data)), "Software": f"matplotlib {matplotlib.__version__}"}
    FIGURES[name][1](data).savefig(path, dpi=120, metadata=metadata)
    return path


def read(path: Path) -> tuple[Data, str]:
    """The numbers in a picture, and what drew it."""
    with Image.open(path) as picture:
        return json.loads(picture.text["Description"]), picture.text["Software"]  # type: ignore[attr-defined]


def _rounded(data: Any) -> Any:
    """To ten significant digits."""
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return [float(f"{x:.10g}") for x in data]


if __name__ == "__main__":
    for name, (compute, _) in FIGURES.items():
        print(save(name, compute(), IMAGES))
