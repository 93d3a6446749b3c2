"""Answers that must have a form: what is asked, compiled once into a grammar, and followed token by token."""

from maxstack.serve.constrain.constraint import BadConstraint, Bounds, Constraint
from maxstack.serve.constrain.grammars import Compiled, Grammars
from maxstack.serve.constrain.matching import Matching

__all__ = ["BadConstraint", "Bounds", "Compiled", "Constraint", "Grammars", "Matching"]
