"""Imports point down the layers of the package, and importing it does nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up; a part imports from its own layer and from those below it.
LAYERS = [
    {"kernels"},
    {"config"},
    {"sharding", "processes", "checkpoint", "telemetry"},
    {"optim", "data", "models"},
    {"train", "tune", "serve", "quant", "chat"},
    {"agent", "tools", "evals", "plan", "bench"},
    {"cli", "demo", "demo_serving", "inspect_command", "__init__", "__main__"},
]
LAYER = {part: level for level, layer in enumerate(LAYERS) for part in layer}
STRANGERS = [{"train", "serve"}]  # do not import each other
KERNEL_PACKAGES = {"jax", "jaxlib", "numpy", "jaxtyping", "maxstack"}  # and the standard library


def imports(source: str, package: str) -> Iterator[str]:
    """Full names of the modules a source imports, anywhere in it; `package` is the one that it is in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from maxstack import x` is an import of maxstack.x; other names are of the module.
            yield from (
                (f"{module}.{alias.name}" for alias in node.names) if module == "maxstack" else [module]
            )


def part_of(name: str) -> str | None:
    """`data` of maxstack.data.batch, `__init__` of maxstack itself, None of another package's module."""
    words = name.split(".")
    if words[0] != "maxstack":
        return None
    return words[1] if len(words) > 1 and words[1] in LAYER else "__init__" if len(words) == 1 else words[1]


def faults(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What the imports of a module do wrong."""
    package = module if is_package else module.rpartition(".")[0]
    here = part_of(module)
    found = []
    if here not in LAYER:
        return [f"{module}: {here} has no layer; give it one in {Path(__file__).name}"]
    for name in imports(source, package):
        if name.split(".")[0] == "kernels":
            found.append(
                f"{module}: imports {name}; say maxstack.kernels (kernels is another project's name)"
            )
        there = part_of(name)
        # The version and the letters, and `from maxstack import some_name`, are everybody's.
        if there in LAYER and there != "__init__":
            if LAYER[there] > LAYER[here]:
                found.append(f"{module}: imports {name}, which is above it")
            if here != there and {here, there} in STRANGERS:
                found.append(f"{module}: imports {name}; {here} and {there} do not import each other")
        if here == "kernels":
            top = name.split(".")[0]
            if top not in KERNEL_PACKAGES and top not in sys.stdlib_module_names:
                found.append(f"{module}: imports {name}; kernels need jax and numpy only")
    return found


def sources() -> list[tuple[Path, str, bool]]:
    """Each source of the package with its module's name and whether it is a package's __init__."""
    found = [(path, path.relative_to(ROOT)) for path in (ROOT / "maxstack").rglob("*.py")]
    found += [(path, "maxstack" / path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")]
    unique = {path.resolve(): (path, name) for path, name in found}
    return [
        (path, ".".join(name.with_suffix("").parts).removesuffix(".__init__"), path.name == "__init__.py")
        for path, name in unique.values()
    ]


def test_imports_point_down():
    found = [
        fault
        for path, name, is_package in sources()
        for fault in faults(path.read_text(), name, is_package=is_package)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source", "word"),
    [
        ("maxstack.models.layers", "import maxstack.train.step", "above"),
        ("maxstack.models.layers", "from maxstack import train", "above"),
        ("maxstack.models.layers", "def f():\n    from maxstack.train.step import run", "above"),
        ("maxstack.models.layers", "from ..train import step", "above"),
        ("maxstack.config.fields", "from maxstack.sharding import spec", "above"),
        ("maxstack.kernels.attention.reference", "from maxstack.config import UserError", "above"),
        ("maxstack.kernels.attention.reference", "import optax", "jax and numpy only"),
        ("maxstack.train.loop", "import maxstack.serve.engine", "do not import each other"),
        ("maxstack.serve.engine", "from maxstack.train import loop", "do not import each other"),
        ("maxstack.models.layers", "from kernels.attention import attention", "maxstack.kernels"),
        ("maxstack.surprise", "import jax", "no layer"),
    ],
)
def test_a_planted_import_is_found(module, source, word):
    assert word in "\n".join(faults(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("maxstack.train.step", "from maxstack.models import build\nfrom . import losses\nimport optax"),
        ("maxstack.models.layers", "from maxstack.kernels.attention import attention"),
        (
            "maxstack.kernels.attention.reference",
            "import math, jax\nfrom maxstack.kernels import Unsupported",
        ),
        ("maxstack.cli", "import maxstack\nfrom maxstack.config import UserError"),
    ],
)
def test_a_good_import_is_let_through(module, source):
    assert faults(source, module) == []


def test_every_source_is_looked_at():
    names = {name for _, name, _ in sources()}
    assert {"maxstack", "maxstack.cli", "maxstack.config.fields", "maxstack.kernels"} <= names


PROBE = """
import json, os, sys, threading
{first}
before = dict(os.environ), threading.active_count(), set(sys.modules)
import {modules}
heavy = [name for name in ("jax", "numpy", "tyro", "rich", "transformers", "torch") if name in sys.modules]
bridge = sys.modules.get("jax._src.xla_bridge")
print(json.dumps(dict(
    environment=dict(os.environ) == before[0], threads=threading.active_count() - before[1], heavy=heavy,
    devices=bool(bridge and bridge._backends))))
"""


def probed(modules: str, first: str = "") -> dict:
    code = PROBE.format(modules=modules, first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_package_and_its_command_line_does_nothing_and_is_light():
    assert probed("maxstack, maxstack.cli, maxstack.config") == {
        "environment": True,
        "threads": 0,
        "heavy": [],
        "devices": False,
    }


def test_importing_any_module_touches_no_device_and_no_environment_variable():
    # jax and orbax set variables and start threads of their own when they are imported; they come first.
    modules = sorted(name for _, name, _ in sources() if name != "maxstack.__main__")  # which is there to run
    done = probed(
        ", ".join(modules), "import jax, flax, grain, orbax.checkpoint, jax.experimental.pallas.mosaic_gpu"
    )
    assert done["devices"] is False
    assert done["environment"] is True


def test_the_probe_sees_a_device_query_and_a_changed_variable():
    done = probed("jax; jax.devices(); os.environ['X'] = '1'")
    assert done["devices"] is True
    assert done["environment"] is False


def test_load_is_found_at_the_top():
    import maxstack
    from maxstack.models.load import load

    assert maxstack.load is load
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        maxstack.lode  # noqa: B018  # pyrefly: ignore
