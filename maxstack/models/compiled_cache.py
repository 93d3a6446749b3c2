"""Compiled programs kept on disk, so that the next process starts without compiling."""

import hashlib
import logging
import os
from pathlib import Path

import jax

from maxstack.kernels.cpu_native.build import processor, user_cache

log = logging.getLogger(__name__)

SWITCH = "MAXSTACK_COMPILED_CACHE"
"""Environment variable: a folder for the cache, or 0 for none."""


def use_compiled_cache() -> Path | None:
    """Keep compiled programs in the user's cache folder; returns it, None where that is switched off or set already.

    Called by commands, never on import.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted == "0" or jax.config.jax_compilation_cache_dir is not None:
        return None
    folder = Path(wanted) if wanted else user_cache() / "maxstack" / "compiled" / fingerprint()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a home that cannot be written
        log.info("programs are compiled each time, their cache cannot be written: %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder


def fingerprint() -> str:
    """A name for this kind of processor: code compiled for another one may not run here."""
    return hashlib.sha256(processor().encode()).hexdigest()[:12]
