"""The run files in configs/: each loads, and is written and read back as it was."""

from pathlib import Path

import pytest

from maxstack.config import from_json, load_run, override, to_json, undocumented, write_run
from maxstack.train.run import RunConfig

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = sorted((ROOT / "configs").rglob("*.py"))


def test_there_are_run_files():
    assert RUN_FILES


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_a_run_file_loads_and_is_written_and_read_back_equal(path, tmp_path):
    config = load_run(path)
    assert load_run(write_run(config, tmp_path / "run.py")) == config
    assert from_json(to_json(config)) == config
    assert override(config, [], "maxstack train") == config


def test_every_field_of_a_run_says_what_it_means():
    assert undocumented(RunConfig) == []


def test_help_of_a_run_lists_its_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        override(load_run(RUN_FILES[0]), ["--help"], "maxstack train")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("--steps INT", "--optim.peak-lr FLOAT", "--mesh.fsdp INT", "--data.seq-len INT"):
        assert name in text
