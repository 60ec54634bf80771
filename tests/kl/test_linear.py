"""The fused heads: values and gradients against the plain formulas in fp64, whatever trains, and what is refused.

Digits in low precision, exact zeros and equal bits are in test_linear_precision.py.
"""

import gc
import math
from dataclasses import dataclass

import pytest
import torch
from support import plain

from refkl import kl

INF = math.inf
FP64 = torch.float64
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
BARE = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
SCALED = {"logit_scale": 0.7, "softcap": 3.0, "temperature": 1.3}
ORDERS = {"amari": 1.7, "alpha": -0.6, "renyi": 0.4}
KINDS = [(kind, ORDERS.get(kind)) for kind in kl.DIVERGENCES]


@dataclass
class Heads:
    """Policy and reference on the same tokens; `graded` names what trains, of hidden, weight and bias."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor
    ref_bias: torch.Tensor | None
    targets: torch.Tensor
    graded: str = "hidden"

    @property
    def leaves(self):
        return [getattr(self, name) for name in self.graded.split()]

    def logp(self, **options):
        return kl.linear_logp(self.hidden, self.weight, self.targets, bias=self.bias, **options)

    def divergence(self, kind="reverse_kl", **options):
        ref = self.ref_hidden, self.ref_weight
        return kl.linear_divergence(
            self.hidden, self.weight, *ref, kind, bias=self.bias, ref_bias=self.ref_bias, **options
        )

    def pair(self, kind="reverse_kl", **options):
        ref = self.ref_hidden, self.ref_weight
        biases = {"bias": self.bias, "ref_bias": self.ref_bias}
        return kl.linear_pair(self.hidden, self.weight, self.targets, *ref, kind, **biases, **options)

    def plain(self, scaling=BARE, kind="reverse_kl", weight=0.5, order=None, top_k=None):
        """What `pair` should give, by definition."""
        z = plain.logits(self.hidden, self.weight, self.bias, **scaling)
        ref_z = plain.logits(self.ref_hidden, self.ref_weight, self.ref_bias, **scaling).detach()
        return kl.LinearPair(
            plain.logp(z, self.targets),
            plain.entropy(z),
            plain.logp(ref_z, self.targets),
            plain.divergence(z, ref_z, kind, weight=weight, order=order, top_k=top_k),
        )

    def slopes(self, loss, **options):
        return torch.autograd.grad(loss, self.leaves, **options)

    def same_slopes(self, found, expected, **options):
        slopes = self.slopes(found, **options), self.slopes(expected, retain_graph=True)
        for name, a, b in zip(self.graded.split(), *slopes, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}", **CLOSE)


def heads(graded="hidden", *, shared=False, bias=True, n=7, width=5, vocab=13, dtype=FP64):
    """The reference is a little way off; with `shared` through the very same head."""

    def leaf(name, *shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_(name in graded.split())

    hidden, weight = leaf("hidden", n, width), leaf("weight", vocab, width)
    offset = leaf("bias", vocab) if bias or "bias" in graded else None
    ref_weight, ref_bias = weight, offset
    if not shared:
        ref_weight = weight.detach() + 0.2 * torch.randn_like(weight)
        ref_bias = None if offset is None else offset.detach() + 0.2 * torch.randn_like(offset)
    ref_hidden = hidden.detach() + 0.2 * torch.randn_like(hidden)
    return Heads(hidden, weight, offset, ref_hidden, ref_weight, ref_bias, torch.randint(vocab, (n,)), graded)


MASK = torch.tensor([1, 0, 1, 1, 0, 1, 0]).bool()
GRADED = ["hidden", "hidden weight", "hidden weight bias", "weight", "bias", "hidden bias"]


# values and gradients


@pytest.mark.parametrize("graded", GRADED)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "distinct"])
@pytest.mark.parametrize("scaling", [BARE, SCALED], ids=["bare", "scaled"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_values_and_gradients_are_those_of_the_plain_formulas(graded, shared, scaling, mask):
    """Each of the three functions, with each upstream on its own scale, chunks that divide N and that do not."""
    case = heads(graded, shared=shared, bias=graded != "hidden weight")
    expected, kept = case.plain(scaling), torch.ones(7) if mask is None else mask
    a, b, c = torch.randn(3, 7, dtype=FP64)
    for chunk, entropies in ((None, (False, "detached")), (1, (True,)), (3, (False, True)), (100, (True,))):
        options = {**scaling, "mask": mask, "chunk": chunk}
        for entropy in entropies:
            found, pair = case.logp(entropy=entropy, **options), case.pair(entropy=entropy, **options)
            divergence = case.divergence(**options)
            for got, want in [
                (found.logp, expected.logp),
                (pair.logp, expected.logp),
                (pair.ref_logp, expected.ref_logp),
                (pair.divergence, expected.divergence),
                (divergence, expected.divergence),
            ] + [(found.entropy, expected.entropy), (pair.entropy, expected.entropy)] * bool(entropy):
                torch.testing.assert_close(got, want * kept, **CLOSE)
            if entropy is not True:
                assert entropy or (found.entropy is None and pair.entropy is None)
                case.same_slopes((a * found.logp).sum(), (a * expected.logp * kept).sum())
                case.same_slopes((b * divergence).sum(), (b * expected.divergence * kept).sum())
                pairs = (a * pair.logp + b * pair.divergence).sum()
                case.same_slopes(pairs, ((a * expected.logp + b * expected.divergence) * kept).sum())
            else:
                want = a * expected.logp + c * expected.entropy
                case.same_slopes((a * found.logp + c * found.entropy).sum(), (want * kept).sum())
                want = want + b * expected.divergence
                got = a * pair.logp + b * pair.divergence + c * pair.entropy
                case.same_slopes(got.sum(), (want * kept).sum())


@pytest.mark.parametrize("graded", ["hidden", "hidden weight bias"])
def test_one_weight_with_two_biases_is_two_heads(graded):
    case = heads(graded, shared=True)
    for ref_bias in (case.bias.detach() + 0.3 * torch.randn(13, dtype=FP64), None):
        case.ref_bias = ref_bias
        expected = case.plain()
        for found in (case.divergence(), case.pair().divergence):
            torch.testing.assert_close(found, expected.divergence, **CLOSE)
            case.same_slopes(found.square().sum(), expected.divergence.square().sum())
        torch.testing.assert_close(case.pair().ref_logp, expected.ref_logp, **CLOSE)


@pytest.mark.parametrize(("kind", "order"), KINDS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "distinct"])
@pytest.mark.parametrize("top_k", [None, 4])
def test_every_divergence(kind, order, shared, top_k):
    case = heads("hidden weight bias", shared=shared)
    upstream = torch.randn(7, dtype=FP64)
    for scaling in (BARE, SCALED):
        expected = case.plain(scaling, kind, 0.3, order, top_k).divergence
        options = {**scaling, "order": order, "top_k": top_k, "jsd_weight": 0.3, "chunk": 3}
        for found in (case.divergence(kind, **options), case.pair(kind, **options).divergence):
            torch.testing.assert_close(found, expected, **CLOSE)
            case.same_slopes((upstream * found).sum(), (upstream * expected).sum())


@pytest.mark.parametrize("scaling", [BARE, SCALED], ids=["bare", "scaled"])
@pytest.mark.parametrize(("kind", "order"), KINDS)
def test_gradients_are_the_derivatives_of_the_values(scaling, kind, order):
    """By finite differences, which see the reference's weights held still: distinct heads alone."""
    case = heads("hidden weight bias", n=2, width=2, vocab=4)
    ref = case.targets, case.ref_hidden, case.ref_weight

    def pair(hidden, weight, bias):
        result = kl.linear_pair(
            hidden, weight, *ref, kind, bias=bias, ref_bias=case.ref_bias, entropy=True, chunk=1, order=order, **scaling
        )
        return result.logp, result.entropy, result.divergence

    assert torch.autograd.gradcheck(pair, case.leaves)


