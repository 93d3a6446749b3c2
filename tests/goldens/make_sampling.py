"""Scores after transformers' logits processors, which tests/models/generation/test_sampling.py compares with.

OTHER/bin/python tests/goldens/make_sampling.py        (an interpreter that has torch and transformers)
"""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ROWS = [  # temperature, top_k, top_p, min_p, repetition penalty
    (0.7, 0, 1.0, 0.0, 1.0),
    (1.0, 5, 1.0, 0.0, 1.0),
    (1.3, 0, 0.8, 0.0, 1.0),
    (1.0, 0, 1.0, 0.1, 1.0),
    (1.0, 0, 1.0, 0.0, 1.5),
    (0.9, 20, 0.7, 0.05, 1.2),
    (2.0, 1, 0.5, 0.0, 0.8),
    (1.0, 300, 0.999, 0.001, 1.0),
]

rng = np.random.default_rng(0)
logits = (4 * rng.standard_normal((len(ROWS), 300))).astype(np.float32)
ids = rng.integers(0, 300, (len(ROWS), 12))
scores = []
for row, (temperature, top_k, top_p, min_p, repetition) in enumerate(ROWS):
    steps = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(repetition), TemperatureLogitsWarper(temperature)]
    )
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    scores.append(
        steps(torch.from_numpy(ids[row : row + 1]), torch.from_numpy(logits[row : row + 1]))[0].numpy()
    )
place = Path(__file__).parent / "sampling.npz"
np.savez_compressed(place, settings=np.asarray(ROWS), logits=logits, ids=ids, scores=np.stack(scores))
