"""`maxstack serve` in several processes: which of them does what, and how they end."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from maxstack.config import RunError, UserError
from maxstack.serve.hosts.follower import Follower
from maxstack.serve.hosts.joining import gathered
from maxstack.serve.hosts.leader import Leader
from maxstack.serve.meaning import start_of
from maxstack.serve.operate.phases import Phases

log = logging.getLogger(__name__)

DONE, FAILED = 0, 1


def run_together(args: argparse.Namespace, phases: Phases, lead: Callable[[Leader | None], int]) -> int:
    """Lead or follow; the exit code."""
    what = start_of(args)
    try:
        place = gathered(what)
    except (UserError, RunError) as error:
        log.error("%s", error)
        leave(FAILED)
    if isinstance(place, Follower):
        from maxstack.serve.hosts.following import follow

        why = follow(what, phases, place)
        return DONE if not why else leave(FAILED)
    code, why = FAILED, "it has failed; see what it says"
    try:
        code = lead(place)
        why = ""
    except (UserError, RunError) as error:
        if place is None:
            raise
        why = str(error)
        log.error("%s", why)
    finally:
        if place is not None:
            place.end(why)
    return leave(code or FAILED) if place is not None and (place.lost or why) else code


def leave(code: int) -> NoReturn:
    """End without waiting for the others, as leaving `jax.distributed` in good order does."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
    os._exit(code)
