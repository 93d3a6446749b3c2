"""Serving: many requests on one model at once, in any company the same tokens."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maxstack.models.adapters import AdapterSlots as AdapterSlots
    from maxstack.models.generation.params import SamplingParams as SamplingParams
    from maxstack.serve.blocking import Engine as Engine
    from maxstack.serve.engine import AsyncEngine as AsyncEngine
    from maxstack.serve.output import Delta as Delta
    from maxstack.serve.output import Output as Output
    from maxstack.serve.plan import Limits as Limits
    from maxstack.serve.request import Request as Request

# jax is imported by the first use of what needs it, not by `import maxstack.serve`: the scheduler does without.
HOME = {
    "AdapterSlots": "maxstack.models.adapters",
    "AsyncEngine": "maxstack.serve.engine",
    "Delta": "maxstack.serve.output",
    "Engine": "maxstack.serve.blocking",
    "Limits": "maxstack.serve.plan",
    "Output": "maxstack.serve.output",
    "Request": "maxstack.serve.request",
    "SamplingParams": "maxstack.models.generation.params",
}


def __getattr__(name: str):
    if name in HOME:
        import importlib

        return getattr(importlib.import_module(HOME[name]), name)
    raise AttributeError(f"module 'maxstack.serve' has no attribute {name!r}")
