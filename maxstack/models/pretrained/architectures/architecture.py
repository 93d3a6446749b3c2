"""A row of the table of GGUF architectures: how llama.cpp keeps the models of a family."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from maxstack.models.families.keys import Keys
from maxstack.models.families.weights import Table
from maxstack.models.transformer import TransformerConfig


class Facts(NamedTuple):
    """What a file's tensors say that no key does."""

    names: Collection[str]
    """Of all tensors."""
    factors: Mapping[str, np.ndarray]
    """The rotary factors among them (rotary.TENSORS), by name."""

    def has(self, name: str) -> bool:
        """Whether the first layer has such a tensor."""
        return f"blk.0.{name}" in self.names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp keeps the models of a family.

    A row reads what llama.cpp would compute from the file; docs/models.md lists where the published models differ from
    that. Whatever a model has that llama.cpp would not compute has no place there: the row's table lacks the leaf, or
    the keys that are written do not give the model's config back.
    """

    name: str
    """`general.architecture`. Several rows may have one name; the first whose `when` says so reads a file."""
    model_types: tuple[str, ...]
    """`model_type` of the config.json that says the same, and of others whose models are held as well."""
    table: Callable[[TransformerConfig], Table]
    """Leaf to tensor."""
    read: Callable[[Keys, Facts], dict[str, Any]]
    """The file's keys (without their prefix) as config.json's. What it does not read is refused."""
    keys: Callable[[Mapping[str, Any], TransformerConfig], dict[str, Any]]
    """The inverse, from config.json's keys and the config, as far as there is one."""
    when: Callable[[Keys, Facts], bool] = lambda keys, facts: True
    """Whether a file of that name is of this row."""
    tied: bool | None = None
    """Whether the token table is the output projection too; None where a file may be either."""
    one_more: str | None = None
    """Pattern (regular expression) of the tensors that hold 1 more than ours do: Gemma's norms."""
    factors: tuple[str, ...] = ()
    """The tensors of rotary factors that it knows."""
    harmless: frozenset[str] = frozenset({"vocab_size", "rope.scaling.finetuned"})
    """Keys that say nothing of the mathematics."""
