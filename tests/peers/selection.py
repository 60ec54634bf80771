"""Which tests of which published packages run against refkl, what is left out, and where refkl differs on purpose.

A test that is in none of these tables must pass. A deviation must fail, and with this message: if it starts to pass, or
fails in another way, the run fails. Nothing of the packages is in this repository. docs/peers.md says this in words.
"""

from __future__ import annotations

import re
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
    """Test function or class -> why it has nothing to say about refkl."""
    deviations: dict[str, Deviation] = field(default_factory=dict)
    """Test with its parameters -> how it fails."""


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

PEERS = {"openrlhf": OPENRLHF, "verl": VERL}


def files() -> dict[str, PeerFile]:
    """Every selected file, by its path in the folder that the run is made in (see `archives.lay_out`)."""
    return {f"{name}/tests/{file.path}": file for name, peer in PEERS.items() for file in peer.files}


def base_name(test: str) -> str:
    """The function or class of a test, without parameters and methods."""
    return re.split(r"\[|::", test)[0]
