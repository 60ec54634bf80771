"""Which tests of which published packages run against refkl, what is left out, and where refkl differs on purpose.

A test that is in none of these tables must pass. A deviation must fail, and with this message: if it starts to pass, or
fails in another way, the run fails. Nothing of the packages is in this repository. docs/peers.md says this in words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """A peer's test that refkl fails on purpose."""

    message: str
    """Regular expression that the AssertionError must hold."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class PeerFile:
    """One test file of a package."""

    path: str
    """Inside the package's own tests/."""
    passes: int
    """How many tests pass, parameters counted: fewer means that the file no longer tests what it did."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Test function, class, or CLASS::METHOD -> why it has nothing to say about refkl."""
    deviations: dict[str, Deviation] = field(default_factory=dict)
    """Test with its parameters -> how it fails."""
    only: tuple[str, ...] = ()
    """Test functions or classes that run, where the others of the file are about something else; docs/peers.md says
    what. Without it all run that are not left out."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One pinned archive of a package, and its files to run."""

    requirement: str
    archive: str
    sha256: str
    pip: tuple[str, ...]
    """Further arguments for `pip download`."""
    folder: str
    """Where the archive keeps the tests."""
    files: tuple[PeerFile, ...]


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """A package whose archives have no tests: they run where the user has a checkout of it."""

    variable: str
    """The environment variable that names its folder of tests."""
    version: str
    """What the selection was made from."""
    adapter: str
    """Which of the adapters it takes."""
    files: tuple[PeerFile, ...]


_POLICY_LOSS = "PPO's policy loss, and its correction for another sampler: refkl has neither"
_ADVANTAGES = "advantage estimation: refkl computes none"

_WHY_UNCLAMPED = "OpenRLHF clamps each estimate to ±10, and with it k3's own gradient to zero; refkl's k3 is never cut"
# k1 and k2 went before and are equal; one k3 of the 32 is 40.9, which the test wants to be 10.
_UNCLAMPED_K3 = Deviation(message=r"^k3\nassert False(.|\n)*4\.0913e\+01", reason=_WHY_UNCLAMPED)
# The three values below the clamp are equal; the five that it cuts to 10 are not, up to exp(60), where fp32 saturates.
_UNCLAMPED_EXTREMES = Deviation(
    message=r"Mismatched elements: 5 / 8(.|\n)*Greatest absolute difference: 1\.142\d*e\+26", reason=_WHY_UNCLAMPED
)

OPENRLHF = Peer(
    requirement="openrlhf==0.11.2",
    archive="openrlhf-0.11.2-cp311-cp311-manylinux1_x86_64.whl",
    sha256="c969d70db03a70724c3d8a5a01186c6e0728bce624fb3dff95e39b5396acefa6",
    # It is unpacked, never installed: which Python and system this is does not matter.
    pip=(
        *("--only-binary", "openrlhf", "--implementation", "cp", "--python-version", "3.11", "--abi", "cp311"),
        *("--platform", "manylinux1_x86_64"),
    ),
    folder="openrlhf-0.11.2.data/purelib/tests",
    files=(
        PeerFile(
            path="test_kl_estimator_gradient.py",
            passes=5,
            deviations={
                "test_flag_off_matches_legacy": _UNCLAMPED_K3,
                **dict.fromkeys(
                    (
                        f"test_k3_extreme_finite_log_probs_match_clipped_reference[{corrected}-{dtype}]"
                        for corrected in ("False", "True")
                        for dtype in ("dtype0", "dtype1", "dtype2")
                    ),
                    _UNCLAMPED_EXTREMES,
                ),
            },
        ),
        PeerFile(
            path="test_loss_aggregation.py",
            passes=8,
            left_out=dict.fromkeys(
                (
                    "test_policy_kl_metric_uses_policy_ratio_when_vllm_correction_is_enabled",
                    "test_icepop_filters_overflowing_ratio_without_nan",
                    "test_seq_mask_gates_on_the_per_sequence_geometric_mean_ratio",
                    "test_binary_kl_trust_region_masks_tokens_and_sequences",
                    "test_tv_trust_region_masks_by_sampled_token_probability_gap",
                    "test_invalid_is_correction_combinations_are_rejected",
                ),
                _POLICY_LOSS,
            ),
        ),
        PeerFile(path="test_actor_entropy_temperature.py", passes=2),
    ),
)

VERL = Peer(
    requirement="verl==0.9.1",
    archive="verl-0.9.1.tar.gz",  # its wheel has no tests
    sha256="3e03d8816b2546b2c5580705671b8d0bb3f79b8364e7b5c56dbfc1245536ba22",
    pip=("--no-binary", "verl"),
    folder="verl-0.9.1/tests",
    files=(
        PeerFile(
            path="trainer/ppo/test_core_algos_on_cpu.py",
            passes=6,
            left_out={
                "TestRegisterAdvEst": "the registry of advantage estimators",
                "test_multi_turn_compute_gae_advantage_return": _ADVANTAGES,
                "test_rloo_and_vectorized_equivalence": _ADVANTAGES,
                "test_grpo_vectorized_matches_original_for_low_variance_rewards": _ADVANTAGES,
                "test_grpo_and_vectorized_equivalence": _ADVANTAGES,
            },
        ),
        PeerFile(path="trainer/ppo/test_loss_aggregation_on_cpu.py", passes=6),
        PeerFile(
            path="trainer/ppo/test_value_loss_normalization_on_cpu.py",
            passes=24,
            left_out={
                "test_vf_loss_metric_sum_aggregation_reports_global_mean": "verl's own collection of metrics",
                "test_vf_clipfrac_unaffected_by_normalization": "the critic's clipped share: refkl has no critic",
            },
        ),
    ),
)

