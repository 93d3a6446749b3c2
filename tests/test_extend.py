"""Every example of docs/extend.md runs: a page that is wrong is a failing test."""

import contextlib
import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest

from maxstack.config import UserError, plain
from maxstack.models import families
from tests.kernels.chips import as_users_compile

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extend.md"


def examples(text: str) -> list[tuple[int, str]]:
    """Line of the first statement, and source, of each python block."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


def run(text: str) -> dict:
    """The names that the examples leave, run in order as one module."""
    page = types.ModuleType("extend_page")
    sys.modules[page.__name__] = page
    try:
        for line, source in examples(text):
            # Gradients of a real model take longer by half-compiled programs than compiling them takes.
            with as_users_compile() if "jax.grad(next_token_loss" in source else contextlib.nullcontext():
                # The blank lines let a traceback name the page's own line.
                exec(compile("\n" * (line - 1) + source, str(PAGE), "exec"), vars(page))
    finally:
        del sys.modules[page.__name__]
    return vars(page)


def test_every_example_of_the_page_holds(monkeypatch):
    monkeypatch.setattr(plain, "_REGISTERED", {})
    monkeypatch.setattr(families, "_REGISTERED", [])
    monkeypatch.chdir(PAGE.parents[1])
    names = run(PAGE.read_text())
    wanted = {"Fading", "Parallel", "every_second", "edited", "of_last", "focal", "each"}
    assert wanted | {"windowed", "streams", "silenced", "pull", "arcee"} <= names.keys()


def test_a_wrong_example_is_found_at_its_line():
    with pytest.raises(ZeroDivisionError) as caught:
        run("# Page\n\n```python\none = 1\n```\n\nText.\n\n```python\none / 0\n```\n")
    assert caught.traceback[-1].lineno + 1 == 10


def test_a_family_is_registered_once_and_under_a_name_of_its_own(monkeypatch):
    monkeypatch.setattr(families, "_REGISTERED", [])
    own = dataclasses.replace(families.LLAMA, name="Own", model_types=("own",))
    for _ in range(2):
        assert families.register_family(own) is own
    assert families.family_of({"model_type": "own"}, "config.json") is own
    assert families.families().count(own) == 1
    for taken in (dataclasses.replace(own, name="Llama"), dataclasses.replace(own, name="Other")):
        with pytest.raises(UserError, match=r"there is (Llama|Own)"):
            families.register_family(dataclasses.replace(taken, absent=("x",)))
