"""Optimizers in float64 NumPy, written from their papers and independent of maxstack and optax.

Each takes gradients g_1 … g_T of one weight and gives the weight after T updates. `bug` plants a named mistake, with
which the tests show that their tolerances would catch it.
"""

from collections.abc import Sequence

import numpy as np


def adamw(w, grads: Sequence[np.ndarray], *, rates, b1, b2, eps, decay, bug="") -> np.ndarray:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, with decay times learning rate as in PyTorch."""
    w = w.astype(np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        g = g.astype(np.float64)
        if bug == "coupled decay":
            g = g + decay * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        power = 0 if bug == "no bias correction" else 1
        m_hat, v_hat = m / (1 - b1**t) ** power, v / (1 - b2**t) ** power
        step = m_hat / (np.sqrt(v_hat + eps) if bug == "eps inside the root" else np.sqrt(v_hat) + eps)
        w = w - lr * (step + (0 if bug == "coupled decay" else decay * w))
    return w


def lion(w, grads: Sequence[np.ndarray], *, rates, b1, b2, decay, bug="") -> np.ndarray:
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""
    w = w.astype(np.float64)
    m = np.zeros_like(w)
    if bug == "betas swapped":
        b1, b2 = b2, b1
    for g, lr in zip(grads, rates, strict=True):
        w = w - lr * (np.sign(b1 * m + (1 - b1) * g) + decay * w)
        m = b2 * m + (1 - b2) * g
    return w


def sgd(w, grads: Sequence[np.ndarray], *, rates, momentum, nesterov, decay, bug="") -> np.ndarray:
    """Polyak's or Nesterov's momentum in the form of Sutskever et al. 2013, with decoupled decay."""
    w = w.astype(np.float64)
    velocity = np.zeros_like(w)
    for g, lr in zip(grads, rates, strict=True):
        share = 1 - momentum if bug == "damped gradient" else 1.0
        velocity = momentum * velocity + share * g
        w = w - lr * ((g + momentum * velocity if nesterov else velocity) + decay * w)
    return w


def muon(
    w_io, grads: Sequence[np.ndarray], *, rates, momentum, nesterov, scale, decay, steps=5, bug=""
) -> np.ndarray:
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon) for one matrix, the iteration on singular values."""
    w = w_io.astype(np.float64)
    m = np.zeros_like(w)
    for g, lr in zip(grads, rates, strict=True):
        m = momentum * m + (1 - momentum) * g
        ahead = momentum * m + (1 - momentum) * g if nesterov and bug != "no look ahead" else m
        w = w - lr * (scale * orthogonalized(ahead, steps) + decay * w)
    return w


def orthogonalized(x, steps: int) -> np.ndarray:
    """The quintic applied to the singular values, which is what the matrix iteration does in exact arithmetic."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u * quintic(s / np.sqrt((s * s).sum()), steps)) @ vt


def quintic(s, steps: int) -> np.ndarray:
    """3.4445 s - 4.7750 s³ + 2.0315 s⁵, again and again."""
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def adafactor(w_io, grads: Sequence[np.ndarray], *, rates, exponent, clip, decay, bug="") -> np.ndarray:
    """Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4 without relative steps, for one matrix."""
    w = w_io.astype(np.float64)
    row, col = np.zeros(w.shape[0]), np.zeros(w.shape[1])
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        keep = 0.999 if bug == "constant decay" else 1 - t**-exponent
        square = g.astype(np.float64) ** 2 + 1e-30
        row = keep * row + (1 - keep) * square.mean(1)
        col = keep * col + (1 - keep) * square.mean(0)
        step = g / np.sqrt(np.outer(row, col) / (1.0 if bug == "not normalised" else row.mean()))
        step = step / max(1.0, np.sqrt((step**2).mean()) / clip)
        w = w - lr * (step + decay * w)
    return w
