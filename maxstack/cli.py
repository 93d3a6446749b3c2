"""The command line, `maxstack <verb>`: finds the verb's module and turns faults into messages and exit codes.

Exit codes: 0 done, 1 failed while running, 2 the request itself was wrong, 130 stopped by Ctrl-C or SIGTERM before it
was done (`train` saves and exits with 0).
"""

import contextlib
import difflib
import errno
import glob
import importlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import maxstack
from maxstack.config import RunError, UserError, fault_folder

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130


class Verb(NamedTuple):
    """A verb's module, which has `main(argv) -> int`, imported only when the verb is used."""

    module: str
    help: str


VERBS = {
    "train": Verb(
        "maxstack.train.command", "pretrain a model from a run file; the same command again resumes"
    ),
    "generate": Verb("maxstack.models.generate_command", "continue a prompt with a trained model"),
    "chat": Verb("maxstack.chat.command", "talk with a model in the terminal, or through a pipe"),
    "serve": Verb("maxstack.serve.command", "serve a model to OpenAI's clients, over HTTP and gRPC"),
    "convert": Verb("maxstack.models.convert_command", "write a model for transformers or llama.cpp"),
    "inspect": Verb("maxstack.inspect_command", "show a run, checkpoint, model folder or data shard"),
    "data": Verb("maxstack.data.command", "fetch and prepare training data"),
    "bench": Verb(
        "maxstack.bench.command",
        "time the kernels on this machine beside what one would use instead, or a server under load",
    ),
    "demo": Verb("maxstack.demo", "from nothing to a trained model that speaks, with a report"),
}

# What to do about a fault of the operating system; any other OSError is a bug and shows its traceback.
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, or choose another folder, and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another folder, and run it again",
    errno.EACCES: "no permission: change the permissions of that folder, or choose another one",
    errno.EPERM: "not permitted: change the permissions of that folder, or choose another one",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EIO: "the device reports a fault: check the disk, or choose another folder",
    errno.EISDIR: "a folder lies where a file should: move it out of the way, or choose another folder",
    errno.ENOTDIR: "a file lies where a folder should: move it out of the way, or choose another folder",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
}


# Where an accelerator shows itself to a process: TPU of the older and newer kinds, NVIDIA, AMD.
_DEVICE_NODES = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
_COMPILERS = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin")


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the time: a live display replaces it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    debug, imports, words = _leading(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        return DONE if words else WRONG_REQUEST
    if words[0] == "--version":
        print(_version())
        return DONE
    name, rest = words[0], words[1:]
    _log_to_stderr()
    _look_for_no_absent_device()
    try:
        with _terminable():
            verb = _module(name)
            _import(imports)
            code = verb.main(rest)
            if sys.stdout is not None:  # None: it was closed before we began
                sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"\nmaxstack {name}: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (UserError, RunError, MemoryError, OSError, RuntimeError) as error:
        message = _message(error)
        if message is None:
            raise
        log = _log_traceback(error, rest)
        if debug:
            traceback.print_exception(error)
        print(f"maxstack {name}: error: {message}", file=sys.stderr)
        if log is not None:
            print(f"maxstack {name}: the traceback is in {log}", file=sys.stderr)
        return WRONG_REQUEST if isinstance(error, UserError) else FAILED


def _leading(argv: Sequence[str]) -> tuple[bool, list[str], list[str]]:
    """What stands before the verb: whether tracebacks are shown, and modules to import; then the rest."""
    debug, imports, words = False, [], list(argv)
    while words and words[0] in ("--debug", "--import"):
        if words.pop(0) == "--debug":
            debug = True
        elif words:
            imports.append(words.pop(0))
    return debug, imports, words


def _look_for_no_absent_device() -> None:
    """Where libtpu or CUDA's plugin is there for its compiler alone, jax would look for a device, and complain."""
    told = "JAX_PLATFORMS" in os.environ or any(name.startswith("TPU_") for name in os.environ)
    if told or any(glob.glob(node) for node in _DEVICE_NODES):
        return
    if any(importlib.util.find_spec(name) is not None for name in _COMPILERS):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _module(name: str):
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown verb {name!r}; {hint}The verbs are {', '.join(VERBS)}")
    # A signal in the middle of an extension module's start would come out as that module's ImportError.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        return importlib.import_module(VERBS[name].module)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def _import(modules: Sequence[str]) -> None:
    """Modules of the user's, for what they register. Raises UserError when Python does not find one."""
    if modules:
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"--import {module}: Python finds no module {error.name}; give the name as in an import statement, of "
                "one in this folder, installed, or on PYTHONPATH"
            ) from error


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a verb as Ctrl-C does, so that it clears up; `train` has its own way with both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _message(error: BaseException) -> str | None:
    """What went wrong, where and how to fix it; None for an error that nobody foresaw."""
    if isinstance(error, UserError | RunError):
        return str(error)
    # By name: the type lives in jax, which a verb may not have imported.
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"out of device memory: {str(error).splitlines()[0]}; compute a step in more parts "
            "(--micro-batches), choose a stronger remat policy, or shard over more devices (--mesh.fsdp)"
        )
    if isinstance(error, MemoryError):
        what = f": {error}" if str(error) else ""
        return f"out of memory on the host{what}; compute a step in more parts (--micro-batches)"
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        place = " and ".join(str(name) for name in (error.filename, error.filename2) if name)
        return f"{place or error.strerror}: {_REMEDIES[error.errno]}"
    return None


def _log_traceback(error: BaseException, argv: Sequence[str]) -> Path | None:
    """Appends the traceback to `error.log` in the run's folder, where that is known and exists."""
    named = [value for flag, value in itertools.pairwise(argv) if flag == "--out"]
    named += [word.partition("=")[2] for word in argv if word.startswith("--out=")]
    folders = [
        Path(folder) for folder in (fault_folder(), *named) if folder is not None and os.path.isdir(folder)
    ]
    if not folders:
        return None
    log = folders[0] / "error.log"
    try:
        with log.open("a", encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:  # the disk that is full, or not ours to write on, is this one
        return None
    return log


def _log_to_stderr() -> None:
    logger = logging.getLogger("maxstack")
    if not logger.handlers:
        logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _usage() -> str:
    lines = [
        "usage: maxstack [--debug] [--import MODULE] VERB …",
        "",
        "verbs (maxstack VERB --help explains each):",
    ]
    lines += [f"  {name:10} {verb.help}" for name, verb in VERBS.items()]
    lines += [
        "", "  --version        show the versions", "  --debug          show the traceback of an error as well",
        "  --import MODULE  import a module of yours first, for the layers and families that it registers",
    ]  # fmt: skip
    return "\n".join(lines)


def _version() -> str:
    jax_version = importlib.metadata.version("jax")
    return f"maxstack {maxstack.__version__} (jax {jax_version}, Python {platform.python_version()})"
