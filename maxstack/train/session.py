"""A run in progress: what the loop's verbs do."""

import collections
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from maxstack import sharding
from maxstack.checkpoint import Checkpoints
from maxstack.config import RunError, UserError, log_faults_in, run_text, to_dict, write_run
from maxstack.data.batch import Batch
from maxstack.data.loader import Loader
from maxstack.data.prepare import PreparedData, prepare
from maxstack.data.progress import shown
from maxstack.models.account import account
from maxstack.telemetry import Goodput, Profiler
from maxstack.train import state as states
from maxstack.train.agreement import VOTES, Ballots, with_votes
from maxstack.train.evaluate import HeldOutLoss, evaluate, evaluation_step
from maxstack.train.folder import alone_in
from maxstack.train.losses import objective_of
from maxstack.train.memory import check_state_fits
from maxstack.train.record import Recorder
from maxstack.train.resume import check_resumable, keeps_average, tell_changes
from maxstack.train.run import AVERAGED, RunConfig, check_prompts, check_vocabulary
from maxstack.train.sample import sample_texts
from maxstack.train.state import TrainState
from maxstack.train.step import Metrics, abstract_batch, compiled, train_step
from maxstack.train.stop import StopRequest

log = logging.getLogger(__name__)

# Finished steps kept to show what led to a stop.
HISTORY = 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    out: Path
    step: int
    """Steps done."""
    loss: float | None
    """Loss of the last recorded step."""
    stopped_by: str | None
    """The signal that ended the run before its last step."""


