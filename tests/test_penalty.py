"""KLPenalty and global_normalizer: against plain loops, by the sign of their effect, and over two real processes."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from refkl import KLConfig, KLPenalty, TokenScores, global_normalizer, kl
from refkl.kl import AGGREGATIONS, ESTIMATORS

FORMULAS = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.expm1(-d) + d, "abs": abs}
QUANTILES = ("kl/p99", "kl/log_ratio/p01", "kl/log_ratio/p50", "kl/log_ratio/p99")
D = torch.tensor([[0.5, -1.0, 2.0], [3.0, 9.0, 9.0]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def pair(d=D, ref_logp=-2.0, **fields):
    """Scores whose log-ratio is `d`; the policy's have grad."""
    ref = torch.full_like(d, ref_logp)
    return TokenScores((ref + d).requires_grad_(), **fields), TokenScores(ref, **fields)


def config(aggregation, **options):
    """A KLConfig with a constant length of 5 where the aggregation takes one."""
    length = 5 if aggregation == "seq-mean-token-sum-norm" else None
    return KLConfig(aggregation=aggregation, length=length, **options)


def plain_aggregate(values, mask, mode):
    rows = [[v for v, m in zip(*row, strict=True) if m] for row in zip(values.tolist(), mask.tolist(), strict=True)]
    rows = [row for row in rows if row]
    if mode in ("token-mean", "token-sum"):
        return sum(map(sum, rows)) / (sum(map(len, rows)) if mode == "token-mean" else 1)
    length = {"seq-mean-token-sum": lambda row: 1, "seq-mean-token-mean": len, "seq-mean-token-sum-norm": lambda row: 5}
    return sum(sum(row) / length[mode](row) for row in rows) / len(rows)


@pytest.mark.parametrize("placement", ["loss", "reward"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_scores_without_tokens_are_refused(shape, placement):
    policy, reference = pair(torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"scores of shape \[{shape[0]}, {shape[1]}\], which hold no token"):
        KLPenalty(KLConfig(placement=placement))(policy, reference, torch.zeros(shape, dtype=torch.bool))
    # None scored, but rows: a loss of 0 with a graph.
    policy, reference = pair()
    output = KLPenalty(KLConfig())(policy, reference, torch.zeros_like(MASK))
    assert output.loss.item() == 0.0 and output.loss.requires_grad


# the loss


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_is_coef_times_the_aggregated_estimate(estimator, aggregation):
    policy, ref = pair()
    output = KLPenalty(config(aggregation, coef=0.3, estimator=estimator))(policy, ref, MASK)
    values = D.clone().apply_(FORMULAS[estimator])
    assert output.loss.item() == pytest.approx(0.3 * plain_aggregate(values, MASK, aggregation), rel=1e-6)
    torch.testing.assert_close(output.per_token, values * MASK)
    assert output.reward is None


def test_gradient_is_coef_times_the_log_ratio_over_the_count():
    policy, ref = pair()
    KLPenalty(KLConfig(coef=0.3))(policy, ref, MASK).loss.backward()
    torch.testing.assert_close(policy.logp.grad, 0.3 * D * MASK / 4)


def test_config_reaches_the_estimate():
    policy, ref = pair()
    output = KLPenalty(KLConfig(coef=1.0, gradient="autograd", max_log_ratio=1.5))(policy, ref, MASK)
    expected = kl.estimate(policy.logp, ref.logp, "k3", gradient="autograd", mask=MASK, max_log_ratio=1.5)
    assert torch.equal(output.per_token, expected)
    (found,) = torch.autograd.grad(output.loss, policy.logp)
    torch.testing.assert_close(found, (-D).expm1().neg() * (D.abs() < 1.5) * MASK / 4)


def test_old_logp_weighs_the_tokens():
    policy, ref = pair()
    old = policy.logp.detach() - torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.0, 0.0]])
    output = KLPenalty(KLConfig(coef=1.0, estimator="k1"))(policy, ref, MASK, old_logp=old)
    weights = (policy.logp.detach() - old).exp()
    torch.testing.assert_close(output.per_token, weights * D * MASK)
    (found,) = torch.autograd.grad(output.loss, policy.logp)
    torch.testing.assert_close(found, weights * D * MASK / 4)


