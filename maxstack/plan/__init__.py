"""What a run needs of its hardware, answered before there is any: memory by kind, collectives of a compiled step."""

from maxstack.plan.collectives import Collective, collectives
from maxstack.plan.memory import Memory, run_memory, state_memory

__all__ = ["Collective", "Memory", "collectives", "run_memory", "state_memory"]
