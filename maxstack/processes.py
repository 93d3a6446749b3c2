"""Several processes of one run or server find each other, by what whoever started them left in the environment.

MAXSTACK_PROCESSES   how many there are, or "auto": ask Slurm, Open MPI, Kubernetes or Cloud TPU
MAXSTACK_PROCESS     which of them this is, from 0            (not with "auto")
MAXSTACK_COORDINATOR host:port on which process 0 listens     (not with "auto")
"""

import os
from collections.abc import Mapping
from typing import Any

import jax

from maxstack.config import RunError, UserError

NAMES = ("MAXSTACK_PROCESSES", "MAXSTACK_PROCESS", "MAXSTACK_COORDINATOR")
JOIN_WITHIN_S = 300
"""How long the processes may take to all be there (seconds)."""


def join_processes(environment: Mapping[str, str] = os.environ) -> bool:
    """Join the other processes where the environment says that there are some; before anything asks for devices.
    Whether there are some.

    Raises UserError for values that make no sense, RunError when the others do not come.
    """
    settings = asked_for(environment)
    if settings is None:
        return False
    # Its handler of SIGTERM would take the place of ours; what train/agreement.py and serve/hosts say does for both.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**settings, initialization_timeout=JOIN_WITHIN_S)
    except (RuntimeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"the processes did not find each other: {why}; see that all ({environment[NAMES[0]]}) were started, and "
            f"that {environment.get(NAMES[2], 'the first host')} is reachable"
        ) from error
    return True


def asked_for(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be told; None for a process alone."""
    count, index, coordinator = (environment.get(name, "") for name in NAMES)
    if count == "auto":
        return {}
    if count in ("", "1"):
        return None
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count) and coordinator):
        found = ", ".join(f"{name}={environment.get(name, '(unset)')}" for name in NAMES)
        raise UserError(
            f"{found}: several processes need their number, the number of this one, from 0, and host:port of process "
            "0; or MAXSTACK_PROCESSES=auto under Slurm, Open MPI, Kubernetes or on Cloud TPU"
        )
    return {"coordinator_address": coordinator, "num_processes": int(count), "process_id": int(index)}