def test_normalizer_makes_micro_batches_add_up():
    logp, ref_logp, mask = torch.randn(6, 5), torch.randn(6, 5), torch.rand(6, 5) < 0.6
    mask[2] = False
    for aggregation in AGGREGATIONS:
        penalty = KLPenalty(config(aggregation, coef=0.2))
        whole = logp.clone().requires_grad_()
        penalty(TokenScores(whole), TokenScores(ref_logp), mask).loss.backward()
        parts = logp.clone().requires_grad_()
        normalizer = global_normalizer(list(mask.split([1, 2, 3])), aggregation)
        for p, r, m in zip(parts.split([1, 2, 3]), ref_logp.split([1, 2, 3]), mask.split([1, 2, 3]), strict=True):
            penalty(TokenScores(p), TokenScores(r), m, normalizer=normalizer).loss.backward()
        torch.testing.assert_close(parts.grad, whole.grad)
        total = penalty.step()["kl"]  # over both passes, which hold the same tokens
        assert total == pytest.approx(kl.estimate(logp, ref_logp)[mask].mean().item(), rel=1e-5)


def test_exact_divergence_takes_the_place_of_the_estimate():
    policy, ref = pair()
    divergence = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.inf]], requires_grad=True)
    output = KLPenalty(KLConfig(coef=0.5))(policy, ref, MASK, divergence=divergence)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.5 * 10 / 4)
    assert torch.equal(divergence.grad, 0.5 * MASK / 4) and policy.logp.grad is None
    assert output.metrics["kl"] == pytest.approx(10 / 4) and output.metrics["kl/max"] == 3.0


# direction


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_drift_raises_the_penalty_and_a_gradient_step_lowers_it(estimator):
    """A categorical policy moved away from its reference; every symbol is a token, weighted by its probability."""
    ref_logits, direction = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    penalty = KLPenalty(KLConfig(coef=0.1, estimator=estimator))

    def expected_loss(logits):
        logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        parts = [
            penalty(TokenScores(x[None, None]), TokenScores(r[None, None]), torch.ones(1, 1)).loss
            for x, r in zip(logp, ref_logp, strict=True)
        ]
        return (logp.exp().detach() * torch.stack(parts)).sum()

    losses = [expected_loss(ref_logits + step * direction).item() for step in (0.0, 0.3, 1.0, 3.0)]
    assert losses[0] == 0.0 and losses == sorted(losses) and losses[1] > 0
    logits = (ref_logits + direction).requires_grad_()
    before = expected_loss(logits)
    (slope,) = torch.autograd.grad(before, logits)
    assert (slope @ direction).item() > 0
    assert expected_loss(logits.detach() - 2.0 * slope).item() < before.item()


def test_an_untouched_policy_has_no_penalty_and_no_gradient():
    policy, ref = pair(torch.zeros(2, 3))
    output = KLPenalty(KLConfig(coef=10.0))(policy, ref, MASK)
    output.loss.backward()
    assert output.loss.item() == 0.0 and torch.equal(policy.logp.grad, torch.zeros(2, 3))
    assert output.metrics["kl"] == 0.0 and output.metrics["kl/max"] == 0.0


def test_a_coefficient_of_zero_measures_and_penalises_nothing():
    policy, ref = pair()
    penalty = KLPenalty(KLConfig(coef=0.0, estimator="k1"))
    output = penalty(policy, ref, MASK)
    output.loss.backward()
    assert output.loss.item() == 0.0 and torch.equal(policy.logp.grad, torch.zeros(2, 3))
    assert output.metrics["kl"] == penalty.step()["kl"] == pytest.approx(4.5 / 4)


def test_a_coefficient_of_zero_measures_an_infinite_kl_too():
    policy, ref = pair()
    divergence = torch.full_like(D, math.inf).requires_grad_()
    assert KLPenalty(KLConfig(coef=0.0))(policy, ref, MASK, divergence=divergence).loss.item() == 0.0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_masked_reaches_nothing(poison):
    results = []
    for fill in (0.0, poison):
        logp = (D - 2).masked_fill(~MASK, fill).requires_grad_()
        ref, old = (x.masked_fill(~MASK, fill) for x in (torch.full_like(D, -2.0), D - 2.5))
        penalty = KLPenalty(KLConfig(coef=0.3))
        output = penalty(TokenScores(logp), TokenScores(ref), MASK.long(), old_logp=old)
        output.loss.backward()
        results.append((output.loss.item(), output.metrics, penalty.step(), logp.grad.tolist()))
    assert results[0] == results[1]