_WHY_FP32 = "TRL's log-softmax of 16-bit logits is rounded to 16 bits; refkl's is in 32"
_ROUNDED = Deviation(message=r"^(False is not true|assert False)", reason=_WHY_FP32)
_ROUNDED_ENTROPY = Deviation(message=r"The values for attribute 'dtype' do not match", reason=_WHY_FP32)
_16_BITS = ("torch.float16", "torch.bfloat16")
_SHAPES = ("(768,)", "(32, 768)", "(8, 16, 768)", "(2, 4, 8, 768)")

TRL = Peer(
    requirement="trl==0.23.1",
    archive="trl-0.23.1.tar.gz",  # the last that has tests
    sha256="9a3025a9e7ea18fa4f3a5e575aa16b914d4ea86334b34689216af54562a460c5",
    pip=("--no-binary", "trl"),
    folder="trl-0.23.1/tests",
    files=(
        PeerFile(
            path="test_utils.py",
            passes=2 + 16,
            only=("TestSelectiveLogSoftmax", "TestEntropyFromLogits"),
            deviations={
                **{f"TestSelectiveLogSoftmax::test_selective_log_softmax[{dtype}]": _ROUNDED for dtype in _16_BITS},
                **{
                    f"TestEntropyFromLogits::test_entropy_from_logits_2_dims[{dtype}-{chunk}-{shape}]": _ROUNDED_ENTROPY
                    for dtype in _16_BITS
                    for chunk in (1, 16)
                    for shape in _SHAPES
                },
            },
        ),
        PeerFile(path="test_modeling_value_head.py", passes=2, only=("ReferenceModelTest",)),
    ),
)

_WHY_ALL_BITS = "TRL rounds the logits of 16-bit weights to 16 bits, and so does the test; refkl's products are in 32"
_ALL_BITS = Deviation(message=r"Tensor-likes are not (close|equal)", reason=_WHY_ALL_BITS)
_EVEN_TILES = Deviation(
    message=r"assert 16 == 13", reason="refkl's tiles are of one size: 64 tokens, 17 at most, are 4 of 16"
)
_16_BIT_PARAMETERS = ("dtype2", "dtype3")

TRL_CHECKOUT = Checkout(
    variable="REFKL_TRL_TESTS",
    version="1.16",
    adapter="trl",
    files=(
        PeerFile(
            path="test_utils.py",
            passes=2 + 16 + 2 + 4,
            only=("TestUseAdapter", "TestEntropyFromLogits", "TestSelectiveLogSoftmax"),
            left_out={
                "TestUseAdapter::test_with_multiple_adapters": "switches between two adapters of one policy, which "
                "refkl never does: it holds the tensors of an adapter that was trained"
            },
            deviations={
                **{
                    f"TestEntropyFromLogits::test_entropy_from_logits_2_dims[{dtype}-{chunk}-shape{shape}]": (
                        _ROUNDED_ENTROPY
                    )
                    for dtype in _16_BIT_PARAMETERS
                    for chunk in (1, 16)
                    for shape in range(4)
                },
                **{
                    f"TestSelectiveLogSoftmax::test_selective_log_softmax{case}{dtype}]": _ROUNDED
                    for dtype in _16_BIT_PARAMETERS
                    for case in ("[", "_multi_index[1-", "_multi_index[8-")
                },
            },
        ),
        PeerFile(
            path="test_kernels.py",
            passes=12 + 17,
            only=("TestLogProbEntropy", "TestChunkedLogProbFunction"),
            left_out={"TestLogProbEntropy::test_torch_compile_fullgraph": "torch.compile of TRL's Triton kernel"},
            deviations={
                f"TestChunkedLogProbFunction::{test}": deviation
                for test, deviation in {
                    "test_forward[1.0]": _EVEN_TILES,
                    "test_forward[0.7]": _EVEN_TILES,
                    "test_backward_bfloat16[1.0]": _ALL_BITS,
                    "test_backward_bfloat16[0.7]": _ALL_BITS,
                    "test_backward_bfloat16_hidden_float32_weight": _ALL_BITS,
                    "test_backward_uses_autocast_hidden_for_weight_gradient": _ALL_BITS,
                    "test_bias[dtype1]": _ALL_BITS,
                }.items()
            },
        ),
        PeerFile(path="experimental/test_utils.py", passes=3, only=("TestReferenceModel",)),
    ),
)

PEERS = {"openrlhf": OPENRLHF, "verl": VERL, "trl": TRL}
CHECKOUTS = {"trl-checkout": TRL_CHECKOUT}


def files(names: Iterable[str]) -> dict[str, PeerFile]:
    """Every selected file, by its path in the folder that the run is made in (see `archives.lay_out`)."""
    peers: dict[str, Peer | Checkout] = {**PEERS, **CHECKOUTS}
    return {f"{name}/tests/{file.path}": file for name in names for file in peers[name].files}


def names_of(test: str) -> set[str]:
    """What the tables may call a test: as it is, without parameters, and by its function or class alone."""
    plain = test.partition("[")[0]
    return {test, plain, plain.partition("::")[0]}
