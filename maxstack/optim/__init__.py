"""Optimizers by name over flat dicts of named weights, learning-rate schedules, clipping, averaging.

optimizer = build(config.optim, run.steps, axes)
state = optimizer.init(params)
norm = global_norm(grads)
updates, state = optimizer.update(clip_by_norm(grads, norm, config.optim.clip_norm), state, params)
params = optax.apply_updates(params, updates)
"""

from maxstack.optim.adafactor import AdafactorConfig
from maxstack.optim.clip import clip_by_norm, global_norm
from maxstack.optim.ema import ema_update
from maxstack.optim.layout import decay_mask, matrix_dims, muon_dims
from maxstack.optim.muon import MuonConfig, newton_schulz, orthogonalize
from maxstack.optim.optimizers import OptimConfig, build, updates_applied
from maxstack.optim.schedules import Schedule, ScheduleConfig, learning_rate
from maxstack.optim.state_axes import state_axes

__all__ = [
    "AdafactorConfig",
    "MuonConfig",
    "OptimConfig",
    "Schedule",
    "ScheduleConfig",
    "build",
    "clip_by_norm",
    "decay_mask",
    "ema_update",
    "global_norm",
    "learning_rate",
    "matrix_dims",
    "muon_dims",
    "newton_schulz",
    "orthogonalize",
    "state_axes",
    "updates_applied",
]
