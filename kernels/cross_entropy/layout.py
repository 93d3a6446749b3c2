"""What is fixed when the program is compiled: the options of a call and how its arrays lie on the mesh."""

from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh

from maxstack.kernels.sharded import DimAxes, spec


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a call that change the program."""

    z_loss: float
    """Weight of the squared log-sum-exp."""
    softcap: float | None
    """Logits become `softcap · tanh(logits / softcap)`."""
    chunk: int | None
    """Tokens a step; None is the backend's choice."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Mesh axes of each dimension."""

    mesh: AbstractMesh
    lead: tuple[DimAxes, ...]
    """Of the leading dimensions of x, of labels and of weights."""
    embed: DimAxes
    """Of w's first dimension; gathered for the call, its gradient scattered."""
    vocab: DimAxes
    """Of w's second dimension."""

    @property
    def tokens(self) -> DimAxes:
        """Every axis that cuts the tokens; sums over tokens run over these."""
        return tuple(axis for axes in self.lead for axis in axes)

    @property
    def x(self) -> jax.P:
        return spec(*self.lead, ())

    @property
    def w(self) -> jax.P:
        return spec(self.embed, self.vocab)

    @property
    def t(self) -> jax.P:
        return spec(*self.lead)
