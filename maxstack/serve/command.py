"""`maxstack serve --model M`: a model behind OpenAI's interface, watched, and ended in good order."""

import gc
import importlib.util
from collections.abc import Sequence

from maxstack.config import UserError
from maxstack.serve.arguments import parser

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    args = parser().parse_args(argv)
    needed = (*NEEDED, "grpc", "grpc_health", "grpc_reflection") if args.grpc_port is not None else NEEDED
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"maxstack serve needs {', '.join(missing)}: pip install 'maxstack[serve]'")
    if args.log_prompts and args.log_file is None:
        raise UserError("--log-prompts says what the log holds: say where it is, with --log-file FILE")
    # Little of what a start makes is garbage, and looking for it takes a tenth of its time: not before it is ready.
    gc.disable()
    try:
        # Not before: --help and what is refused above come at once.
        from maxstack.serve.run import run

        return run(args)
    finally:
        gc.enable()
