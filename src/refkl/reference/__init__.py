"""How the reference is held: a strategy says where the weights are. One file and one line of STRATEGIES each."""

from refkl.reference.adapter import AdapterReference
from refkl.reference.base import BuildRequest, Reference
from refkl.reference.clone import CloneReference
from refkl.reference.fsdp2 import FSDP2Reference
from refkl.reference.lora_moves import LastUpdate
from refkl.reference.pair import score_pair
from refkl.reference.plan import STRATEGIES, build_reference, choose, register_strategy
from refkl.reference.shape import Cost, Shape, Step
from refkl.reference.shared_trunk import SharedTrunkReference
from refkl.reference.swap import SwapReference
from refkl.reference.zero3 import Zero3Reference

__all__ = [
    "STRATEGIES",
    "AdapterReference",
    "BuildRequest",
    "CloneReference",
    "Cost",
    "FSDP2Reference",
    "LastUpdate",
    "Reference",
    "Shape",
    "SharedTrunkReference",
    "Step",
    "SwapReference",
    "Zero3Reference",
    "build_reference",
    "choose",
    "register_strategy",
    "score_pair",
]
