"""The README's file tree is the true one, and its commands exist."""

import re
from pathlib import Path

import pytest

from maxstack.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TREE = README.rpartition("## Files")[2].partition("```")[2].partition("```")[0]


def tree_paths(tree: str) -> list[Path]:
    """The paths that the tree names, its indented lines below the folder above them."""
    found, above = [], Path()
    for line in tree.strip().splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(" ")
        if not line.startswith(" "):
            above = Path(names[0])
            found += [Path(name) for name in names]
        else:
            found += [above / name for name in names]
    return found


def test_every_entry_of_the_tree_exists():
    missing = [str(path) for path in tree_paths(TREE) if not (ROOT / path).exists()]
    assert not missing


def test_a_wrong_entry_would_be_found():
    assert not (ROOT / tree_paths("maxstack/\n  no_such_part/   nothing")[1]).exists()


def test_every_part_of_the_package_is_in_the_tree():
    parts = {path.name for path in (ROOT / "maxstack").iterdir() if not path.name.startswith("_")} - {
        "kernels"
    }
    named = {path.name for path in tree_paths(TREE) if path.parts[0] == "maxstack"}
    assert parts <= named | {"py.typed"}


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"^maxstack (\w+)", README, re.MULTILINE))))
def test_every_verb_of_the_readme_exists(verb):
    assert verb in VERBS
