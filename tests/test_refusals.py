"""What the package never does: run code from data, or read formats that can."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("maxstack", "kernels")

# The code sandbox's child is the one place that runs given code; nothing else is ever listed here.
EXCEPTIONS = {"maxstack/tools/sandbox_child.py"}

MODULES = set("pickle cPickle _pickle cloudpickle dill marshal shelve jsonpickle joblib torch".split())
BUILTINS = {"eval", "exec", "__import__"}
WORDS = re.compile(r"\b(allow_pickle|trust_remote_code\s*=\s*True|cloudpickle|shell\s*=\s*True)\b")
# Methods by what they are called on: yaml.load takes any object unless it is the safe one.
METHODS = set(
    "yaml.load yaml.unsafe_load yaml.full_load os.system os.popen builtins.eval builtins.exec".split()
)


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each refused thing in a source."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        yield from ((line, name) for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            yield line, node.id
        if isinstance(node, ast.Attribute) and ast.unparse(node) in METHODS:
            yield line, ast.unparse(node)
        # importlib.import_module("pickle"); "torch" is a word of other sentences too.
        if isinstance(node, ast.Constant) and node.value in MODULES - {"torch"}:
            yield line, repr(node.value)
    for number, text in enumerate(source.splitlines(), start=1):
        yield from ((number, match.group()) for match in WORDS.finditer(text))


def sources() -> list[Path]:
    return sorted({path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")})


def test_the_package_runs_no_code_from_data():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources()
        if str(path.relative_to(ROOT)) not in EXCEPTIONS
        for line, name in faults(path.read_text())
    ]
    assert found == []


def test_every_source_is_looked_at():
    names = {str(path.relative_to(ROOT)) for path in sources()}
    assert {"maxstack/cli.py", "maxstack/config/plain.py", "kernels/__init__.py"} <= names


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    import cloudpickle as c",
        "from dill import loads",
        "import marshal, json",
        "import shelve",
        "import torch.nn",
        "from torch import load",
        "importlib.import_module('pickle')",
        "eval('1')",
        "run = exec",
        "builtins.exec('x')",
        "__import__('os')",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "os.system('ls')",
        "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_a_planted_refusal_is_found(source):
    assert list(faults(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load(path)",
        "yaml.safe_load(text)",
        "model.eval_loss(x)\nspec.loader.exec_module(module)",
        "def evaluate(): ...",
        "'unlike torch, this says so'",
    ],
)
def test_what_is_allowed_is_let_through(source):
    assert list(faults(source)) == []