@pytest.mark.parametrize("vocab", [1, 7, 1031])
@pytest.mark.parametrize("graded", ["hidden", "hidden weight bias"])
def test_vocabularies_of_any_size(vocab, graded):
    case = heads(graded, vocab=vocab, n=5)
    expected, found = case.plain(), case.pair(entropy=True)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    case.same_slopes(sum(found[i].sum() for i in (0, 1, 3)), sum(expected[i].sum() for i in (0, 1, 3)))
    if vocab == 1:
        assert torch.equal(torch.stack(list(found)), torch.zeros(4, 5, dtype=FP64))


@pytest.mark.parametrize("graded", ["hidden", "hidden weight"])
@pytest.mark.parametrize("name", ["logp", "entropy", "divergence"])
def test_a_loss_of_one_output_alone(graded, name):
    case = heads(graded)
    expected, found = getattr(case.plain(), name), getattr(case.pair(entropy=True), name)
    case.same_slopes(found.square().sum(), expected.square().sum())


@pytest.mark.parametrize("graded", ["hidden", "hidden weight"])
def test_what_carries_no_grad(graded):
    case = heads(graded)
    case.ref_hidden.requires_grad_()
    found = case.pair(entropy="detached")
    assert found.logp.requires_grad and found.divergence.requires_grad
    assert not found.ref_logp.requires_grad and not found.entropy.requires_grad
    (found.logp + found.entropy + found.ref_logp + found.divergence).sum().backward()
    assert case.hidden.grad is not None and case.ref_hidden.grad is None
    with torch.no_grad():
        assert not any(x.requires_grad for x in case.pair(entropy=True))
    assert not heads("").logp().logp.requires_grad