def test_nothing_scored_is_a_zero_that_can_be_differentiated():
    policy, ref = pair()
    output = KLPenalty()(policy, ref, torch.zeros(2, 3))
    output.loss.backward()
    assert output.loss.item() == 0.0 and torch.equal(policy.logp.grad, torch.zeros(2, 3))
    assert output.metrics["kl"] == 0.0


# metrics and steps


def test_metrics_by_hand():
    d = torch.tensor([[1.0, -2.0, 0.0], [-90.0, 5.0, 5.0]])
    policy, ref = pair(d)
    output = KLPenalty(KLConfig(coef=0.3, estimator="abs"))(policy, ref, MASK)
    expected = {"kl": 93 / 4, "kl/sequence": 93 / 2, "kl/max": 90.0, "kl/saturated": 1 / 4, "kl/clipped": 0.0}
    expected |= {"kl/k1": -91 / 4, "kl/k2": (1 + 4 + 8100) / 2 / 4, "kl/coef": 0.3}
    expected["kl/k3"] = (math.expm1(-1) + 1 + math.expm1(2) - 2 + math.exp(60) - 1 - 90) / 4  # exp is capped
    found = {name: value for name, value in output.metrics.items() if name not in QUANTILES}
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(type(value) is float for value in output.metrics.values())


def test_the_share_of_clipped_tokens_is_a_metric():
    d = torch.tensor([[1.5, -2.0, 0.0], [-90.0, 5.0, 5.0]])
    penalty = KLPenalty(KLConfig(estimator="abs", max_log_ratio=1.5))
    metrics = penalty(*pair(d), MASK).metrics  # at the bound is not beyond it, and masked tokens do not count
    assert metrics["kl/clipped"] == 2 / 4 and metrics["kl"] == pytest.approx((1.5 + 1.5 + 1.5) / 4)
    penalty(*pair(torch.tensor([[0.1, 0.2, 0.3, 9.0]])), torch.ones(1, 4))
    assert penalty.step()["kl/clipped"] == pytest.approx(3 / 8)
    # An exact divergence is not of the sampled log-ratio, and nothing of it is clamped.
    assert penalty(*pair(d), MASK, divergence=d.abs().requires_grad_()).metrics["kl/clipped"] == 0.0


def test_step_weighs_micro_batches_by_their_tokens_and_starts_anew():
    penalty = KLPenalty(KLConfig(coef=0.3, estimator="k1"))
    penalty(*pair(torch.tensor([[1.0, 2.0, 3.0]])), torch.ones(1, 3))
    penalty(*pair(torch.tensor([[-80.0, 50.0]])), torch.tensor([[True, False]]))
    expected = {"kl": -74 / 4, "kl/sequence": -74 / 2, "kl/max": 80.0, "kl/saturated": 1 / 4, "kl/clipped": 0.0}
    expected |= {"kl/k1": -74 / 4, "kl/k2": (14 + 6400) / 8, "kl/coef": 0.3}
    expected["kl/k3"] = (sum(math.expm1(-d) + d for d in (1, 2, 3)) + math.exp(60) - 1 - 80) / 4
    found = {name: value for name, value in penalty.step().items() if name not in QUANTILES}
    assert found == pytest.approx(expected)
    assert penalty.step() == {}
    penalty(*pair(torch.tensor([[4.0]])), torch.ones(1, 1))
    assert penalty.step()["kl"] == pytest.approx(4.0)


def test_an_evaluation_is_not_counted_by_the_step():
    penalty = KLPenalty(KLConfig(estimator="k1"))
    penalty(*pair(torch.tensor([[1.0]])), torch.ones(1, 1))
    policy, ref = pair(torch.tensor([[100.0]]))
    assert penalty(TokenScores(policy.logp.detach()), ref, torch.ones(1, 1)).metrics["kl"] == pytest.approx(100.0)
    assert penalty.step()["kl"] == pytest.approx(1.0)


