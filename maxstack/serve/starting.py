"""From a model's name to an engine whose programs are compiled."""

import contextlib
import dataclasses
import functools
import json
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.models.adapters import AdapterSlots
from maxstack.models.load import load
from maxstack.models.paged.pools import page_bytes
from maxstack.models.transformer import Transformer, TransformerConfig
from maxstack.serve.engine import AsyncEngine
from maxstack.serve.hosts.leader import Leader
from maxstack.serve.invariant import needed
from maxstack.serve.operate.bandwidth import peak_bandwidth
from maxstack.serve.operate.phases import ADAPTERS, COMPILE, LOAD, WEIGHTS, Phases
from maxstack.serve.plan import Limits
from maxstack.serve.sizes import default_limits
from maxstack.sharding import MeshConfig, build_mesh

if TYPE_CHECKING:
    from maxstack.serve.operate.metrics import Metrics, Traffic

RANK = 16
DRAFTS = 4
SLOW_FLOPS = 1e9
"""A second and core; twenty times that is usual."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is to be served, and in which sizes; None leaves it to what fits."""

    model: str
    name: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    """Names and folders."""
    adapter_slots: int | None = None
    adapter_rank: int | None = None
    weights: Any = None
    dtype: Any = None
    step: int | None = None
    averaged: bool = False
    kv: Any = None
    max_length: int | None = None
    rows: int | None = None
    pages: int | None = None
    waiting: int | None = None
    tensor: int = 1
    """Devices that share each product, and hold their own heads of the cache."""
    drafts: int = 0
    draft_model: str | None = None
    """A small one that guesses; None guesses from what was said."""
    invariant: bool = False
    """Answers are the same to the last bit in any company."""

    @property
    def model_name(self) -> str:
        """The name that clients ask for."""
        return self.name or PurePath(self.model.rstrip("/")).name.removeprefix("hf:") or self.model


class Loading:
    """A model that a thread is reading. Whoever gives up need not wait for the thread."""

    def __init__(self, what: Start, phases: Phases):
        self._future: Future[tuple[Transformer, Tokenizer | None]] | None = Future()
        reading = threading.Thread(target=self._read, args=(self._future, what, phases), daemon=True)
        reading.start()

    def _read(self, future: Future, what: Start, phases: Phases) -> None:
        with contextlib.ExitStack() as stack:
            stack.push(functools.partial(passed_on, future))
            future.set_result(loaded(what, phases))

    def taken(self) -> tuple[Transformer, Tokenizer | None]:
        """The model, once: nothing here holds it any longer. Raises what reading it has raised."""
        future, self._future = self._future, None
        if future is None:
            raise RuntimeError("the model was taken before")
        return future.result()


def passed_on(future: Future, kind: object, error: BaseException | None, trace: object) -> bool:
    """An error goes to whoever asks for the result."""
    if error is not None:
        future.set_exception(error)
    return error is not None


def loaded(what: Start, phases: Phases) -> tuple[Transformer, Tokenizer | None]:
    """The model as it is on disk."""
    with phases.phase(LOAD, f"{what.model} is read"):
        return load(
            what.model, step=what.step, averaged=what.averaged, dtype=what.dtype, weights=what.weights,
            mesh=mesh_for(what.tensor), as_filed=True,
        )  # fmt: skip


def start(
    what: Start, phases: Phases, metrics: "Metrics | None" = None, loading: Loading | None = None,
    leader: Leader | None = None,
) -> AsyncEngine:  # fmt: skip
    """An engine, ready for its first request; its model may be `loading` already, others may follow. Raises UserError
    for what cannot be served."""
    model, tokenizer = loaded(what, phases) if loading is None else loading.taken()
    if tokenizer is None:
        raise UserError(f"{what.model} has no tokenizer beside it: requests and answers are text")
    with phases.phase(WEIGHTS, "weights and cache lie on the device"):
        kv = what.kv or model.config.dtype
        draft = draft_of(what)
        slots = slots_of(what)
        invariant = what.invariant and needed(model, adapters=slots)
        if invariant and leader is not None:
            raise UserError(
                "--invariant is not served by several processes yet: leave it out, or serve in one"
            )
        engine = AsyncEngine(
            model, tokenizer, limits=limits_of(what, model.config, kv, invariant=invariant), kv_dtype=kv,
            adapters=slots, draft=draft, leader=leader, use_up=True,
        )  # fmt: skip
        del model, draft  # the engine has its own form of the weights
    with phases.phase(COMPILE, "every program is compiled"):
        engine.warm_up(phases.compiled)
    if metrics is not None:  # when nothing else uses the memory that is measured
        metrics.traffic = traffic_of(
            what, engine, kv, peak_bandwidth(jax.local_devices()[0].device_kind, engine.leaves)
        )
    if what.adapters:
        with phases.phase(ADAPTERS, ", ".join(name for name, _ in what.adapters)):
            for name, folder in what.adapters:
                engine.adapters.load(name, folder)
    return engine


