"""Which backend of a kernel serves a call: decided in Python from chip, shapes and types, before anything is traced."""

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

from maxstack.kernels import Unsupported

log = logging.getLogger(__name__)


class Chip(NamedTuple):
    """What a program is compiled for."""

    platform: str
    """"cpu", "gpu" or "tpu"."""
    name: str
    """"cpu"; of a GPU its architecture, "sm90"; of a TPU its generation, "v5e", "v5p", "v6e", "v7x"."""


CPU = Chip("cpu", "cpu")
# How jax spells the generations in `device_kind`.
_TPUS = (
    ("v5 lite", "v5e"), ("v5lite", "v5e"), ("v5e", "v5e"), ("v5p", "v5p"), ("v5", "v5p"), ("v6 lite", "v6e"),
    ("v6e", "v6e"), ("tpu7", "v7x"), ("7x", "v7x"), ("v4", "v4"), ("v3", "v3"), ("v2", "v2"),
)  # fmt: skip
_target: ContextVar[Chip | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(chip: Chip) -> Iterator[None]:
    """Kernels that are traced inside are chosen for `chip`, whatever this machine has: for compiling ahead of time.

    jax keeps traces of jitted functions: trace a function for one chip only, or make it anew.
    """
    token = _target.set(chip)
    try:
        yield
    finally:
        _target.reset(token)


def chip() -> Chip:
    """What `compiling_for` says, or else the first device at hand."""
    return _target.get() or _at_hand()


@functools.cache
def _at_hand() -> Chip:
    return chip_of(jax.devices()[0])


def chip_of(device: jax.Device) -> Chip:
    """The chip of a device, which may be one of a topology description."""
    kind = device.device_kind.lower()
    if device.platform == "tpu":
        return Chip("tpu", next((name for spelling, name in _TPUS if spelling in kind), kind))
    if device.platform in ("gpu", "cuda", "rocm"):
        capability = getattr(device, "compute_capability", None)
        return Chip("gpu", f"sm{str(capability).replace('.', '')}" if capability else kind)
    return Chip(device.platform, device.platform)


def choose(
    operation: str, wanted: str, declined: Mapping[str, str | None], *, named_only: tuple[str, ...] = ()
) -> str:
    """The backend for `wanted`, a name or "auto".

    `declined` has the backends, best first, each with why it cannot serve this call (None: it can); `named_only` are
    those that "auto" leaves out. "auto" takes the first that can, and logs once, for each combination, what it took
    and why others did not. A name never falls back. Raises Unsupported with the reason, ValueError for an unknown name.
    """
    if wanted != "auto":
        if wanted not in declined:
            raise ValueError(
                f"{operation}: unknown implementation {wanted!r}; known: auto, {', '.join(declined)}"
            )
        if (reason := declined[wanted]) is not None:
            raise Unsupported(f"{operation}: {wanted!r} cannot serve this call: {reason}")
        return wanted
    offered = {name: reason for name, reason in declined.items() if name not in named_only}
    taken = next((name for name, reason in offered.items() if reason is None), None)
    if taken is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in offered.items())
        raise Unsupported(f"{operation}: no implementation can serve this call ({reasons})")
    better = tuple(offered.items())[: list(offered).index(taken)]
    _tell(operation, chip(), taken, better)
    return taken


@functools.cache
def _tell(operation: str, chip: Chip, taken: str, better: tuple[tuple[str, str | None], ...]) -> None:
    """Once for each combination. Where a platform has no better backend at all there is nothing to say."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in better)
    level = logging.DEBUG if chip.platform == "cpu" else logging.INFO
    log.log(level, "%s on %s: %s%s", operation, chip.name, taken, f" ({reasons})" if reasons else "")


class Later:
    """A backend's module, imported when something of it is asked for: Pallas takes as long to import as all the rest,
    and a processor has no use for it."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


PLATFORMS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu", "cpu_native": "cpu"}
"""Of the backends that are for one alone."""


def elsewhere(backend: str) -> str | None:
    """Why a backend cannot serve anything here, without looking into it; None where it may."""
    return only_on(PLATFORMS[backend]) if backend in PLATFORMS else None


def only_on(platform: str) -> str | None:
    """The reason of a backend that needs a platform; None where this is it, and a generation of TPU that is known."""
    here = chip()
    if here.platform != platform:
        return f"it needs a {platform.upper()}, and this is a {here.name}"
    if platform == "tpu" and here.name not in (known := sorted({name for _, name in _TPUS})):
        return f"a TPU {here.name!r} is none that it was compiled for; known: {', '.join(known)}"
    return None