def test_what_is_counted_can_be_said():
    penalty = KLPenalty(KLConfig(estimator="k1"))
    for value, grad, count in ((1.0, True, False), (2.0, False, True), (4.0, True, None), (8.0, False, None)):
        policy, ref = pair(torch.tensor([[value]]))
        scores = policy if grad else TokenScores(policy.logp.detach())
        penalty(scores, ref, torch.ones(1, 1), count=count)
    assert penalty.step()["kl"] == pytest.approx((2.0 + 4.0) / 2)


def test_metrics_hold_no_graph():
    penalty = KLPenalty()
    penalty(*pair(), MASK)
    assert not any(stats.requires_grad for stats in penalty._window)


def test_state_goes_on():
    penalty, other = KLPenalty(KLConfig(coef=0.3)), KLPenalty(KLConfig(coef=0.7))
    other.load_state_dict(penalty.state_dict())
    assert other.coef == 0.3
    policy, ref = pair()
    assert other(policy, ref, MASK).loss.item() == penalty(policy, ref, MASK).loss.item()


# the controller


@pytest.mark.parametrize(
    ("unit", "kl_value", "n"), [("token", (0.5 - 1.0 + 2.0 + 3.0 + 4.0) / 5, 5), ("sequence", 8.5 / 3, 3)]
)
def test_step_updates_the_controller_once_in_its_unit(unit, kl_value, n):
    """The mean over all tokens or sequences of all micro-batches, not a mean of their means."""
    penalty = KLPenalty(KLConfig(coef=0.3, estimator="k1", controller="adaptive", target=2.0, horizon=40, unit=unit))
    penalty(*pair(), MASK)
    penalty(*pair(torch.tensor([[7.0, 4.0], [9.0, 9.0]])), torch.tensor([[False, True], [False, False]]))
    assert penalty.coef == 0.3  # within a step it stays
    assert penalty.step()["kl/coef"] == 0.3
    assert penalty.coef == pytest.approx(0.3 * (1 + min(max(kl_value / 2 - 1, -0.2), 0.2) * n / 40), rel=1e-6)
    policy, ref = pair()
    loss = penalty(policy, ref, MASK).loss.item()
    assert loss == pytest.approx(penalty.coef * 4.5 / 4, rel=1e-6)


def test_a_schedule_counts_steps_in_which_nothing_was_scored():
    penalty = KLPenalty(KLConfig(coef=0.0, controller="linear", end_coef=1.0, steps=4))
    coefs = []
    for scored in (True, False, True, False):
        if scored:
            penalty(*pair(), MASK)
        assert (penalty.step() == {}) == (not scored)
        coefs.append(penalty.coef)
    assert coefs == [0.25, 0.5, 0.75, 1.0]


def test_a_controller_that_follows_the_kl_takes_no_notice_of_a_step_without_one():
    for controller in ({"controller": "adaptive", "horizon": 10}, {"controller": "dual"}):
        penalty = KLPenalty(KLConfig(coef=0.3, target=2.0, **controller))
        assert penalty.step() == {} and penalty.coef == 0.3


def test_a_kl_that_is_not_finite_stops_a_controller_that_follows_it():
    penalty = KLPenalty(KLConfig(controller="dual", target=1.0, estimator="exact"))
    penalty(*pair(), MASK, divergence=torch.full_like(D, math.inf).requires_grad_())
    with pytest.raises(ValueError, match="dual controller was given a KL of inf"):
        penalty.step()


def test_the_state_of_the_controller_goes_on_through_json():
    options = {"controller": "dual", "target": 0.5, "learning_rate": 0.37}
    penalty, other = KLPenalty(KLConfig(**options)), KLPenalty(KLConfig(**options))
    for _ in range(3):
        penalty(*pair(), MASK)
        penalty.step()
    other.load_state_dict(json.loads(json.dumps(penalty.state_dict())))
    assert other.coef == penalty.coef != 0.05
    with pytest.raises(ValueError, match="state is of the KL controller 'dual'"):
        KLPenalty().load_state_dict(penalty.state_dict())
    with pytest.raises(ValueError, match=r"no state of a KLPenalty: it holds \['coef'\]"):
        other.load_state_dict({"coef": 0.1})


# exact


