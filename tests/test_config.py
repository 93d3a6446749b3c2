"""Run files, overrides and configurations as text."""

import dataclasses
import enum
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from maxstack.config import (
    UserError,
    from_dict,
    from_json,
    load_run,
    override,
    register,
    run_text,
    to_dict,
    to_json,
    undocumented,
    write_run,
    wrong_types,
)


class Remat(enum.Enum):
    NONE = "none"
    FULL = "full"


@dataclass(frozen=True, kw_only=True)
class AdamW:
    peak_lr: float = 1e-3
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments, a step."""


@dataclass(frozen=True, kw_only=True)
class Muon:
    peak_lr: float = 2e-2
    """Learning rate after warm-up."""
    momentum: float = 0.95
    """Decay of the momentum, a step."""


@dataclass(frozen=True, kw_only=True)
class Block:
    window: int | None = None
    """Sliding window, tokens; None: all."""
    kind: Literal["gqa", "mla"] = "gqa"
    """Kind of attention."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    count: int = 8
    """Number of experts."""


@dataclass(frozen=True, kw_only=True)
class Model:
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key/value heads."""
    pattern: tuple[Block, ...] = (Block(), Block(window=4))
    """Blocks of a period."""
    experts: Experts | None = None
    """Mixture of experts in place of the feed-forward."""
    remat: Remat = Remat.NONE
    """What the backward pass computes again."""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"query heads {self.heads} must be a multiple of kv heads {self.kv_heads}")


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int = 10
    """Optimizer steps."""
    tied: bool = True
    """Whether the embeddings are tied."""
    out: Path | None = None
    """Folder of results."""
    note: str = ""
    """Free text."""
    limit: float = math.inf
    """Seconds."""
    weights: dict[str, float] = field(default_factory=lambda: {"en": 1.0, "zh_tw": 0.5})
    """Weight of each source."""
    model: Model = Model()
    """The model."""
    optim: AdamW | Muon = AdamW()
    """The optimizer."""


HEADER = f"from {__name__} import AdamW, Block, Model, Run\n"


def run_file(folder: Path, text: str) -> Path:
    path = folder / "run.py"
    path.write_text(text)
    return path


def changed(*argv: str, config: Run = Run()) -> Run:
    return override(config, argv, "maxstack train run.py")


def refused(*argv: str, config: Run = Run()) -> str:
    with pytest.raises(UserError) as caught:
        changed(*argv, config=config)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- run files


def test_load_run_returns_what_config_returns(tmp_path):
    path = run_file(tmp_path, HEADER + "def config():\n    return Run(steps=3, model=Model(heads=8))\n")
    assert load_run(path, Run) == Run(steps=3, model=Model(heads=8))


def test_a_variant_can_load_its_neighbour(tmp_path):
    run_file(tmp_path, HEADER + "def config():\n    return Run(steps=3)\n")
    variant = tmp_path / "variant.py"
    variant.write_text(
        "from dataclasses import replace\nfrom pathlib import Path\nfrom maxstack.config import load_run\n"
        "def config():\n    return replace(load_run(Path(__file__).with_name('run.py')), note='variant')\n"
    )
    assert load_run(variant) == Run(steps=3, note="variant")


def test_an_edit_within_the_same_second_is_read_and_no_byte_code_is_left(tmp_path):
    path = run_file(tmp_path, HEADER + "def config():\n    return Run(steps=3)\n")
    assert load_run(path).steps == 3
    run_file(tmp_path, HEADER + "def config():\n    return Run(steps=4)\n")
    assert load_run(path).steps == 4
    assert [p.name for p in tmp_path.iterdir()] == ["run.py"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x = 1\n", ["no function config()"]),
        ("config = 3\n", ["no function config()"]),
        ("def config(size):\n    return 1\n", ["requires size"]),
        ("def config():\n    return (1,\n", ["run.py:2", "never closed"]),
        ("import nowhere_to_be_found\n", ["run.py:1", "nowhere_to_be_found"]),
        ("def config():\n    return 1 / 0\n", ["run.py:2", "ZeroDivisionError"]),
        (
            "def config():\n    return {'steps': 3}\n",
            ["returned {'steps': 3}, a dict", "expected a dataclass"],
        ),
        (HEADER + "def config():\n    return Model()\n", ["returned a Model", "expected a Run"]),
        (HEADER + "def config():\n    return Run(steps='3')\n", ["steps is '3' (str)", "expected int"]),
        (HEADER + "def config():\n    return Run(tied=1)\n", ["tied is 1 (int)", "expected bool"]),
        (
            HEADER + "def config():\n    return Run(model=Model(pattern=(Block(kind='mqa'),)))\n",
            ["model.pattern.0.kind is 'mqa'", "one of 'gqa', 'mla'"],
        ),
        (
            HEADER + "def config():\n    return Run(model=Model(heads=3))\n",
            ["run.py:3", "heads 3", "kv heads 2"],
        ),
        (HEADER + "def config():\n    return Run(step=3)\n", ["run.py:3", "step"]),
    ],
)
def test_a_bad_run_file_is_refused_with_its_place(tmp_path, text, parts):
    path = run_file(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_run(path, Run)
    for part in ["run.py", *parts]:
        assert part in str(caught.value)


def test_a_missing_run_file_is_answered_with_its_neighbours(tmp_path):
    run_file(tmp_path, "")
    with pytest.raises(UserError, match=r"runs\.py: no such run file; in that folder there is run\.py"):
        load_run(tmp_path / "runs.py")


def test_types_of_fields_are_told_apart():
    assert list(wrong_types(Run(limit=3))) == []  # an int is a float
    assert len(list(wrong_types(Run(limit=True)))) == 1
    assert len(list(wrong_types(Run(model=Model(pattern=[Block()]))))) == 1
    assert len(list(wrong_types(Run(weights={"en": "1"})))) == 1  # pyrefly: ignore
    assert len(list(wrong_types(Run(optim=Model())))) == 1


# ---------------------------------------------------------------------------------------------------- overrides


def test_overrides_reach_every_kind_of_field():
    assert changed("--optim.peak-lr", "3e-4").optim == AdamW(peak_lr=3e-4)
    assert changed("--optim.peak_lr=3e-4").optim == AdamW(peak_lr=3e-4)
    assert changed("--optim.betas", "0.8", "0.9").optim == AdamW(betas=(0.8, 0.9))
    assert changed("--no-tied").tied is False
    assert changed("--no-tied", "--tied").tied is True
    assert changed("--tied", "False").tied is False
    assert changed("--out", "runs/x").out == Path("runs/x")
    assert changed("--note", "-1 or --x").note == "-1 or --x"
    assert changed("--limit", "-2.5").limit == -2.5
    assert changed("--model.pattern.1.window", "None").model.pattern == (Block(), Block())
    assert changed("--model.pattern.0.kind", "mla").model.pattern[0] == Block(kind="mla")
    assert changed("--model.remat", "FULL").model.remat is Remat.FULL
    assert changed("--weights.zh-tw", "2").weights == {"en": 1.0, "zh_tw": 2.0}
    assert changed("--weights", "de", "1").weights == {"de": 1.0}
    assert changed() == Run()


def test_a_field_of_several_classes_is_chosen_by_name():
    assert changed("--optim", "Muon", "--optim.momentum", "0.9").optim == Muon(momentum=0.9)
    assert changed("--model.experts", "Experts", "--model.experts.count", "4").model.experts == Experts(
        count=4
    )
    assert (
        changed("--model.experts", "None", config=Run(model=Model(experts=Experts()))).model.experts is None
    )
    assert "one of AdamW, Muon" in refused("--optim", "SGD")
    assert "choose with --model.experts one of Experts, None" in refused("--model.experts.count", "4")


def test_overrides_that_are_only_valid_together_are_taken_together():
    assert changed("--model.heads", "9", "--model.kv-heads", "3").model == Model(heads=9, kv_heads=3)


def test_an_unknown_name_is_answered_with_the_nearest_known():
    assert "nearest known: --optim.peak-lr" in refused("--optim.peaklr", "3")
    assert "nearest known: --steps" in refused("--step", "3")
    assert "--model.pattern.0.window" in refused("--model.pattern.0.wndow", "3")
    assert "--optim.peak-lr" in refused("--peak-lr", "3")  # the right name in the wrong place
    assert "maxstack train run.py --help" in refused("--zzzzzzzz", "3")
    assert "unexpected 'steps'" in refused("steps", "3")
    assert "--model.pattern.2" in refused("--model.pattern.2.kind", "mla")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--steps", "abc"], ["--steps", "'abc'", "expected int", "now 10"]),
        (["--steps", "1.5"], ["--steps", "'1.5'", "expected int"]),
        (["--steps"], ["--steps", "no value", "expected int"]),
        (["--tied", "perhaps"], ["--tied", "'perhaps'", "expected bool"]),
        (["--no-tied", "True"], ["--no-tied takes no value"]),
        (["--optim.betas", "1"], ["--optim.betas", "'1'", "tuple[float, float]"]),
        (["--model.pattern.0.kind", "mqa"], ["--model.pattern.0.kind", "'mqa'", "one of 'gqa', 'mla'"]),
        (["--model.pattern.0.window", "few"], ["'few'", "int | None"]),
        (["--model.remat", "half"], ["'half'", "one of NONE, FULL"]),
        (["--model", "big"], ["--model is a group", "--model.kv-heads"]),
        (["--model.pattern", "x"], ["--model.pattern: members are set one by one"]),
        (["--model.heads", "5"], ["query heads 5", "kv heads 2", "--model.heads 5"]),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_type(argv, parts):
    message = refused(*argv)
    for part in parts:
        assert part in message


def test_help_lists_every_field_with_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        changed("--optim", "Muon", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--optim.peak-lr FLOAT" in text
    assert "Learning rate after warm-up. (default: 0.02)" in text
    assert "--model.pattern.1.window" in text
    assert "Sliding window, tokens; None: all. (default: 4)" in text
    assert "--optim {AdamW,Muon}\n        The optimizer. (default: Muon)" in text
    assert "--model.experts {Experts,None}\n" in text


@dataclass(frozen=True, kw_only=True)
class Inner:
    first: int = 0
    second: int = 0
    """Documented."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: tuple[Inner, ...] | None = None
    """Documented."""
    last: int = 0


