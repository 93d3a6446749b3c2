"""The training loop: for each batch step, then sometimes evaluate, sample, save."""

from collections.abc import Sequence

import jax

from maxstack.train.run import RunConfig
from maxstack.train.session import Outcome, Session
from maxstack.train.stop import StopRequest


def train(run: RunConfig, devices: Sequence[jax.Device] | None = None) -> Outcome:
    """Train `run` on `devices` (all), from its newest good checkpoint to its last step or a request to stop.

    Raises UserError for settings that cannot work, before anything is compiled; RunError when training fails.
    """
    with StopRequest() as stop, Session(run, devices) as session:
        for batch in session.batches():
            session.advance(batch)
            if session.due(run.evaluation.every):
                session.evaluate()
            if session.due(run.samples.every):
                session.sample()
            if session.due(run.checkpoint.save_every):
                session.save()
            if stop.requested():
                session.save(block=True)
                return session.outcome(stopped_by=stop.reason or "another process")
        session.finish()
        return session.outcome()
