"""The backend a model runs on: one process, DDP, DeepSpeed ZeRO, FSDP. Only this package handles their wrappers."""

from refkl.backend.compile_lock import watch_compile_locks
from refkl.backend.deepspeed_settings import given_once
from refkl.backend.detect import Backend, check_launch, detect
from refkl.backend.fsdp import is_sharded, mixed_precision, own_class, reshard, shard_like
from refkl.backend.layout import (
    Block,
    Layout,
    Run,
    Weight,
    Whole,
    communicating_device,
    holds_shards,
    layout_of,
    weights_of,
    whole,
)
from refkl.backend.learned_prompt import Prompt, learned_prompt, without_prompt
from refkl.backend.linear_layers import linear_layers, matrix_shape
from refkl.backend.modules import (
    base_model,
    canonical_name,
    decoder_layers,
    dropout_rates,
    eight_bit_layer,
    evaluating,
    named_weights,
    outside_inference_mode,
    parameters_in,
    submodules,
    unwrap,
)
from refkl.backend.ranks import peer_gone
from refkl.backend.zero import (
    check_can_save,
    full_shape,
    gathered,
    is_partitioned,
    loading_whole,
    local_shard,
    set_micro_batch,
)

__all__ = [
    "Backend",
    "Block",
    "Layout",
    "Prompt",
    "Run",
    "Weight",
    "Whole",
    "base_model",
    "canonical_name",
    "check_can_save",
    "check_launch",
    "communicating_device",
    "decoder_layers",
    "detect",
    "dropout_rates",
    "eight_bit_layer",
    "evaluating",
    "full_shape",
    "gathered",
    "given_once",
    "holds_shards",
    "is_partitioned",
    "is_sharded",
    "layout_of",
    "learned_prompt",
    "linear_layers",
    "loading_whole",
    "local_shard",
    "matrix_shape",
    "mixed_precision",
    "named_weights",
    "outside_inference_mode",
    "own_class",
    "parameters_in",
    "peer_gone",
    "reshard",
    "set_micro_batch",
    "shard_like",
    "submodules",
    "unwrap",
    "watch_compile_locks",
    "weights_of",
    "whole",
    "without_prompt",
]
