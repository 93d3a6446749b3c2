"""Answers that must have a form: what is asked, compiled once into a grammar, and followed token by token."""

from typing import TYPE_CHECKING

from maxstack.serve.constrain.constraint import BadConstraint, Bounds, Constraint
from maxstack.serve.constrain.matching import Compiled, Matching
from maxstack.serve.constrain.tools import ToolCalls

if TYPE_CHECKING:
    from maxstack.serve.constrain.grammars import Grammars as Grammars

__all__ = ["BadConstraint", "Bounds", "Compiled", "Constraint", "Grammars", "Matching", "ToolCalls"]


def __getattr__(name: str):
    """llguidance is imported by the first use of what needs it: the engine does without."""
    if name == "Grammars":
        from maxstack.serve.constrain.grammars import Grammars

        return Grammars
    raise AttributeError(f"module 'maxstack.serve.constrain' has no attribute {name!r}")