def draft_of(what: Start) -> Transformer | None:
    """The small model that guesses, on the mesh of the large one."""
    if what.draft_model is None:
        return None
    return load(what.draft_model, dtype=what.dtype, mesh=mesh_for(what.tensor))[0]


def mesh_for(tensor: int) -> Mesh | None:
    """The first devices as a mesh, or those of all processes; None for one. Raises UserError if there are not so
    many."""
    if (processes := jax.process_count()) > 1:
        if tensor != (together := jax.device_count()):
            raise UserError(
                f"--tensor {tensor}: {processes} processes have {together} devices together, and all take part: give "
                f"--tensor {together}"
            )
        return build_mesh(MeshConfig(fsdp=1, tensor=tensor))
    if tensor == 1:
        return None
    if tensor > (there := jax.local_device_count()):
        raise UserError(f"--tensor {tensor}: this machine has {there} devices")
    return build_mesh(MeshConfig(fsdp=1, tensor=tensor), jax.local_devices()[:tensor])


def limits_of(what: Start, config: TransformerConfig, kv: Any, *, invariant: bool = False) -> Limits:
    """The sizes that fit, with those that were asked for. Raises UserError for what cannot be."""
    if what.max_length is not None and what.max_length > config.max_length:
        raise UserError(f"--max-length {what.max_length} is more than the model's {config.max_length} tokens")
    grid = what.tensor > 1 or what.draft_model is not None
    if invariant and what.drafts:
        raise UserError(
            "--invariant with --drafts or --draft-model: guesses are checked in steps of another shape, which rounds "
            "differently here; leave one of them out"
        )
    limits = default_limits(
        config, kv, rows=what.rows, max_length=what.max_length, grid=grid, invariant=invariant
    )
    limits = dataclasses.replace(
        limits, pages=what.pages or limits.pages, waiting=what.waiting or limits.waiting, drafts=what.drafts,
        tokens_a_step=limits.tokens_a_step + limits.rows * what.drafts,
    )  # fmt: skip
    if limits.pages < limits.table_width:
        raise UserError(
            f"--pages {limits.pages} of {limits.page} tokens hold no sequence of {limits.max_length} tokens: give "
            f"{limits.table_width} or more, or a smaller --max-length"
        )
    return limits


def slots_of(what: Start) -> AdapterSlots | None:
    """Room for the adapters: for those at hand, unless told otherwise; None where there are none."""
    count = what.adapter_slots if what.adapter_slots is not None else len(what.adapters)
    if count < len(what.adapters):
        raise UserError(
            f"--adapter-slots {count} hold no {len(what.adapters)} adapters: give more, or fewer of those"
        )
    if not count:
        return None
    ranks = [rank_of(Path(folder)) for _, folder in what.adapters]
    return AdapterSlots(count=count, rank=what.adapter_rank or max(ranks, default=RANK))


def rank_of(folder: Path) -> int:
    """The rank that an adapter's folder states; what is wrong with a folder is said when it is read."""
    try:
        rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("r")
    except (OSError, ValueError, AttributeError):
        return RANK
    return rank if isinstance(rank, int) and rank > 0 else RANK


def traffic_of(what: Start, engine: AsyncEngine, kv: Any, peak: float | None) -> "Traffic":
    """Bytes that a step has to read at most: all weights, and the keys and values of its rows."""
    from maxstack.serve.operate.metrics import Traffic  # with prometheus, while the model is read

    devices, limits = what.tensor, engine.limits
    return Traffic(
        weight_bytes=engine.weight_bytes,
        kv_bytes_a_token=page_bytes(engine.config, limits.page, kv) / limits.page,
        peak=None if peak is None else peak * (devices if jax.default_backend() != "cpu" else 1),
    )


def slow_step_s(engine: AsyncEngine) -> float:
    """Seconds that the largest step cannot reasonably exceed: on a processor, by a rate that any of them reaches."""
    if jax.default_backend() != "cpu":
        return 0.0
    weights = sum(leaf.size for leaf in engine.leaves)
    return 2 * weights * engine.limits.tokens_a_step / ((os.cpu_count() or 1) * SLOW_FLOPS)
