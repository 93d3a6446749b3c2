import dataclasses
import json
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.data.batch import Batch
from maxstack.data.batches import row_hashes
from maxstack.data.config import DataConfig, MixtureStage, SourceConfig, TokenizerConfig
from maxstack.data.loader import Loader
from maxstack.data.prepare import PreparedData, prepare

ROWS = 8
STAGES = (MixtureStage(step=6, weights={"plays": 1.0, "poems": 1.0}, ramp_steps=8),)


@pytest.fixture(params=["concat", "best_fit"])
def mixed(request, config) -> DataConfig:
    """Two sources whose weights change while the test reads."""
    return dataclasses.replace(config, packing=request.param, stages=STAGES)


def run(config: DataConfig, prepared: PreparedData, steps: int, **settings) -> list[list[str]]:
    """The row hashes of some steps as they come out of the loader."""
    loader = Loader(config, prepared, batch_rows=ROWS, **settings)
    first = loader.step
    found = []
    for step, batch in islice(loader, steps):
        assert step == first + len(found)
        found.append(row_hashes(batch))
    loader.close()
    return found


@pytest.fixture
def uninterrupted(mixed, prepared) -> list[list[str]]:
    return run(mixed, prepared, 60)


def test_read_steps_equal_random_access(mixed, prepared, uninterrupted):
    loader = Loader(mixed, prepared, batch_rows=ROWS)
    for step in (59, 0, 31, 7):
        assert loader.row_hashes(step) == uninterrupted[step]


@pytest.mark.parametrize("cuts", [[1], [7, 13, 29], [30, 31, 33]])
def test_interrupted_and_resumed_equals_uninterrupted(mixed, prepared, uninterrupted, cuts):
    found, state = [], {"step": 0}
    for stop in [*cuts, 60]:
        loader = Loader(mixed, prepared, batch_rows=ROWS, start_step=state["step"])
        if found:
            assert loader.check_state(state) == []
        found += [row_hashes(batch) for _, batch in islice(loader, stop - loader.step)]
        state = json.loads(json.dumps(loader.state()))  # as a checkpoint keeps it
        loader.close()
    assert found == uninterrupted


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_together_read_the_rows_of_one(mixed, prepared, uninterrupted, processes):
    each = ROWS // processes
    parts = [
        run(mixed, prepared, 20, start_step=3, rows=slice(p * each, (p + 1) * each)) for p in range(processes)
    ]
    together = [[row for part in step for row in part] for step in zip(*parts, strict=True)]
    assert together == uninterrupted[3:23]


@pytest.mark.parametrize(("threads", "workers"), [(0, 0), (1, 0), (4, 0)])
def test_threads_do_not_change_the_order(mixed, prepared, uninterrupted, threads, workers):
    changed = dataclasses.replace(mixed, read_threads=threads, read_workers=workers, prefetch=3)
    assert run(changed, prepared, 60) == uninterrupted


def test_worker_processes_do_not_change_the_order(config, prepared):
    workers = dataclasses.replace(config, read_workers=2, read_threads=1, prefetch=2)
    assert run(workers, prepared, 9, start_step=2) == run(config, prepared, 9, start_step=2)


