"""The training loop: for each batch step, then sometimes evaluate, sample, save."""

from collections.abc import Sequence
from contextlib import ExitStack

import jax

from maxstack.train.run import RunConfig
from maxstack.train.session import Outcome, Session
from maxstack.train.stop import StopRequest


def train(
    run: RunConfig, devices: Sequence[jax.Device] | None = None, stop: StopRequest | None = None
) -> Outcome:
    """Train `run` on `devices` (all), from its newest good checkpoint to its last step or a request to stop.

    Raises UserError for settings that cannot work, before anything is compiled; RunError when training fails; Stopped
    when the request to stop comes before the first step. `stop` is a StopRequest entered by the caller.
    """
    with ExitStack() as open_until_the_end:
        stop = stop or open_until_the_end.enter_context(StopRequest())
        with stop.at_once():
            session = open_until_the_end.enter_context(Session(run, devices, stop))
        session.make_up()
        for batch in session.batches():
            session.advance(batch)
            if stop.requested():
                session.save(block=True)
                return session.outcome(stopped_by=stop.reason or "another process")
            if session.due(run.evaluation.every):
                session.evaluate()
            if session.due(run.samples.every):
                session.sample()
            if session.due(run.checkpoint.save_every):
                session.save()
        whole = session.finish()
        return session.outcome(stopped_by=None if whole else stop.reason or "another process")
