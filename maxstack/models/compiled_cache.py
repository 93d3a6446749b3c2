"""Compiled programs kept on disk, so that the next process starts without compiling."""

import hashlib
import os
import platform
from pathlib import Path

import jax

SWITCH = "MAXSTACK_COMPILED_CACHE"
"""Environment variable: a folder for the cache, or 0 for none."""


def use_compiled_cache() -> Path | None:
    """Keep compiled programs in the user's cache folder; returns it, None where that is switched off or set already.

    Called by commands, never on import.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted == "0" or jax.config.jax_compilation_cache_dir is not None:
        return None
    folder = Path(wanted) if wanted else user_cache() / "maxstack" / "compiled" / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: compile each time
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder


def user_cache() -> Path:
    """The user's cache folder, as the XDG rules have it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def processor() -> str:
    """A name for this kind of processor: code compiled for another one may not run here."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