def test_another_process_on_this_machine_sees_the_same_hashes(config, prepared):
    script = f"""
import json
from maxstack.config import UserError
from maxstack.data.config import *
from maxstack.data.batches import Batches
from maxstack.data.prepare import prepare
config = {config!r}
batches = Batches(config, prepare(config), batch_rows={ROWS})
print(json.dumps([batches.row_hashes(step) for step in (0, 11)]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=_root(),
    )
    assert json.loads(done.stdout) == [
        Loader(config, prepared, batch_rows=ROWS).row_hashes(s) for s in (0, 11)
    ]


def _root() -> str:
    from pathlib import Path

    return str(Path(__file__).resolve().parents[2])


def test_seed_batch_and_length_each_change_the_order(config, prepared):
    base = Loader(config, prepared, batch_rows=ROWS).row_hashes(0)
    assert Loader(dataclasses.replace(config, seed=1), prepared, batch_rows=ROWS).row_hashes(0) != base
    assert Loader(config, prepared, batch_rows=ROWS, seq_len=16).row_hashes(0) != base
    assert len(Loader(config, prepared, batch_rows=ROWS + 1).row_hashes(0)) == ROWS + 1


def test_the_hash_sees_every_part_of_a_row(config, prepared):
    batch = Loader(config, prepared, batch_rows=2).batch(0)
    before = row_hashes(batch)
    for name in Batch._fields:
        part = getattr(batch, name).copy()
        part[1, 3] += 1
        after = row_hashes(batch._replace(**{name: part}))
        assert after[0] == before[0]
        assert after[1] != before[1]


def test_no_segment_or_label_crosses_a_document(mixed, prepared):
    """In the tokens of real text: a label is the token that follows in the prepared document."""
    tokenizer = prepared.tokenizer
    documents = {
        tuple(s.train.document(d).tolist())
        for s in prepared.sources.values()
        for d in range(s.train.documents)
    }
    loader = Loader(mixed, prepared, batch_rows=ROWS, seq_len=64)
    checked = 0
    for step in range(12):
        for tokens, labels, segments, positions, weights in zip(*loader.batch(step), strict=True):
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                assert positions[inside].tolist() == list(range(inside.sum()))
                run_of = [*tokens[inside].tolist(), *labels[inside][-1:][weights[inside][-1:] > 0].tolist()]
                # The segment, with its last label, is a run within one document.
                assert any(contains(document, run_of) for document in documents)
                if run_of[0] == tokenizer.bos_id:
                    checked += 1
                assert run_of[1:] == labels[inside][weights[inside] > 0].tolist()
    assert checked > 10


def contains(document: tuple[int, ...], run_of: list[int]) -> bool:
    first = run_of[0]
    return any(
        document[i : i + len(run_of)] == tuple(run_of)
        for i in range(len(document) - len(run_of) + 1)
        if document[i] == first
    )


def test_resuming_far_into_a_run_takes_less_than_a_second(mixed, prepared):
    start = time.perf_counter()
    loader = Loader(mixed, prepared, batch_rows=ROWS, start_step=10**6)
    step, batch = next(loader)
    elapsed = time.perf_counter() - start
    loader.close()
    assert step == 10**6
    assert row_hashes(batch) == loader.row_hashes(10**6)
    assert elapsed < 1


def test_the_position_can_be_set(config, prepared):
    loader = Loader(config, prepared, batch_rows=ROWS)
    next(loader)
    for step in (30, 2):
        loader.step = step
        found, batch = next(loader)
        assert (found, loader.step) == (step, step + 1)
        assert row_hashes(batch) == loader.row_hashes(step)
    loader.close()


def test_epochs_count_how_often_a_source_was_read(config, prepared):
    loader = Loader(config, prepared, batch_rows=ROWS)
    rows = prepared.sources["plays"].train.tokens // config.seq_len
    assert loader.batches.epochs(100)["plays"] == pytest.approx(100 * ROWS * 0.75 / rows, rel=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 5}, "seed was 0, is 5"),
        ({"packing": "best_fit"}, "packing was 'concat', is 'best_fit'"),
        ({"seq_len": 16}, "seq_len was 32, is 16"),
        ({"stages": STAGES}, "stages was"),
    ],
)
def test_resuming_in_another_order_is_refused_or_told(config, prepared, change, words):
    state = Loader(config, prepared, batch_rows=ROWS).state()
    other = Loader(dataclasses.replace(config, **change), prepared, batch_rows=ROWS)
    with pytest.raises(UserError, match=words):
        other.check_state(state)
    [told] = other.check_state(state, allow_changes=True)
    assert words in told


def test_resuming_with_another_batch_data_or_tokenizer_is_refused(config, prepared, corpus, tmp_path):
    state = Loader(config, prepared, batch_rows=ROWS).state()
    with pytest.raises(UserError, match="batch_rows was 8, is 16"):
        Loader(config, prepared, batch_rows=16).check_state(state)
    with pytest.raises(UserError, match="version None"):
        Loader(config, prepared, batch_rows=ROWS).check_state({**state, "version": None})
    prepared.tokenizer.save(tmp_path / "tokenizer")
    sources = (dataclasses.replace(config.sources[0], held_out_fraction=0.3), config.sources[1])
    same = TokenizerConfig(path=str(tmp_path / "tokenizer"))
    changed = dataclasses.replace(config, sources=sources, tokenizer=same)
    with pytest.raises(UserError, match="sources was"):
        Loader(changed, prepare(changed), batch_rows=ROWS).check_state(state)
    other = dataclasses.replace(config, tokenizer=TokenizerConfig(path="bytes"))
    with pytest.raises(UserError, match="token ids would mean other text"):
        Loader(other, prepare(other), batch_rows=ROWS).check_state(state, allow_changes=True)


def test_impossible_loaders_are_refused(config, prepared, tmp_path):
    with pytest.raises(UserError, match="batch_rows 0"):
        Loader(config, prepared, batch_rows=0)
    with pytest.raises(UserError, match="8 global rows is empty"):
        Loader(config, prepared, batch_rows=8, rows=slice(8, 16))
    with pytest.raises(UserError, match=r"'plays' has \d+ train tokens in \d+ documents"):
        Loader(config, prepared, batch_rows=8, seq_len=10**6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sources": ()}, "at least one source"),
        ({"seq_len": 1}, "seq_len 1"),
        ({"prefetch": 0}, "prefetch 0"),
        (
            {"sources": (SourceConfig(name="a", path="x"), SourceConfig(name="a", path="y"))},
            "names must differ",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    given = {"sources": (SourceConfig(name="a", path="x"),), **settings}
    with pytest.raises(ValueError, match=words):
        DataConfig(**given)


def test_batches_are_what_a_step_takes(config, prepared):
    batch = Loader(config, prepared, batch_rows=ROWS).batch(0)
    assert [part.dtype for part in batch] == [np.int32] * 4 + [np.float32]
    assert all(part.shape == (ROWS, config.seq_len) for part in batch)
    assert batch.tokens.max() < prepared.tokenizer.vocab_size
