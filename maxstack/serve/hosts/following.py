"""What `maxstack serve` does in a process that follows."""

import contextlib
import logging
import os
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from maxstack.config import RunError, UserError
from maxstack.serve.device import Device
from maxstack.serve.drafter import Drafter
from maxstack.serve.forms import form_for
from maxstack.serve.hosts.follower import Follower
from maxstack.serve.hosts.frames import LinkLost
from maxstack.serve.hosts.together import FAILED, leave
from maxstack.serve.operate.phases import COMPILE, WEIGHTS, Phases
from maxstack.serve.plan import Limits
from maxstack.serve.starting import Start, draft_of, loaded, slots_of
from maxstack.sharding import mesh_of

log = logging.getLogger(__name__)

UNDER_WAY = 2
"""Calls that the device may have before it; a fault shows when their results are waited for."""
STEP_ERRORS = (RuntimeError, ValueError, MemoryError, OSError)


def follow(what: Start, phases: Phases, follower: Follower) -> str:
    """Serve as the leader says; why that has ended, if not well."""
    with asked_to_leave(follower):
        try:
            why = _follow(what, phases, follower)
        except LinkLost as error:
            why = f"process 0 is gone: {error}"
        except (UserError, RunError) as error:
            why = str(error)
            follower.fault(why)
        except STEP_ERRORS as error:
            why = f"{type(error).__name__}: {error}"
            follower.fault(why)
            log.exception("this process cannot do what process 0 does")
        finally:
            follower.close()
    if why:
        log.error("%s; this process ends with it", why)
    else:
        log.info("process 0 has ended")
    return why


def _follow(what: Start, phases: Phases, follower: Follower) -> str:
    model, _ = loaded(what, phases)
    limits = limits_of(follower.limits())
    with phases.phase(WEIGHTS, "weights and cache lie on the device"):
        kv, draft = what.kv or model.config.dtype, draft_of(what)
        form, weights = form_for(model, slots=slots_of(what))
        mesh = mesh_of(model)
        drafter = None if draft is None else Drafter(draft, model.config, limits, kv, large_mesh=mesh)
        device = Device(model.config, form, weights, limits, kv, drafter=drafter)
        del model, draft
    with phases.phase(COMPILE, "every program is compiled"):
        device.warm_up(phases.compiled)
    phases.finish(f"follows process 0, as process {jax.process_index()}")
    results: queue.Queue[Any] = queue.Queue(UNDER_WAY)
    threading.Thread(target=watch, args=(results, follower), daemon=True).start()
    return follower.follow(device.calls(), lambda key, given: results.put(device.call(key, given)))


def watch(results: "queue.Queue[Any]", follower: Follower) -> None:
    """Wait for what the calls give, also while the leader has nothing to say: a fault shows in nothing else."""
    while True:
        try:
            jax.block_until_ready(results.get())
        except STEP_ERRORS as error:
            log.exception("this process cannot do what process 0 does")
            follower.fault(f"{type(error).__name__}: {error}")
            leave(FAILED)


def limits_of(values: dict[str, Any]) -> Limits:
    """Limits, from JSON."""
    shapes: dict[str, Any] = {"chunks": tuple(map(tuple, values["chunks"])), "steps": tuple(values["steps"])}
    return Limits(**{**values, **shapes})


@contextlib.contextmanager
def asked_to_leave(follower: Follower) -> Iterator[None]:
    """The first signal asks the leader to end, which ends this process; the second ends it at once."""

    def came(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, lambda second, _: os._exit(128 + second))
        # Links and logs are for threads, not for handlers.
        threading.Thread(target=ask, args=(signal.Signals(number).name,), daemon=True).start()

    def ask(name: str) -> None:
        log.info(
            "%s: process 0 is asked to finish what is under way; once more ends this process at once", name
        )
        follower.leaving()

    before = {number: signal.signal(number, came) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
