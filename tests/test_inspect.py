"""`maxstack inspect`: the facts are those of the run, no array is read for them, and bad paths are told apart."""

import dataclasses
import io
import json
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from maxstack.checkpoint import CheckpointConfig
from maxstack.cli import main
from maxstack.config import UserError, write_run
from maxstack.data import DataConfig, SourceConfig, TokenizerConfig
from maxstack.data.batches import Batches
from maxstack.data.prepare import PreparedData, prepare
from maxstack.inspect_command.data import decoded, visible
from maxstack.inspect_command.places import place_of
from maxstack.inspect_command.tables import show_rows
from maxstack.models import llama
from maxstack.sharding import MeshConfig
from maxstack.telemetry import TelemetryConfig
from maxstack.train.loop import train
from maxstack.train.run import EvaluationConfig, RunConfig, SampleConfig

TEXTS = [f"Document {i} says: héllo, number {i}.\tTab\x1b[31m and escape.\nSecond line." for i in range(60)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    """Two steps of a tiny run, both saved."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "text.txt").write_text("\x00".join(TEXTS), encoding="utf-8")
    source = SourceConfig(name="letters", path=str(folder / "text.txt"), separator="\x00")
    run = RunConfig(
        model=llama(vocab_size=320, width=32, depth=2, heads=2, kv_heads=1, feed_forward=64, max_length=64),
        data=DataConfig(
            sources=(source,), tokenizer=TokenizerConfig(path="bytes"), seq_len=64, cache=str(folder / "cache")
        ),
        out=str(folder / "run"), steps=2, batch_rows=2, mesh=MeshConfig(fsdp=2, data=1),
        evaluation=EvaluationConfig(every=-1), samples=SampleConfig(every=-1),
        checkpoint=CheckpointConfig(save_every=1), telemetry=TelemetryConfig(display="off", tensorboard=False),
    )  # fmt: skip
    train(run, jax.devices()[:2])
    return run


@pytest.fixture
def inspected(capsys):
    """Inspect a path with flags, as a program reads it."""

    def inspect(path: Path | str, *flags: str) -> dict:
        code = main(["inspect", str(path), "--json", *flags])
        out = capsys.readouterr()
        assert code == 0, out.err
        return json.loads(out.out)

    return inspect


def prepared_folder(run: RunConfig) -> Path:
    return prepare(run.data).sources["letters"].folder


def test_a_run_folder_tells_costs_checkpoints_metrics_and_data(run, inspected):
    found = inspected(run.out)
    assert found["kind"] == "run"
    # q, o 32x32; k, v 32x16; three matrices of 32x64; two norms of 32; a table of 320 rows; the last norm.
    assert found["model"]["parameters"] == 2 * (2 * 1024 + 2 * 512 + 3 * 2048 + 64) + 320 * 32 + 32
    training = found["model"]["flops_per_token"]["training"]
    assert training["full"] > training["causal"]
    checkpoints = found["checkpoints"]["checkpoints"]
    assert [one["step"] for one in checkpoints] == [1, 2]
    assert all(one["state"] == "good (sizes)" and "jax" in one["versions"] for one in checkpoints)
    assert checkpoints[-1]["groups"]["params"]["numbers"] == found["model"]["parameters"]
    assert found["metrics"]["steps"] == [1, 2]
    assert found["metrics"]["last"]["loss"] == pytest.approx(checkpoints[-1]["metrics"]["loss"])
    [source] = found["sources"]
    documents = {name: split["documents"] for name, split in source["splits"].items()}
    assert sum(documents.values()) == len(TEXTS)
    assert [sum(span["tokens"] for span in row) for row in found["rows"]] == [64, 64]


def test_rows_are_those_of_the_step_and_their_labels_those_that_count(run, inspected):
    rows = inspected(run.out, "--rows", "2", "--step", "3")["rows"]
    prepared = prepare(run.data)
    batch = Batches(run.data, prepared, batch_rows=2).batch(3)
    for row, spans in enumerate(rows):
        counted = np.repeat([span["counted"] for span in spans], [span["tokens"] for span in spans])
        documents = np.repeat([span["document"] for span in spans], [span["tokens"] for span in spans])
        np.testing.assert_array_equal(counted, batch.weights[row] > 0)
        np.testing.assert_array_equal(documents, batch.segment_ids[row])
    text = "".join(span["text"] for span in rows[0] if not span["special"])
    assert visible(prepared.tokenizer.decode(batch.tokens[0])) == text


def test_tables_read_no_array(run, inspected, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.out, copy)
    whole = inspected(copy, "--verify", "none", "--rows", "0")
    for step in (copy / "checkpoints").glob("0*"):
        for file in step.rglob("*"):
            if file.is_file() and file.name not in ("checkpoint.json", "manifest.json"):
                file.write_bytes(b"")
    gutted = inspected(copy, "--verify", "none", "--rows", "0")
    for one in (*whole["checkpoints"]["checkpoints"], *gutted["checkpoints"]["checkpoints"]):
        del one["bytes"]
    assert gutted == whole
    states = [one["state"] for one in inspected(copy)["checkpoints"]["checkpoints"]]
    assert all(state.startswith("damaged: ") for state in states)


def test_a_checkpoint_and_a_folder_of_them_are_known(run, inspected):
    folder = Path(run.out) / "checkpoints"
    many, one = inspected(folder), inspected(folder / "00000002", "--verify", "hash")
    assert (many["kind"], one["kind"]) == ("checkpoints", "checkpoint")
    assert [c["step"] for c in many["checkpoints"]["checkpoints"]] == [1, 2]
    assert [c["state"] for c in one["checkpoints"]["checkpoints"]] == ["good (hashes)"]
    assert one["model"] == many["model"]


def test_a_prepared_folder_and_a_file_of_it_show_documents(run, inspected):
    folder = prepared_folder(run)
    rows = inspected(folder, "--rows", "3", "--seq-len", "100")["rows"]
    assert [sum(span["tokens"] for span in row) for row in rows] == [100, 100, 100]
    shard = inspected(folder / "train.tokens.000.bin", "--rows", "1", "--seq-len", "4000")
    assert shard["shard"]["documents"] == prepare(run.data).sources["letters"].train.documents
    # In the order they lie, each from its beginning: as many borders as documents fit.
    text = "".join(span["text"] for span in shard["rows"][0] if not span["special"])
    assert text.startswith("Document ")
    assert inspected(folder.parent)["kind"] == "data set"


def test_a_run_file_says_what_each_device_holds(run, inspected, tmp_path):
    settings = dataclasses.replace(run, mesh=MeshConfig(fsdp=4))
    found = inspected(write_run(settings, tmp_path / "a_run.py"))
    numbers = found["model"]["parameters"]
    norms = found["model"]["by_part"]["norms"]
    held = 4 * ((numbers - norms) // 4 + norms)  # a norm's scale is whole on every device
    assert found["memory"]["devices"] == 4
    assert found["memory"]["bytes"]["parameters"] == found["memory"]["bytes"]["gradients"] == held
    assert found["memory"]["bytes"]["optimizer"] == 2 * held + 8  # two moments and two counters
    refused = inspected(tmp_path / "a_run.py", "--devices", "3")["memory"]["refused"]
    assert "there are 3" in refused


def test_a_terminal_shows_the_text_and_does_not_obey_it(run):
    prepared = prepare(run.data)
    batch = Batches(run.data, prepared, batch_rows=2).batch(0)
    plain = io.StringIO()
    show_rows(Console(file=plain, width=200), decoded(batch, prepared.tokenizer))
    assert "\x1b" not in plain.getvalue()
    assert "␛[31m" in plain.getvalue()
    assert "┃1┃" in plain.getvalue()
    assert "‹<|endoftext|>›" in plain.getvalue()  # the last token of a document has no next one
    coloured = io.StringIO()
    show_rows(Console(file=coloured, width=200, force_terminal=True), decoded(batch, prepared.tokenizer))
    assert "\x1b[" in coloured.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "no such file or folder; in"),
        ("notes.txt", b"hello", "not something maxstack inspect knows. Give it a run folder"),
        ("model.safetensors", struct.pack("<Q", 10**15) + b"{}", "is no safetensors file, or is cut off"),
        ("model.safetensors", struct.pack("<Q", 4) + b"nope", "its header is damaged"),
        ("run.py", b"def config():\n    return 1 / 0\n", "run.py:2: ZeroDivisionError"),
    ],
)
def test_what_it_does_not_know_is_a_wrong_request(tmp_path, capsys, name, content, message):
    (tmp_path / "other").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_folder_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="not something maxstack inspect knows"):
        place_of(tmp_path)


def test_the_header_of_safetensors_is_enough(tmp_path, inspected):
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]},
    }
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    found = inspected(tmp_path)
    assert found["safetensors"]["parameters"] == 15
    assert found["safetensors"]["arrays"] == {
        "w": {"shape": [3, 5], "dtype": "BF16", "file": "model.safetensors"}
    }


def test_padding_is_told_from_text(run):
    config = dataclasses.replace(run.data, packing="best_fit", seq_len=100)
    prepared: PreparedData = prepare(config)
    rows = decoded(Batches(config, prepared, batch_rows=4).batch(0), prepared.tokenizer)
    padding = [span for row in rows for span in row if span.document == 0]
    assert padding
    assert all(not span.counted and span.text == "" for span in padding)
