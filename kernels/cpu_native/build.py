"""Compiles the C++ files beside this one with the compiler of the machine, once for each processor and jax version."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
# -ffast-math, but with infinities, which stand for hidden keys.
FAST = ("-ffast-math", "-fno-finite-math-only")
SOURCES: dict[str, tuple[str, ...]] = {
    "decode.cc": FAST,
    "quantized.cc": FAST,
    "pages.cc": (),
    "panels.cc": (),
    "packed.cc": (),
    "attention.cc": (),
}
"""Files and their own flags."""
HEADERS = ("pieces.h", "panels.h", "attention.h")
SWITCH = "MAXSTACK_NATIVE"
"""Environment variable: 0 does without."""
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC")
# Linked apart: with -ffast-math, GCC before 13 links what makes the process that loads the library round denormal
# numbers to 0 in all that it does, numpy included.
LINK = ("-shared",)
NAMES = (
    "attention", "attention_backward", "cached_attention", "int8_product", "int4_product", "grouped_int8_product",
    "grouped_int4_product", "int4_panel_product", "paged_attention", "panel_product", "panel_product_at",
    "rms_norm", "row_exponentials", "row_sums", "untouched", "write_rows",
)  # fmt: skip
PREFIX = "maxstack_"
SECONDS = 120.0
"""A compiler that takes longer is given up."""


@functools.cache
def problem() -> str | None:
    """Why the operations are not there (switched off, no compiler, its complaint), also logged once; None when they
    are, compiled on the first call and registered with XLA."""
    reason = _register()
    if reason is not None:
        log.info("decoding on the CPU goes without its C++ part: %s", reason)
    return reason


def _register() -> str | None:
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if platform.system() not in ("Linux", "Darwin"):
        return f"not tried on {platform.system()}"
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return f"no C++ compiler ({', '.join(COMPILERS)}) on the PATH"
    try:
        library = ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return (getattr(error, "stderr", None) or str(error)).strip()[:500]
    for name in NAMES:
        jax.ffi.register_ffi_target(PREFIX + name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def compiled(compiler: str) -> Path:
    """The library, from the user's cache folder or compiled into it. Raises OSError, SubprocessError."""
    flags = (*FLAGS, f"-I{jax.ffi.include_dir()}")
    text = "".join((FOLDER / name).read_text() for name in (*HEADERS, *SOURCES))
    told = f"{compiler} {' '.join((*flags, *LINK))} {SOURCES} {jax.__version__} {processor()} {text}"
    cache = user_cache() / "maxstack" / "native"
    library = cache / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fresh = Path(folder) / library.name
        objects = [str(Path(folder) / f"{name}.o") for name in SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as several:
            jobs = [
                several.submit(_run, [compiler, *flags, *own, "-c", str(FOLDER / name), "-o", made])
                for (name, own), made in zip(SOURCES.items(), objects, strict=True)
            ]
            for job in jobs:
                job.result()
        _run([compiler, *LINK, *objects, "-o", str(fresh)])
        fresh.replace(library)  # another process may do the same: the last one wins
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)


def user_cache() -> Path:
    """The user's cache folder, as the XDG rules have it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = [
        next((line for line in lines if line.startswith(key)), "")
        for key in ("model name", "flags", "Features")
    ]
    return f"{platform.machine()} {found}"
