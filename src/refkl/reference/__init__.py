"""Strategies that hold the reference. Each decides where the weights are; it is one file and one line of STRATEGIES."""

from refkl.reference.contract import Reference
from refkl.reference.cost import Cost, Shape, Step
from refkl.reference.held import HeldReference
from refkl.reference.moving.lora_update import LastUpdate
from refkl.reference.pair import score_pair
from refkl.reference.registry import STRATEGIES, build_reference, choose, register_strategy, why_not_here
from refkl.reference.request import BuildRequest
from refkl.reference.strategies.adapter import AdapterReference
from refkl.reference.strategies.clone import CloneReference
from refkl.reference.strategies.frozen_copy import frozen_copy
from refkl.reference.strategies.fsdp2 import FSDP2Reference
from refkl.reference.strategies.shared_trunk import SharedTrunkReference
from refkl.reference.strategies.swap import SwapReference
from refkl.reference.strategies.zero3 import Zero3Reference

__all__ = [
    "STRATEGIES",
    "AdapterReference",
    "BuildRequest",
    "CloneReference",
    "Cost",
    "FSDP2Reference",
    "HeldReference",
    "LastUpdate",
    "Reference",
    "Shape",
    "SharedTrunkReference",
    "Step",
    "SwapReference",
    "Zero3Reference",
    "build_reference",
    "choose",
    "frozen_copy",
    "register_strategy",
    "score_pair",
    "why_not_here",
]