class Session:
    """Everything open during a run. `state` is the only thing a step changes."""

    def __init__(
        self, run: RunConfig, devices: Sequence[jax.Device] | None = None,
        stop: StopRequest | None = None,
    ):  # fmt: skip
        self.run, self.out, self._devices, self._stop = run, Path(run.out), devices, stop or StopRequest()
        self._closing = ExitStack()
        self.history: collections.deque[dict[str, Any]] = collections.deque(maxlen=HISTORY)
        self._late: tuple[int, Metrics] | None = None
        self._waited = 0.0
        self._ranked: tuple[int, dict[str, float]] = (0, {})
        self._began: int | None = None
        """The step of the checkpoint that this run goes on from."""

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.__exit__(kind, error, trace)

    def _open(self) -> None:
        run = self.run
        # What could not be written beside the first checkpoint is refused now.
        self._described, _ = to_dict(run), run_text(run)
        if jax.process_index() == 0:
            self._closing.enter_context(alone_in(self.out))
        log_faults_in(self.out)
        goodput = Goodput(self.out / "goodput.json")
        self.mesh = sharding.build_mesh(run.mesh, self._devices)
        self._micro_rows = run.batch_rows // run.micro_batches
        self._local = sharding.local_rows(self.mesh, self._micro_rows)
        self.plan = states.layout(run.model, run.optim, self.mesh, zero=run.mesh.zero, steps=run.steps)
        check_state_fits(self.plan, run.model)
        with shown() as report:
            self.prepared: PreparedData = prepare(run.data, report)
        check_vocabulary(run, self.prepared.tokenizer.vocab_size)
        check_prompts(run, self.prepared.tokenizer)
        check_ranking(run, self.prepared)
        self.checkpoints = self._closing.enter_context(Checkpoints(self.out / "checkpoints", run.checkpoint))
        self.loader = self._loader()
        self._closing.callback(lambda: self.loader.close())
        self.state, self.step = self._resumed_or_fresh()
        self.loader.step = self.step
        self._leave_word()
        shapes = {name: leaf.shape for name, leaf in self.plan.shapes.items()}
        costs = account(run.model, shapes, self.plan.axes, run.data.seq_len)
        self.recorder = self._closing.enter_context(Recorder(run, costs, goodput, start=self.step))
        self._profiler = self._closing.enter_context(Profiler(run.telemetry.profile, self.out / "profile"))
        with goodput.measure("compile"):
            objective = objective_of(run.objective)
            step = train_step(self.plan, objective, run.optim, run.safety, run.z_loss, run.steps)
            batch = abstract_batch(self.plan, run.micro_batches, self._micro_rows, run.data.seq_len)
            if jax.process_count() == 1:
                self._ballots = None
                self._advance = compiled(self.plan, step, batch, self.state)
            else:
                self._ballots = Ballots(self.mesh)
                ballot = (batch, self._ballots.abstract)
                self._advance = compiled(self.plan, with_votes(step), ballot, self.state)
        self.recorder.pause()
        self._evaluation = evaluation_step(self.plan)

    def _loader(self) -> Loader:
        # Row g of a step is row g // micro_batches of micro-batch g % micro_batches: a process's rows are contiguous.
        n = self.run.micro_batches
        rows = slice(self._local.start * n, self._local.stop * n)
        return Loader(self.run.data, self.prepared, batch_rows=self.run.batch_rows, rows=rows)

    def _resumed_or_fresh(self) -> tuple[TrainState, int]:
        """The newest good checkpoint, or a new state when there is none."""
        good = self.checkpoints.latest_good()
        if good is None and self.checkpoints.steps():
            raise RunError(
                f"none of the checkpoints {self.checkpoints.steps()} in {self.checkpoints.directory} is intact (see "
                "the warnings above); put back a copy, or start anew with another --out. Nothing was deleted"
            )
        if good is None:
            return states.create(self.plan, self.run.model, self.run.seed), 0
        self._began = good
        check_resumable(self.run, self.checkpoints.directory, good)
        like = self.plan.abstract(self.run.model)
        averaged = keeps_average(self.checkpoints.directory, good)
        if not averaged:
            like = like._replace(ema={})
        named, meta, _ = self.checkpoints.restore(good, states.as_named(like))
        tell_changes(meta["run"], self._described)
        for difference in self.loader.check_state(meta["data"], allow_changes=self.run.allow_changes):
            log.warning("resuming with other data: %s", difference)
        log.info("resumed from step %d of %s", good, self.checkpoints.directory)
        state = states.from_named(named, like)
        if self.plan.averaged and not averaged:
            log.warning("resuming: the average of the weights starts from those of step %d", good)
            state = states.with_average(self.plan, state)
        elif averaged and not self.plan.averaged:
            log.warning("resuming without optim.ema_decay: the average of the weights is given up")
        return state, good

    def _leave_word(self) -> None:
        """Write what makes the folder readable by itself: the resolved run and the tokenizer."""
        if jax.process_index() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            write_run(self.run, self.out / "run.py")
            self.prepared.tokenizer.save(self.out / "tokenizer")

    def batches(self) -> Iterator[Batch]:
        """The batches of the steps that are left, on their devices."""
        n, rows = self.run.micro_batches, self._micro_rows
        shape = (n, rows, self.run.data.seq_len)
        where = sharding.batch_sharding(self.mesh, leading=1)
        while self.step < self.run.steps:
            start = time.perf_counter()
            _, local = next(self.loader)
            parts = Batch(*(part.reshape(-1, n, part.shape[-1]).swapaxes(0, 1) for part in local))
            batch = sharding.global_arrays(where, parts, shape)
            waited = time.perf_counter() - start
            self._waited += waited
            self.recorder.goodput.add("data", waited)
            yield batch

    def advance(self, batch: Batch) -> None:
        """Start a step on the devices, then record the one before, whose results have come in the meantime."""
        self._profiler.before(self.step + 1)
        votes = self._ballots and self._ballots.vote(bool(self._stop.reason))
        self.state, metrics = self._advance(self.state, batch if votes is None else (batch, votes))
        for value in metrics.values():
            value.copy_to_host_async()  # under way while the step runs: read late, they cost no wait
        self.step += 1
        self._profiler.after(self.step, lambda: jax.block_until_ready(metrics))
        self._record_late()
        self._late = (self.step, metrics)
        self.checkpoints.check()

    def _record_late(self) -> None:
        if self._late is None:
            return
        (step, metrics), self._late = self._late, None
        # The waits since the row before, as its step time is counted.
        waited, self._waited = self._waited, 0.0
        results = {name: float(value) for name, value in metrics.items()}
        self._stop.agreed |= results.pop(VOTES, 0.0) > 0
        row = self.recorder.step(step, results, waited)
        self.history.append(row)
        if row["skipped_in_a_row"] >= self.run.safety.skip_limit:
            raise RunError(diverged(self.history, self.run.safety.skip_limit, self.checkpoints.latest_good()))

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is due after this step; the last step has its own time."""
        return every > 0 and self.step % every == 0 and self.step < self.run.steps

    def make_up(self) -> None:
        """What was due after the step that a run resumes from, if a stop came in between."""
        if self.step != self._began:
            return
        if self.due(self.run.evaluation.every) and not self.recorder.had("evaluation"):
            self.evaluate()
        if self.due(self.run.samples.every) and not self.recorder.had("sample"):
            self.sample()

    def evaluate(self, *, final: bool = False) -> bool:
        """Record held-out loss and bits per byte of each source that holds text out, with the averaged weights too
        where there are such; False when a stop broke it off."""
        wanted = self.run.evaluation
        losses = self._losses(wanted.final_max_bytes if final else wanted.max_bytes)
        if losses is None:
            return False
        self.recorder.evaluation(self.step, losses, final=final)
        if not final or wanted.every == 0:
            self._rank(losses)
        return True

    def _losses(self, max_bytes: int) -> dict[str, HeldOutLoss] | None:
        """By source, over at most so much of its held-out text; None when a stop broke it off."""
        self._record_late()
        losses = {}
        with self.recorder.goodput.measure("evaluate"):
            for name, source in self.prepared.sources.items():
                if not source.held_out.documents:
                    continue
                weights = {name: self.state.params}
                if self.plan.averaged:
                    weights[name + AVERAGED] = self.state.ema
                for label, params in weights.items():
                    rows = self.loader.held_out_rows(
                        name, batch_rows=self._micro_rows, rows=self._local, max_bytes=max_bytes,
                        overlap=self.run.evaluation.overlap,
                    )  # fmt: skip
                    loss = evaluate(
                        self._evaluation, self.plan, params, self.state.buffers, rows, self._stop.requested
                    )
                    if loss is None:
                        return None
                    losses[label] = loss
        self.recorder.pause()
        return losses

    def _rank(self, losses: Mapping[str, HeldOutLoss]) -> None:
        """What a checkpoint of this step is ranked by; a later one has other weights, and gets none of it."""
        self._ranked = self.step, {f"held_out.{name}": loss.nll for name, loss in losses.items()}

    def sample(self) -> None:
        """Let the model write."""
        self._record_late()
        with self.recorder.goodput.measure("sample"):
            for prompt, text in sample_texts(self.run, self.plan, self.state, self.prepared.tokenizer):
                self.recorder.sample(self.step, prompt, text)
        self.recorder.pause()

    def save(self, *, block: bool = False) -> None:
        """Save everything the run needs to go on; in the background unless `block`."""
        self._record_late()
        meta = {
            "run": self._described, "model": self._described["model"], "data": self.loader.state(),
            "tokenizer": self.prepared.tokenizer.fingerprint,
        }  # fmt: skip
        ranked_step, ranked = self._ranked
        metrics = dict(ranked) if ranked_step == self.step else {}
        if self.history:
            metrics["loss"] = self.history[-1]["loss"]
        with self.recorder.goodput.measure("save"):
            self.checkpoints.save(self.step, states.as_named(self.state), meta, metrics=metrics, block=block)
        self.recorder.pause()

    def finish(self) -> bool:
        """What is done once, after the last step; False when a stop broke it off, all but the save."""
        if self.step == self._began and self.recorder.had("final"):
            return True  # it is what the run before this one ended with
        wanted, whole = self.run.evaluation, True
        if wanted.every > 0 and self.run.checkpoint.keep_best:
            # On the text of the evaluations before, so that the last step is ranked with the others.
            losses = self._losses(wanted.max_bytes)
            self._rank(losses or {})
            whole = losses is not None
        whole = whole and (wanted.every < 0 or self.evaluate(final=True))
        self.save(block=True)
        if whole and self.run.samples.every >= 0:
            self.sample()
        return whole

    def outcome(self, stopped_by: str | None = None) -> Outcome:
        """How the run ended."""
        self._record_late()
        return Outcome(self.out, self.step, self.history[-1]["loss"] if self.history else None, stopped_by)


def check_ranking(run: RunConfig, prepared: PreparedData) -> None:
    """Raise UserError for a `best_metric` that no checkpoint of this run will have."""
    sources = [name for name, part in prepared.sources.items() if part.held_out.documents]
    kinds = ("", AVERAGED) if run.optim.ema_decay > 0 else ("",)
    names = ["loss", *(f"held_out.{name}{kind}" for name in sources for kind in kinds)]
    if run.checkpoint.keep_best and run.checkpoint.best_metric not in names:
        raise UserError(
            f"checkpoint.best_metric is {run.checkpoint.best_metric!r}; this run's checkpoints have {', '.join(names)}"
        )


def diverged(history: Iterable[dict[str, Any]], limit: int, good: int | None) -> str:
    """What led to a stop, for a person."""
    rows = "\n".join(
        f"  step {row['step']}: loss {row['loss']:.4g}, gradient norm {row['gradient_norm']:.4g}, "
        f"learning rate {row['learning_rate']:.3g}, skipped in a row {row['skipped_in_a_row']:.0f}"
        for row in history
    )
    return (
        f"{limit} updates in a row were skipped because loss or gradient norm was not finite or spiked:\n{rows}\n"
        f"Newest good checkpoint: {'none' if good is None else f'step {good}'}. Lower --optim.peak-lr, lengthen the "
        "warm-up, or raise --safety.spike-factor if the norm is only noisy"
    )
