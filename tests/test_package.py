"""What is built and installed: the kernels behind their symlink, the pinned versions, the checked types."""

import ast
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(source: Path, out: Path, *targets: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    for target in targets:
        command += ["-t", target]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def kernel_files(prefix: str) -> set[str]:
    return {f"{prefix}/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}


def test_wheel_and_sdist_hold_the_kernels_and_a_wheel_of_the_sdist_too(tmp_path):
    build(ROOT, tmp_path, "wheel", "sdist")
    [wheel], [sdist] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = names_in(wheel)
    assert kernel_files("maxstack/kernels") <= names
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)

    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "maxstack" / "kernels" / "__init__.py").exists()
    build(unpacked, tmp_path / "again", "wheel")
    [again] = (tmp_path / "again").glob("*.whl")
    assert names_in(again) == names

    code = "import maxstack.kernels; print(maxstack.kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(wheel)},  # a wheel of Python alone is importable as it is
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(wheel))


def test_the_link_to_the_kernels_is_relative():
    link = ROOT / "maxstack" / "kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"


def plain_name(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def test_constraints_pin_every_direct_dependency_and_name_no_host_and_no_path():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line
    pinned = {plain_name(line) for line in lines}
    wanted = PROJECT["dependencies"] + [
        requirement
        for extra in ("dev", "serve", "aot")
        for requirement in PROJECT["optional-dependencies"][extra]
    ]
    assert [requirement for requirement in wanted if plain_name(requirement) not in pinned] == []


def test_annotations_are_checked_behind_the_link_to_the_kernels():
    from maxstack.kernels.attention import attention

    three_dims = jnp.zeros((2, 3, 4))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(three_dims, three_dims, three_dims)


def third_party_imports(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        if "goldens" in path.parts:  # made in an environment of their own, beside a peer
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - {"maxstack", "tests", "benchmarks"}


@pytest.mark.parametrize("folder", ["maxstack", "kernels", "configs", "tests"])
def test_every_imported_package_is_declared(folder):
    extras = PROJECT["optional-dependencies"]
    optional = [extras["dev"], extras["serve"]] if folder == "tests" else extras.values()
    requirements = [*PROJECT["dependencies"], *itertools.chain.from_iterable(optional)]
    declared = {plain_name(requirement) for requirement in requirements}
    # jaxlib comes with jax, which pins it.
    declared.add("jaxlib")
    providers = importlib.metadata.packages_distributions()
    unknown = {
        name
        for name in third_party_imports(ROOT / folder)
        if not declared & {plain_name(provider) for provider in providers.get(name, [name])}
    }
    assert unknown == set()
