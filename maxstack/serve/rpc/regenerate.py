"""Makes the Python files of maxstack.proto: python -m maxstack.serve.rpc.regenerate (needs grpcio-tools)."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROTO = "maxstack/serve/rpc/maxstack.proto"


def main(out: Path = ROOT) -> int:
    """Write them under a folder; the compiler's exit code."""
    import grpc_tools
    from grpc_tools import protoc

    own = Path(grpc_tools.__file__).parent / "_proto"
    return protoc.main([
        "protoc", f"-I{ROOT}", f"-I{own}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", PROTO,
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
