"""Configuration of a whole run of `refkl train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from refkl.config.kl import KLConfig
from refkl.config.options import (
    BackendName,
    DtypeName,
    OnCheckpointError,
    ResumedReference,
    check_offered,
    is_import_path,
)
from refkl.config.reference import ReferenceConfig, ScoringConfig
from refkl.config.reward import RewardConfig
from refkl.config.sync import SyncConfig

Method = Literal["grpo", "rloo", "dpo", "kto", "sft"]
REWARDED = ("grpo", "rloo")
"""The methods that maximise a reward."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy to start from."""

    path: str
    """A model folder (or hub name), or "package.module:function" for a function that returns one."""
    dtype: DtypeName = "float32"
    """Dtype that the weights are loaded in. Mixed precision is a setting of the trainer (`trainer.bf16`)."""
    freeze: list[str] = field(default_factory=list)
    """Module paths to freeze, such as "model.embed_tokens" or "model.layers.0"; see refkl.freeze."""
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of transformers' from_pretrained, such as attn_implementation."""

    def __post_init__(self) -> None:
        check_offered("model", self)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts for GRPO and RLOO (column "prompt"), preferences for DPO ("prompt", "chosen", "rejected"), rated
    completions for KTO ("prompt", "completion", "label"), or texts for SFT ("prompt" and "completion", which trains on
    the completion only; or "text", or "messages"). Each value is text or a list of messages; a label is true or false.
    Other columns may hold anything."""

    source: str
    """A .jsonl, .json, .csv or .parquet file, a folder written by datasets.save_to_disk, "package.module:function" for
    a function that returns a datasets.Dataset, or "reasoning_gym:TASK" for the questions of a task of that package."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for the function; for a task `size`, `seed`, `instructions`, `chat` and the task's own settings."""
    limit: int | None = None
    """Largest number of rows to use."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit must be at least 1, got {self.limit}.")
        if self.kwargs and not is_import_path(self.source):
            raise ValueError(f"data.kwargs are arguments for a function, but data.source is {self.source!r}.")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Texts generated at fixed prompts before, during and after training, to show what the metrics mean."""

    prompts: int = 8
    """Number of prompts, from the start of the data; 0 for none."""
    every: int = 0
    """Optimizer steps between two rounds; 0 for one round at the middle of the run."""
    max_new_tokens: int | None = None
    """Largest number of tokens of a sample; None means the trainer's max_completion_length, or 32."""
    temperature: float = 0.7
    """Sampling temperature of these samples only (training samples use the trainer's). 0 takes the most likely token
    each time."""

    def __post_init__(self) -> None:
        if self.prompts < 0 or self.every < 0:
            raise ValueError(f"samples.prompts and samples.every cannot be negative: {self.prompts}, {self.every}.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"samples.max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not 0.0 <= self.temperature < inf:
            raise ValueError(f"samples.temperature must be finite and not negative, got {self.temperature}.")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """The launch that the run expects. Any other launch is refused before training."""

    backend: BackendName | None = None
    """The expected backend; None for any."""
    processes: int | None = None
    """The expected number of processes; None for any."""

    def __post_init__(self) -> None:
        check_offered("launch", self)
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"launch.processes must be at least 1, got {self.processes}. Leave it out for any number.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Reaction to a checkpoint that cannot be written. `trainer`'s save_strategy, save_steps and save_total_limit set
    how often checkpoints are written, and how many are kept."""

    on_error: OnCheckpointError = "stop"
    """"stop" ends the run with an error if a disk is full or fails; "continue" goes on without that checkpoint. Either
    way the incomplete checkpoint is deleted, and the last complete one stays. "continue" is for one process and for
    DDP."""

    def __post_init__(self) -> None:
        check_offered("checkpoint", self)


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """The checkpoint from which a stopped or killed run goes on; on the command line, `--resume` and `--resume
    PATH`."""

    checkpoint: str | None = None
    """"newest": the newest complete checkpoint of the run folder; or the folder of a checkpoint. None starts a new
    run."""
    reference: ResumedReference = "recorded"
    """"recorded": the reference that the checkpoint was trained against; the run is refused if it is not available.
    "initial": the reference that the configuration gives, whatever the checkpoint says."""

    def __post_init__(self) -> None:
        check_offered("resume", self)
        if self.checkpoint == "":
            raise ValueError("resume.checkpoint is empty: use 'newest', name a checkpoint's folder, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of `refkl train`: a YAML file. Any of its keys can be overridden on the command line."""

    method: Method = "grpo"
    """"grpo" or "rloo" (a reward), "dpo" (preference pairs), "kto" (completions that are wanted or not) or "sft" (texts
    to learn). It selects the TRL configuration that `trainer` is."""
    model: ModelConfig
    """The policy."""
    data: DataConfig
    """The training data."""
    imports: list[str] = field(default_factory=list)
    """Modules that are imported before anything else is read, such as one that registers a reference strategy. They may
    be in the working directory."""
    peft: dict[str, Any] | None = None
    """A PEFT configuration: `peft_type` (LORA, IA3, …) and the fields of that type. None trains the model itself."""
    reward: list[RewardConfig] = field(default_factory=list)
    """One or more rewards, for GRPO and RLOO: functions, reward models, verifiable tasks. They are summed with their
    weights and logged separately. --reward.help lists the fields of an entry."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The reference model and how it is held."""
    kl: KLConfig = field(default_factory=KLConfig)
    """The KL penalty."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """Settings for the computation of a batch by policy and reference."""
    sync: SyncConfig | None = None
    """Updates of the reference; None for no updates."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Texts generated at fixed prompts."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """The launch that the run expects."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Reaction to a checkpoint that cannot be written."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """The checkpoint that the run goes on from."""
    trainer: Any = None
    """TRL's configuration (GRPOConfig, RLOOConfig, DPOConfig, KTOConfig, SFTConfig), with all of its fields;
    `trainer.output_dir` is the run folder."""

    def __post_init__(self) -> None:
        if self.method == "sft":
            self.kl.on_given_text()
        if self.method in REWARDED and not self.reward:
            raise ValueError(f"method {self.method!r} maximises a reward, and `reward` lists none. Add an entry to it.")
        if self.method not in REWARDED and self.reward:
            raise ValueError(f"method {self.method!r} takes no reward, and `reward` lists some. Leave `reward` out.")
        names = [reward.settled().name for reward in self.reward]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"Two entries of `reward` are called {' and '.join(map(repr, twice))}, and the logs tell rewards apart "
                "only by name. Set reward.name."
            )
        if self.peft is not None and "peft_type" not in self.peft:
            raise ValueError("peft needs peft_type, such as LORA, beside that type's fields.")