def test_exact_takes_the_divergence_that_is_passed():
    policy, ref = pair()
    divergence = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.inf]], requires_grad=True)
    output = KLPenalty(KLConfig(coef=0.5, estimator="exact"))(policy, ref, MASK, divergence=divergence)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.5 * 10 / 4)
    assert torch.equal(divergence.grad, 0.5 * MASK / 4) and policy.logp.grad is None


# refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": MASK[:, :1]}, r"mask has shape \[2, 1\] but policy_scores.logp has shape \[2, 3\]"),
        ({"ref_scores": TokenScores(torch.zeros(1, 3))}, r"ref_logp has shape \[1, 3\] but logp"),
        ({"ref_scores": TokenScores(D, temperature=0.7)}, r"temperature 1.0 and the reference at 0.7.*at the same one"),
        ({"old_logp": D, "divergence": D}, r"old_logp has no use with an exact divergence"),
        ({"old_logp": D[:1]}, r"old_logp has shape \[1, 3\]"),
        ({"divergence": D[:, :1]}, r"divergence has shape \[2, 1\] but mask has shape \[2, 3\]"),
        ({"normalizer": 0.0}, r"normalizer must be positive"),
        ({"divergence": D}, r"divergence carries no grad.*Take it from score_pair"),
        ({"divergence": [D, D]}, r"one divergence per reference: got 2 for 1"),
        ({"ref_scores": []}, r"empty list for its references"),
    ],
)
def test_call_refuses(changes, message):
    policy, ref = pair()
    arguments = {"policy_scores": policy, "ref_scores": ref, "mask": MASK, **changes}
    penalty = KLPenalty()
    with pytest.raises(ValueError, match=message):
        penalty(**arguments)
    assert penalty.step() == {}


def test_no_gradient_reaches_the_reference():
    policy, _ = pair()
    ref_logp = torch.zeros(2, 3, requires_grad=True)
    KLPenalty()(policy, TokenScores(ref_logp), MASK).loss.backward()
    assert ref_logp.grad is None and policy.logp.grad is not None