def test_fields_without_a_docstring_are_found_however_deep():
    assert undocumented(Run) == []
    assert undocumented(Outer) == [f"{__name__}.Inner.first", f"{__name__}.Outer.last"]


# ---------------------------------------------------------------------------------------------------- text

FULL = Run(
    out=Path("runs/it's"),
    note='two\nlines, "quoted" and \\',
    weights={"en": 0.25, "a b": math.inf},
    model=Model(
        pattern=(Block(window=1024),) * 6 + (Block(kind="mla"),), experts=Experts(), remat=Remat.FULL
    ),
    optim=Muon(),
)


@pytest.mark.parametrize("config", [Run(), FULL])
def test_a_written_run_reads_back_equal_with_every_field_explicit(tmp_path, config):
    path = write_run(config, tmp_path / "new" / "run.py")
    assert load_run(path, Run) == config
    text = path.read_text()
    for item in dataclasses.fields(Run):
        assert f"{item.name}=" in text
    assert [p.name for p in path.parent.iterdir()] == ["run.py"]


def test_a_written_run_is_formatted(tmp_path):
    path = write_run(FULL, tmp_path / "run.py")
    ruff = [sys.executable, "-m", "ruff", "format", "--diff", "--line-length", "110", str(path)]
    done = subprocess.run(ruff, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_run(Run(), tmp_path / "run.py")
    with pytest.raises(UserError, match=r"Run\.note.*lambda"):
        write_run(Run(note=lambda: 0), path)
    assert load_run(path) == Run()


def test_a_class_of_the_run_file_itself_is_refused_in_a_written_run(tmp_path):
    text = HEADER + "class Mine(Run): pass\ndef config():\n    return Mine()\n"
    with pytest.raises(UserError, match="define it at the top of a module"):
        run_text(load_run(run_file(tmp_path, text)))


REGISTERED = (Run, Model, Block, AdamW, Muon, Experts, Remat)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr("maxstack.config.plain._REGISTERED", {})
    for cls in REGISTERED:
        register(cls)


@pytest.mark.parametrize("config", [Run(), FULL])
@pytest.mark.usefixtures("registered")
def test_json_reads_back_equal(config):
    assert from_json(to_json(config)) == config


@pytest.mark.usefixtures("registered")
def test_json_from_another_version_is_read_or_refused_by_field():
    data = to_dict(Model(heads=8))
    del data["remat"]
    assert from_dict(data) == Model(heads=8)  # a field that did not exist yet has its default
    with pytest.raises(UserError, match=r"Model has no colour.*newer version"):
        from_dict({**data, "colour": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"heads": "8"},
        {"heads": None},
        {"heads": 3},
        {"remat": {"enum": "REMAT", "name": "HALF"}},
        {"remat": {"enum": "MODEL", "name": "HALF"}},
        {"remat": {"path": 3}},
        {"remat": {"float": "many"}},
        {"remat": {"dict": 3}},
        {"remat": {"unheard": 3}},
        {"remat": {"class": "REMAT"}},
    ],
)
@pytest.mark.usefixtures("registered")
def test_json_of_another_form_is_refused(change):
    names = {"REMAT": f"{__name__}.Remat", "MODEL": f"{__name__}.Model"}
    spelled = {field: _renamed(value, names) for field, value in change.items()}
    with pytest.raises(UserError):
        from_dict(to_dict(Model()) | spelled)


def _renamed(value, names):
    return (
        {key: names.get(str(name), name) for key, name in value.items()} if isinstance(value, dict) else value
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"class": {}}'])
def test_text_that_is_no_configuration_is_refused(text):
    with pytest.raises(UserError):
        from_json(text)


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.Popen",
        "os.system",
        "maxstack_evil.Thing",
        "maxstack.config.plain.json.JSONDecoder",
        "maxstack.config.plain.Path",  # reachable, but defined elsewhere
        "maxstack.config.errors.UserError",  # no dataclass
        "maxstack.config.plain.from_json",
        "maxstack.no_such_module.Thing",
        "maxstack..config.Thing",
        3,
    ],
)
def test_json_names_no_class_outside_of_the_allowed(name):
    with pytest.raises(UserError):
        from_dict({"class": name})
    with pytest.raises(UserError):
        from_dict({"enum": name, "name": "x"})


def test_an_unregistered_class_is_refused_when_written():
    with pytest.raises(UserError, match=r"maxstack\.config\.register"):
        to_dict(Run())
