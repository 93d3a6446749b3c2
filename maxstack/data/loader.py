"""Batches in the order of steps, read ahead by Grain in threads or worker processes.

The loader adds nothing to what `Batches` computes but speed: its position is the step number, and iterating from step s
gives exactly `batch(s)`, `batch(s + 1)`, …
"""

from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

from maxstack.config import UserError
from maxstack.data.batch import Batch
from maxstack.data.batches import Batches
from maxstack.data.config import DataConfig
from maxstack.data.held_out import HeldOut
from maxstack.data.prepare import PreparedData

STATE_VERSION = 1
_STEPS = 2**40  # a length for Grain; no run gets there


class Loader:
    """Iterates `(step, Batch)` from `start_step` on, without end."""

    def __init__(
        self,
        config: DataConfig,
        prepared: PreparedData,
        *,
        batch_rows: int,
        seq_len: int | None = None,
        start_step: int = 0,
        rows: slice | None = None,
    ):
        """`batch_rows` rows in a step over all processes, of which this one reads `rows` (all, by default)."""
        self.config, self.prepared = config, prepared
        self.batches = Batches(config, prepared, batch_rows=batch_rows, seq_len=seq_len, rows=rows)
        self._step = start_step
        self._iterator: Any = None

    @property
    def step(self) -> int:
        """The step that comes next; set it to go on from another one."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if step != self._step:
            self.close()
        self._step = step

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._iterator is None:
            self._iterator = iter(self._dataset())
        batch = next(self._iterator)
        self._step += 1
        return self._step - 1, batch

    def _dataset(self) -> grain.IterDataset:
        threads, workers = self.config.read_threads, self.config.read_workers
        reading = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=self.config.prefetch if threads else 0
        )
        source = grain.MapDataset.source(_Steps(self.batches, self.step))
        dataset = source.to_iter_dataset(reading)
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which nobody parses here
            # Grain hands out steps to workers in turn and puts their batches back in order.
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=self.config.prefetch)
            )
        return dataset

    def batch(self, step: int) -> Batch:
        """This process's rows of any step, computed now."""
        return self.batches.batch(step)

    def row_hashes(self, step: int) -> list[str]:
        """One hash for each of this process's rows of a step."""
        return self.batches.row_hashes(step)

    def held_out_rows(self, source: str, **settings: Any) -> HeldOut:
        """All held-out rows of a source in order, with `.bytes`; see `HeldOut` for the settings."""
        defaults: dict[str, Any] = {"seq_len": self.batches.seq_len, "batch_rows": self.batches.batch_rows}
        return HeldOut(self.prepared.sources[source], **{**defaults, **settings})

    def state(self) -> dict[str, Any]:
        """The position, for a checkpoint: plain JSON, equal in every process."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "batch_rows": self.batches.batch_rows,
            "seq_len": self.batches.seq_len,
            "packing": self.config.packing,
            "seed": self.config.seed,
            "tokenizer": self.prepared.tokenizer.fingerprint,
            "sources": {name: source.fingerprint for name, source in self.prepared.sources.items()},
            "weights": {source.name: source.weight for source in self.config.sources},
            "stages": [[stage.step, stage.ramp_steps, dict(stage.weights)] for stage in self.config.stages],
        }

    def check_state(self, state: dict[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Compare a checkpoint's position with this loader; the differences that make it another order of samples.

        Raises UserError when there are any, unless `allow_changes`; a different tokenizer is never allowed.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"data position has version {state.get('version')}, this program reads {STATE_VERSION}"
            )
        mine = self.state()
        differences = [
            f"{key} was {state.get(key)!r}, is {mine[key]!r}"
            for key in mine
            if key not in ("version", "step") and state.get(key) != mine[key]
        ]
        if state["tokenizer"] != mine["tokenizer"]:
            raise UserError(
                f"the checkpoint's tokenizer ({state['tokenizer'][:12]}) is not this run's ({mine['tokenizer'][:12]}): "
                "token ids would mean other text. Set data.tokenizer.path to the folder saved with the run"
            )
        if differences and not allow_changes:
            raise UserError(
                "the data differ from the checkpoint's, so that steps would see other samples: "
                + "; ".join(differences)
                + ". Restore the old settings, or allow the change explicitly"
            )
        return differences

    def close(self) -> None:
        """Stop reading ahead."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None


class _Steps:
    """The steps from one on as a Grain source: element i is the batch of step `first + i`."""

    def __init__(self, batches: Batches, first: int):
        self._batches, self._first = batches, first

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, index: int) -> Batch:
        return self._batches.batch(self._first + index)