# who counts


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_global_normalizer_counts_over_micro_batches(mode):
    masks = [MASK, torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[0, 1, 1, 1]])]
    assert global_normalizer(iter(masks), mode).item() == {"token-mean": 7, "token-sum": 1}.get(mode, 3)
    assert global_normalizer(MASK, mode).item() == {"token-mean": 4, "token-sum": 1}.get(mode, 2)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_accelerate_accumulation_with_a_short_last_window_is_the_whole_batch(mode):
    """accelerator.backward divides by its setting, 3, in a window of 2 as well."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    logp, ref_logp = torch.randn(2, 9, 5, dtype=torch.float64)
    mask = torch.rand(9, 5) < 0.6
    penalty = KLPenalty(config(mode, coef=0.2))
    for rows in ([1, 3, 2], [1, 2]):
        n = sum(rows)
        whole, parts = (logp[:n].clone().requires_grad_() for _ in range(2))
        penalty(TokenScores(whole), TokenScores(ref_logp[:n]), mask[:n]).loss.backward()
        normalizer = global_normalizer(mask[:n].split(rows), mode, accelerator) / 3
        for p, r, m in zip(parts.split(rows), ref_logp[:n].split(rows), mask[:n].split(rows), strict=True):
            accelerator.backward(penalty(TokenScores(p), TokenScores(r), m, normalizer=normalizer).loss)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=0)  # the normalizer is fp32


def test_global_normalizer_of_nothing_can_be_divided_by():
    assert global_normalizer(torch.zeros(2, 3)).item() == 1.0


def test_global_normalizer_refuses():
    with pytest.raises(ValueError, match="got no mask"):
        global_normalizer([])
    with pytest.raises(ValueError, match=r"Unknown aggregation 'token_mean'.*Did you mean 'token-mean'"):
        global_normalizer(MASK, "token_mean")


# two processes: forked, which takes a tenth of a second, and joined by gloo over a file


def _on_rank(work, rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    for state in (AcceleratorState, PartialState):  # what tests before this one left in the forked process
        state._shared_state.clear()
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.save(work(rank, accelerator), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(work, folder: Path):
    """[work(0, accelerator), work(1, accelerator)], each run in a process of its own."""
    context = mp.get_context("fork")
    processes = [context.Process(target=_on_rank, args=(work, rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_ranks_add_up_to_one_process(tmp_path):
    """Uneven shares, the second rank with a micro-batch of its own that scores nothing."""
    logp, ref_logp, mask = torch.randn(5, 4), torch.randn(5, 4), torch.zeros(5, 4, dtype=torch.bool)
    mask[0] = mask[1, 2:] = mask[2, 1] = True
    shares = [[slice(0, 1)], [slice(1, 3), slice(3, 5)]]

    def work(rank, accelerator):
        results = {}
        for mode in AGGREGATIONS:
            penalty = KLPenalty(config(mode, coef=0.2))
            normalizer = global_normalizer([mask[s] for s in shares[rank]], mode, accelerator)
            losses = [
                penalty(
                    TokenScores(logp[s].clone().requires_grad_()),
                    TokenScores(ref_logp[s]),
                    mask[s],
                    normalizer=normalizer,
                ).loss
                for s in shares[rank]
            ]
            step = penalty.step(accelerator)
            results[mode] = (sum(losses).detach(), step, penalty.histogram.counts)
        return results

    ranks = on_two_ranks(work, tmp_path)
    for mode in AGGREGATIONS:
        penalty = KLPenalty(config(mode, coef=0.2))
        whole = penalty(TokenScores(logp.clone().requires_grad_()), TokenScores(ref_logp), mask).loss
        mean = sum(results[mode][0] for results in ranks) / 2  # as gradients are averaged
        assert mean.item() == pytest.approx(whole.item(), rel=1e-6)
        expected = penalty.step()
        for results in ranks:
            assert results[mode][1] == pytest.approx(expected, rel=1e-5)
            assert results[mode][2] == penalty.histogram.counts and sum(results[mode][2]) == 7


def test_a_rank_that_scored_nothing_steps_with_the_others(tmp_path):
    def work(rank, accelerator):
        penalty = KLPenalty(KLConfig(estimator="k1"))
        if rank == 0:
            penalty(*pair(torch.tensor([[1.0, 4.0]])), torch.ones(1, 2))
        return penalty.step(accelerator)

    for metrics in on_two_ranks(work, tmp_path):
        assert metrics["kl"] == pytest.approx(2.5) and metrics["kl/max"] == pytest.approx(4.0)


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_the_controller_sees_the_kl_of_all_ranks(unit, tmp_path):
    """Uneven shares: a mean of the ranks' means would be another KL, and another n."""
    d = torch.tensor([[1.0, 4.0], [0.5, 0.0], [3.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [True, False]])

    def adaptive():
        return KLPenalty(KLConfig(estimator="k1", controller="adaptive", target=2.5, horizon=30, unit=unit))

    def work(rank, accelerator):
        penalty, rows = adaptive(), slice(0, 1) if rank == 0 else slice(1, 3)
        penalty(*pair(d[rows]), mask[rows])
        penalty.step(accelerator)
        return penalty.coef

    whole = adaptive()
    whole(*pair(d), mask)
    whole.step()
    kl_value, n = (8.5 / 4, 4) if unit == "token" else (8.5 / 3, 3)
    assert whole.coef == pytest.approx(0.05 * (1 + (kl_value / 2.5 - 1) * n / 30), rel=1e-6)
    coefs = on_two_ranks(work, tmp_path)
    assert coefs[0] == coefs[1] == pytest.approx(whole.coef, rel=1e-6)


def test_fewer_tokens_than_ranks(tmp_path):
    def work(rank, accelerator):
        return global_normalizer(torch.tensor([[rank == 0]]), "token-mean", accelerator).item()

    assert on_two_ranks(work, tmp_path) == [0.5, 0.5]


def test_prefix_ratios_weigh_the_estimate_when_asked_for():
    logp, ref_logp, old_logp = (-torch.rand(2, 5) for _ in range(3))
    mask = torch.ones(2, 5, dtype=torch.bool)
    penalty = KLPenalty(KLConfig(coef=1.0, ratio="prefix"))
    found = penalty(TokenScores(logp), TokenScores(ref_logp), mask, old_logp=old_logp).per_token
    d = logp - ref_logp
    expected = (logp - old_logp).cumsum(-1).exp() * (torch.exp(-d) - 1 + d)
    torch.testing.assert_close(found, expected)