@pytest.mark.parametrize("graded", ["hidden", "hidden weight"])
def test_a_second_derivative_is_refused(graded):
    """A gradient penalty beside another term would lose its own gradient, and nothing would be missed."""
    case = heads(graded)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(case.logp().logp.sum(), case.hidden, create_graph=True)


def test_targets_of_32_bits():
    case = heads("hidden")
    expected = case.logp(entropy=True)
    case.targets = case.targets.int()
    for found in (case.logp(), case.logp(entropy=True), case.pair()):
        assert torch.equal(found.logp, expected.logp)


def test_hidden_states_that_are_a_view_of_more():
    """[B, T, H] with the last position dropped, as a model's caller slices it."""
    case = heads("hidden weight")
    wide = torch.randn(2, 5, 5, dtype=FP64, requires_grad=True)
    hidden, targets = wide[:, :-1].reshape(-1, 5), torch.randint(13, (8,))
    strided = torch.randn(5, 13, dtype=FP64).t().requires_grad_()
    found = kl.linear_logp(hidden, strided, targets).logp.sum()
    expected = plain.logp(plain.logits(hidden, strided), targets).sum()
    for a, b in zip(*(torch.autograd.grad(x, [wide, strided]) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert case.weight.is_contiguous()


# which rows


@pytest.mark.parametrize("graded", ["hidden", "hidden weight bias", "weight"])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("n", [0, 4])
def test_nothing_scored_gives_zeros_that_hold_on_to_the_graph(graded, closure, n):
    """A rank without completion tokens must still take part in the backward pass."""
    case = heads(graded, n=n)
    mask = torch.zeros(n, dtype=torch.bool)
    if closure:
        outputs = [case.pair(entropy=True, mask=mask, token_loss=lambda s: s.logp + s.divergence)]
    else:
        outputs = list(case.pair(entropy=True, mask=mask))
    for output in outputs:
        assert torch.equal(output, torch.zeros(n, dtype=FP64))
    sum(x.sum() for x in outputs).backward()
    for leaf in case.leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("graded", ["hidden", "hidden weight"])
def test_rows_left_out_are_not_read(graded):
    """NaN states and targets outside the vocabulary may stand there."""
    case = heads(graded)
    kept = Heads(
        case.hidden[MASK].detach().requires_grad_(),
        case.weight,
        case.bias,
        case.ref_hidden[MASK],
        case.ref_weight,
        case.ref_bias,
        case.targets[MASK],
        graded,
    )
    expected = kept.pair(entropy=True)
    case.hidden = case.hidden.detach().masked_fill(~MASK[:, None], math.nan).requires_grad_()
    case.ref_hidden = case.ref_hidden.masked_fill(~MASK[:, None], INF)
    case.targets = case.targets.masked_fill(~MASK, -100)
    found = case.pair(entropy=True, mask=MASK)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got[MASK], want) and torch.equal(got[~MASK], torch.zeros(3, dtype=FP64))
    upstream = torch.randn(7, dtype=FP64)
    slopes = case.slopes((upstream * (found.logp + found.divergence + found.entropy)).sum())
    wanted = kept.slopes((upstream[MASK] * (expected.logp + expected.divergence + expected.entropy)).sum())
    assert torch.equal(slopes[0][MASK], wanted[0])
    assert torch.equal(slopes[0][~MASK], torch.zeros(3, 5, dtype=FP64))
    for a, b in zip(slopes[1:], wanted[1:], strict=True):
        assert torch.equal(a, b)


def test_masks_of_numbers_count_as_masks():
    case = heads("hidden")
    expected = case.logp(mask=MASK).logp
    for mask in (MASK.long(), MASK.float()):
        assert torch.equal(case.logp(mask=mask).logp, expected)


# the loss as a closure


def closure_losses(case, scaling, upstream, mask, advantage, entropy):
    """A loss that couples all scores and looks up what belongs to each row: fused, and plain."""

    def token_loss(s):
        loss = advantage[s.rows] * s.logp.exp() + s.divergence * s.logp + (s.logp - s.ref_logp).square()
        return loss if s.entropy is None else loss + s.entropy.square()

    found = case.pair(entropy=entropy, mask=mask, chunk=3, token_loss=token_loss, **scaling)
    s = case.plain(scaling)
    expected = advantage * s.logp.exp() + s.divergence * s.logp + (s.logp - s.ref_logp).square()
    expected = (expected + s.entropy.square() if entropy else expected) * (1.0 if mask is None else mask)
    torch.testing.assert_close(found, expected, **CLOSE)
    return (found * upstream).sum(), (expected * upstream).sum()


@pytest.mark.parametrize("graded", GRADED)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("weighed", ["by one", "alike", "apart"])
def test_a_loss_given_as_a_closure(graded, mask, weighed):
    upstream = {"by one": torch.ones(7), "alike": torch.full((7,), 0.3), "apart": torch.randn(7)}[weighed].double()
    for shared in (True, False):
        case = heads(graded, shared=shared)
        for entropy in (False, True):
            case.same_slopes(*closure_losses(case, SCALED, upstream, mask, torch.randn(7, dtype=FP64), entropy))
        advantage = torch.randn(7, dtype=FP64)
        found = case.logp(mask=mask, chunk=2, token_loss=lambda s: advantage[s.rows] * s.logp.exp())  # noqa: B023
        expected = advantage * case.plain().logp.exp() * (1.0 if mask is None else mask)
        case.same_slopes((found * upstream).sum(), (expected * upstream).sum())
        found = case.divergence("jsd", mask=mask, token_loss=lambda s: s.divergence.square())
        expected = case.plain(kind="jsd").divergence.square() * (1.0 if mask is None else mask)
        case.same_slopes((found * upstream).sum(), (expected * upstream).sum())


def test_a_closure_that_leaves_a_score_unused():
    case = heads("hidden weight")
    for upstream in (torch.ones(7, dtype=FP64), torch.randn(7, dtype=FP64)):
        found = case.pair(entropy=True, token_loss=lambda s: s.divergence)
        case.same_slopes((found * upstream).sum(), (case.plain().divergence * upstream).sum())


def test_a_closure_without_grad_gives_the_same_values():
    case = heads("hidden weight")
    found = case.pair(token_loss=lambda s: s.logp * s.divergence)
    with torch.no_grad():
        assert torch.equal(case.pair(token_loss=lambda s: s.logp * s.divergence), found.detach())


def test_what_a_closure_sees():
    """Scores with grad, the reference's without, None for what was not asked for, and the rows of all N."""
    case, seen = heads("hidden weight"), []

    def token_loss(s):
        seen.append(s)
        return s.logp + s.divergence

    case.pair(mask=MASK, chunk=3, token_loss=token_loss)
    assert torch.cat([s.rows for s in seen]).tolist() == [0, 2, 3, 5] and len(seen) == 2
    assert all(s.logp.requires_grad and s.divergence.requires_grad and not s.ref_logp.requires_grad for s in seen)
    assert all(s.entropy is None for s in seen)
    case.pair(entropy="detached", token_loss=token_loss)
    assert not seen[-1].entropy.requires_grad
    case.logp(token_loss=lambda s: seen.append(s) or s.logp)
    assert seen[-1].divergence is None and seen[-1].ref_logp is None


@pytest.mark.parametrize(
    ("token_loss", "message"),
    [
        (lambda s: s.logp.sum(), r"one loss per token, \[7\], and returned \[\]"),
        (lambda s: 0.0, r"one loss per token, \[7\], and returned float"),
        (lambda s: s.logp[:, None], r"one loss per token, \[7\], and returned \[7, 1\]"),
        (lambda s: s.logp.detach(), r"without grad: it must depend on the scores"),
    ],
)
def test_closures_that_are_refused(token_loss, message):
    with pytest.raises(ValueError, match=message):
        heads("hidden").logp(token_loss=token_loss)


# the graph


def test_a_frozen_head_can_be_backpropagated_twice():
    case = heads("hidden")
    for loss in (case.pair(entropy=True).divergence.sum(), case.logp(token_loss=lambda s: 0.3 * s.logp).sum()):
        first = case.slopes(loss, retain_graph=True)[0].clone()
        assert torch.equal(case.slopes(0.5 * loss)[0], 0.5 * first)


def test_a_trained_head_can_be_backpropagated_twice():
    case = heads("hidden weight bias")
    loss = case.pair(entropy=True).divergence.sum()
    first = [g.clone() for g in case.slopes(loss, retain_graph=True)]
    for again, once in zip(case.slopes(0.5 * loss), first, strict=True):
        torch.testing.assert_close(again, 0.5 * once, **CLOSE)


def test_a_trained_head_with_a_closure_is_right_or_refused_the_second_time():
    """Rows weighed alike scale the finished gradient where it lies: a second pass then finds it changed."""
    case = heads("hidden weight")
    for upstream in (torch.full((7,), 0.3, dtype=FP64), torch.ones(7, dtype=FP64), torch.randn(7, dtype=FP64)):
        loss = (case.logp(token_loss=lambda s: s.logp) * upstream).sum()
        first = [g.clone() for g in case.slopes(loss, retain_graph=True)]
        if upstream[0] == 0.3:
            for _ in range(2):
                with pytest.raises(RuntimeError, match=r"a second backward pass .* Compute the loss anew"):
                    case.slopes(loss, retain_graph=True)
        else:
            for again, once in zip(case.slopes(loss), first, strict=True):
                torch.testing.assert_close(again, once, **CLOSE)


@pytest.mark.parametrize("name", ["weight", "hidden", "bias"])
def test_a_trained_head_changed_before_the_backward_pass_is_an_error(name):
    """The backward pass projects again: from other weights the gradient would be of another function."""
    case = heads("hidden weight bias")
    loss = case.logp().logp.sum()
    with torch.no_grad():
        getattr(case, name).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_frozen_head_keeps_no_logits():
    """A graph that held logits would hold N·V elements; what is kept is a gradient [N, H] for each output with grad."""
    case = heads("hidden", n=64, width=4, vocab=500)

    def large():
        """Also what a graph would hold on to in other ways than autograd's."""
        return {id(x) for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() >= 64 * 500}

    def kept(call):
        before, sizes = large(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            outputs = call()
        assert large() <= before and outputs is not None
        return sum(sizes)

    assert kept(lambda: case.logp()) == 64 * 4
    assert kept(lambda: case.logp(entropy="detached")) == 64 * 4
    assert kept(lambda: case.logp(entropy=True)) == 2 * 64 * 4
    assert kept(lambda: case.divergence()) == 64 * 4
    assert kept(lambda: case.pair(entropy=True)) == 3 * 64 * 4
    assert kept(lambda: case.pair(token_loss=lambda s: s.logp + s.divergence)) <= 64 * (4 + 2)
    trained = heads("hidden weight", n=64, width=4, vocab=500)
    inputs = sum(x.numel() for x in (trained.hidden, trained.weight, trained.bias, trained.targets))
    case = trained
    assert kept(lambda: case.logp(entropy=True)) == inputs
    assert inputs < 64 * 500


# what a head excludes


@pytest.mark.parametrize("graded", ["hidden", "hidden weight bias"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shorter", ["policy", "reference", "neither"])
def test_padding_of_the_vocabulary(graded, softcap, shorter):
    """Missing tokens are those of a head that has them at -inf: values, and gradients of what is there."""
    case = heads(graded)
    full = plain.logits(case.hidden, case.weight, case.bias, softcap=softcap)
    ref = plain.logits(case.ref_hidden, case.ref_weight, case.ref_bias, softcap=softcap).detach()
    if shorter == "policy":
        full = full[:, :11]
        ref_full, size, kinds = ref, 13, ("reverse_kl", "jsd", "hellinger", "tv")
        case.targets = case.targets.clamp(max=10)
    elif shorter == "reference":
        ref_full, ref, size, kinds = ref, ref[:, :11], 13, ("forward_kl", "jsd", "hellinger", "tv")
        case.targets = case.targets.clamp(max=10)
    else:
        ref_full, size, kinds = ref, 16, kl.DIVERGENCES
    cut = {"policy": "weight", "reference": "ref_weight"}.get(shorter)
    call = dict(vars(case))
    for name in [cut, cut.replace("weight", "bias")] if cut else []:
        call[name] = call[name][:11]
    for kind in kinds:
        order = ORDERS.get(kind)
        found = kl.linear_pair(
            call["hidden"],
            call["weight"],
            case.targets,
            call["ref_hidden"],
            call["ref_weight"],
            kind,
            bias=call["bias"],
            ref_bias=call["ref_bias"],
            softcap=softcap,
            entropy=True,
            order=order,
            vocab_size=size,
            chunk=3,
        )
        torch.testing.assert_close(found.logp, plain.logp(full, case.targets), **CLOSE)
        torch.testing.assert_close(found.entropy, plain.entropy(full), **CLOSE)
        torch.testing.assert_close(found.ref_logp, plain.logp(ref, case.targets), **CLOSE)
        expected = padded_divergence(full, ref if shorter == "reference" else ref_full, kind, order)
        torch.testing.assert_close(found.divergence, expected, **CLOSE)
        loss = (found.logp + found.entropy + found.divergence).sum()
        want = (plain.logp(full, case.targets) + plain.entropy(full) + expected).sum()
        case.same_slopes(loss, want, retain_graph=True)
        # alone, a log-probability is projected again without the reference, into a tile as wide
        case.same_slopes(found.logp.sum(), plain.logp(full, case.targets).sum())


def padded_divergence(z, ref_z, kind, order):
    """By definition over the union, where one side lacks the last tokens; differentiable in the policy."""
    p, q = z.softmax(-1), ref_z.softmax(-1)
    common = min(p.shape[-1], q.shape[-1])
    own, other = p[:, common:].sum(-1), q[:, common:].sum(-1)
    p, q = p[:, :common], q[:, :common]
    if not own.any() and not other.any():
        return plain.divergence(z, ref_z, kind, order=order)
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    if kind == "hellinger":
        return 1 - (p * q).sqrt().sum(-1)
    if kind == "tv":
        return 0.5 * ((p - q).abs().sum(-1) + own + other)
    m = 0.5 * (p + q)
    shared = 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1))
    return shared + 0.5 * math.log(2) * (own + other)


@pytest.mark.parametrize("graded", ["hidden", "hidden weight"])
def test_a_token_that_the_shared_head_excludes(graded):
    """A bias of -inf on both sides: as if the token did not exist."""
    case = heads(graded, shared=True)
    with torch.no_grad():
        case.bias[4] = -INF
    keep = torch.arange(13) != 4
    case.targets = case.targets.masked_fill(case.targets == 4, 0)
    targets = (keep.cumsum(0) - 1)[case.targets]
    z = plain.logits(case.hidden, case.weight, case.bias)[:, keep]
    ref_z = plain.logits(case.ref_hidden, case.weight, case.bias)[:, keep].detach()
    for kind, order in KINDS:
        found = case.pair(kind, order=order, entropy=True, chunk=3)
        expected = (plain.logp(z, targets), plain.entropy(z), plain.divergence(z, ref_z, kind, order=order))
        for got, want in zip((found.logp, found.entropy, found.divergence), expected, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)
        case.same_slopes((found.logp + found.entropy + found.divergence).sum(), sum(x.sum() for x in expected))


@pytest.mark.parametrize("graded", ["hidden", "hidden weight"])
@pytest.mark.parametrize(
    ("side", "infinite"),
    [("bias", {"forward_kl", "alpha"}), ("ref_bias", {"reverse_kl", "chi2", "amari"})],
)
def test_a_token_that_one_side_excludes(graded, side, infinite):
    """Orders here: amari 1.7, alpha -0.6, renyi 0.4. inf where that is right, and a finite gradient everywhere."""
    case = heads(graded)
    with torch.no_grad():
        getattr(case, side)[4] = -INF
    case.targets = case.targets.masked_fill(case.targets == 4, 0)
    for kind, order in KINDS:
        found = case.pair(kind, order=order, entropy=True)
        assert bool((found.divergence == INF).all()) == (kind in infinite), kind
        assert not found.divergence.isnan().any() and found.logp.isfinite().all() and found.entropy.isfinite().all()
        for slope in case.slopes(found.divergence.clamp(max=1.0).sum() + found.divergence.sum(), retain_graph=True):
            assert slope.isfinite().all(), kind


def test_an_excluded_target_has_logp_minus_inf_and_a_finite_gradient():
    case = heads("hidden weight")
    with torch.no_grad():
        case.bias[case.targets[2]] = -INF
    found = case.logp(entropy=True)
    assert found.logp[2] == -INF
    for loss in (found.logp.sum(), case.logp().logp.sum()):
        assert all(slope.isfinite().all() for slope in case.slopes(loss))


# statistics of the logits


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_an_observer_sees_each_scored_row_once(entropy, closure):
    case, seen = heads("hidden weight"), {}

    def observe(logits, rows):
        for row, values in zip(rows.tolist(), logits, strict=True):
            assert row not in seen and not values.requires_grad
            seen[row] = values.clone()

    token_loss = (lambda s: s.logp * torch.arange(7)[s.rows]) if closure else None
    result = case.logp(entropy=entropy, mask=MASK, chunk=3, observe=observe, token_loss=token_loss, **SCALED)
    (result if closure else result.logp).square().sum().backward()
    assert sorted(seen) == MASK.nonzero()[:, 0].tolist()
    expected = plain.logits(case.hidden, case.weight, case.bias, **SCALED).detach()
    for row, values in seen.items():
        torch.testing.assert_close(values, expected[row], **CLOSE)


# refusals


def refused(message, function="logp", **changes):
    case, options = heads("hidden"), {}
    for name, value in changes.items():
        if name in vars(case):
            setattr(case, name, value)
        else:
            options[name] = value
    with pytest.raises(ValueError, match=message):
        getattr(case, function)(**options)


@pytest.mark.parametrize("function", ["logp", "divergence", "pair"])
def test_refusals_of_every_function(function):
    z = torch.zeros
    refused(r"hidden must be \[N, H\] and weight \[V, H\], got \[7, 4\] and \[13, 5\]", function, hidden=z(7, 4))
    refused(r"hidden must be \[N, H\] and weight \[V, H\], got \[7, 1, 5\]", function, hidden=z(7, 1, 5))
    refused(r"must be floats, got torch.int64 and torch.float64", function, hidden=z(7, 5).long())
    refused(r"bias has shape \[12\] but the rows of weight has shape \[13\]", function, bias=z(12))
    refused(r"mask has shape \[7, 1\] but the rows of hidden has shape \[7\]", function, mask=z(7, 1))
    for bad in (0.0, -1.0, INF, math.nan):
        refused(rf"temperature must be positive and finite, got {bad}", function, temperature=bad)
        refused(rf"softcap must be positive and finite, got {bad}\. Pass None", function, softcap=bad)
    refused(r"logit_scale must be finite, got nan", function, logit_scale=math.nan)
    for bad in (0, -2):
        refused(rf"chunk counts the rows of a tile and must be at least 1, got {bad}", function, chunk=bad)


@pytest.mark.parametrize("function", ["logp", "pair"])
def test_refusals_of_targets(function):
    case = heads("hidden")
    refused(r"targets has shape \[6\] but the rows of hidden has shape \[7\]", function, targets=case.targets[1:])
    refused(r"targets must be in \[0, 13\), found 13 to 13", function, targets=torch.full((7,), 13))
    far = torch.tensor([0, 1, -100, 2, 3, 4, 5])
    refused(r"targets must be in \[0, 13\), found -100 to 5\. Leave out.*by the mask", function, targets=far)
    refused(r"targets must be integers, got torch.float32", function, targets=case.targets.float())
    refused(r"entropy must be True, False or \"detached\", got 'detach'", function, entropy="detach")


@pytest.mark.parametrize("function", ["divergence", "pair"])
def test_refusals_of_a_reference(function):
    z = torch.zeros
    refused(r"ref_hidden must be \[N, H\] and ref_weight \[V, H\]", function, ref_hidden=z(7, 4))
    refused(r"ref_hidden has shape \[6, 5\] but hidden, row by row, has shape \[7, 5\]", function, ref_hidden=z(6, 5))
    refused(r"ref_bias has shape \[3\] but the rows of ref_weight", function, ref_bias=z(3))
    short = {"ref_weight": z(11, 5), "ref_bias": z(11)}
    refused(r"policy's head has 13 tokens and the reference's 11\..*vocab_size=13", function, **short)
    refused(r"vocab_size=12 is less than the 13 tokens of a head: it can only pad", function, vocab_size=12, **short)
    refused(r"Unknown divergence 'kl'\. Known: .*reverse_kl", function, kind="kl")
    refused(r"amari needs a finite order", function, kind="amari")
    refused(r"jsd takes a weight in \(0, 1\), got 1", function, kind="jsd", jsd_weight=1.0)
    refused(r"top_k counts categories and must be at least 1, got 0", function, top_k=0)


# NaN in is NaN out


@pytest.mark.parametrize("excluded", [False, True], ids=["", "excluded"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "distinct"])
@pytest.mark.parametrize("side", ["hidden", "ref_hidden"])
@pytest.mark.parametrize(("kind", "order"), KINDS)
def test_a_state_that_is_no_number_shows_in_its_tokens_divergence_and_gradient(kind, order, side, shared, excluded):
    """Of the other tokens of the tile nothing changes, steep ones too."""
    case = heads(shared=shared, dtype=torch.float32)
    if excluded:
        case.bias, case.ref_bias = (
            b.detach().index_fill(0, torch.tensor([3]), -INF) for b in (case.bias, case.ref_bias)
        )
    case.hidden = case.hidden.detach().index_fill(0, torch.tensor([5]), 30.0).requires_grad_()
    clean = case.divergence(kind, order=order)
    (clean_slope,) = case.slopes(clean.sum())
    spoilt = getattr(case, side).detach().clone()
    spoilt[2, 1] = math.nan
    setattr(case, side, spoilt.requires_grad_(side == "hidden"))
    found = case.divergence(kind, order=order)
    (slope,) = case.slopes(found.sum())
    assert found[2].isnan() and slope[2].isnan().all()
    others = torch.arange(7) != 2
    assert clean.isfinite().all() and clean_slope.isfinite().all()
    torch.testing.assert_close(found[others], clean[others])
    torch.testing.assert_close(slope[others], clean_slope[others])
    with torch.no_grad():
        assert case.divergence(kind, order=order)[2].isnan()
    masked = case.divergence(kind, order=order, mask=others)
    (slope,) = case.slopes(masked.sum())
    assert masked.isfinite().all() and slope.isfinite().all() and masked[2] == 0.0


@pytest.mark.parametrize("excluded", [False, True], ids=["", "excluded"])
@pytest.mark.parametrize("name", ["weight", "ref_weight", "bias", "ref_bias"])
@pytest.mark.parametrize(("kind", "order"), KINDS)
def test_a_head_that_is_no_number_shows_in_each_token(kind, order, name, excluded):
    case = heads("hidden weight")
    if excluded:
        case.bias, case.ref_bias = (
            b.detach().index_fill(0, torch.tensor([3]), -INF) for b in (case.bias, case.ref_bias)
        )
    with torch.no_grad():
        getattr(case, name)[4] = math.nan
    found = case.divergence(kind, order=order)
    assert found.isnan().all()
    assert all(slope.isnan().any() for slope in case.slopes(found.sum()))


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("excluded", [False, True], ids=["", "excluded"])
def test_logp_and_entropy_and_their_gradients_show_what_is_no_number(name, excluded):
    case = heads("hidden")
    if excluded:
        case.bias = case.bias.detach().index_fill(0, torch.tensor([3]), -INF)
        case.targets = torch.zeros_like(case.targets)
    with torch.no_grad():
        getattr(case, name)[4] = math.nan
    tokens = torch.arange(7) == 4 if name == "hidden" else torch.ones(7, dtype=torch.bool)
    for value in case.logp(entropy=True):
        (slope,) = case.slopes(value.sum(), retain_graph=True)
        assert torch.equal(value.isnan(), tokens) and torch.equal(slope.isnan().all(1), tokens)
