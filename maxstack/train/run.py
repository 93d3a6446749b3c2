"""A training run as one configuration, and the checks that need no compilation."""

import dataclasses
import math
from collections.abc import Mapping

from maxstack.checkpoint import CheckpointConfig
from maxstack.config import UserError
from maxstack.data import DataConfig, Tokenizer
from maxstack.models import TransformerConfig
from maxstack.models.generate import prompt_ids
from maxstack.optim import OptimConfig
from maxstack.sharding import MeshConfig
from maxstack.telemetry import TelemetryConfig
from maxstack.train.losses import Objective, objective_of
from maxstack.train.step import SafetyConfig

AVERAGED = ".averaged"
"""What a source's name gets where its held-out loss is that of the averaged weights."""


def require_at_least(name: str, part: object, least: Mapping[str, int]) -> None:
    """Raise UserError for a field below its least value."""
    for field, bound in least.items():
        value = getattr(part, field)
        if not bound <= value < math.inf:
            raise UserError(f"{name}.{field} is {value}: it must be at least {bound}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Loss and bits per byte on held-out text, for each source."""

    every: int = 0
    """Steps between evaluations; 0 for only at the end, -1 for never."""
    max_bytes: int = 1 << 20
    """Held-out text used of each source, during the run (bytes)."""
    final_max_bytes: int = 1 << 24
    """Held-out text used of each source after the last step (bytes)."""
    overlap: int = 0
    """Tokens of a row that repeat the row before as context and are not counted (tokens)."""

    def __post_init__(self):
        require_at_least(
            "evaluation", self, {"every": -1, "max_bytes": 1, "final_max_bytes": 1, "overlap": 0}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text written by the model during training."""

    every: int = 0
    """Steps between samples; 0 for only at the end, -1 for never."""
    prompts: tuple[str, ...] = ("",)
    """What the samples continue."""
    max_tokens: int = 96
    """New tokens of each sample at most."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token."""

    def __post_init__(self):
        require_at_least("samples", self, {"every": -1, "max_tokens": 1, "temperature": 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run."""

    model: TransformerConfig
    """The model."""
    data: DataConfig
    """What it is trained on."""
    out: str = "runs/run"
    """Folder for checkpoints, metrics and samples."""
    steps: int = 1000
    """Length of the run (optimizer steps)."""
    seed: int = 0
    """Seed of the weights and of the run's random key; the data have their own."""
    batch_rows: int = 8
    """Rows of a step over all devices and micro-batches (rows of data.seq_len tokens)."""
    micro_batches: int = 1
    """Parts a step's batch is computed in, one after another, to save memory; divides batch_rows."""
    objective: str | Objective = "pretrain"
    """What is minimised: "pretrain", or in a run file a registered function of your own, (model, batch, z_loss) ->
    LossSums."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp in the loss (dimensionless); 1e-4 is usual."""
    optim: OptimConfig = OptimConfig()
    """Optimizer, learning rate, clipping, averaging."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each mesh axis."""
    safety: SafetyConfig = SafetyConfig()
    """Skipping of bad steps."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out loss during training."""
    samples: SampleConfig = SampleConfig()
    """Text written during training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and what to keep."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Metrics, display, profiler."""
    allow_changes: bool = False
    """Resume although data or settings differ from the checkpoint's."""

    def __post_init__(self):
        for name in ("steps", "batch_rows", "micro_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.out:
            raise UserError("out is empty: name the folder of the run, --out runs/NAME")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: it must be 0 to 2**32 - 1")
        if self.z_loss < 0:
            raise UserError(f"z_loss is {self.z_loss}: it must not be negative")
        if self.evaluation.overlap >= self.data.seq_len:
            raise UserError(
                f"evaluation.overlap {self.evaluation.overlap} must be less than data.seq_len {self.data.seq_len}"
            )
        objective_of(self.objective)
        if self.batch_rows % self.micro_batches:
            raise UserError(
                f"batch_rows {self.batch_rows} must be a multiple of micro_batches {self.micro_batches}"
            )
        if self.data.seq_len > self.model.max_length:
            raise UserError(
                f"data.seq_len {self.data.seq_len} exceeds model.max_length {self.model.max_length}: "
                "shorten the rows or raise model.max_length"
            )


def check_prompts(run: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError for a prompt that cannot be continued, which would else come out after the last step."""
    for prompt in run.samples.prompts if run.samples.every >= 0 else ():
        tokens = len(prompt_ids(tokenizer, prompt))
        if not 0 < tokens < run.model.max_length:
            raise UserError(
                f"samples.prompts: {prompt[:40]!r} has {tokens} tokens; give it 1 to {run.model.max_length - 1} "
                "(model.max_length is for the prompt and its continuation), or no samples with --samples.every -1"
            )


def check_vocabulary(run: RunConfig, tokens: int) -> None:
    """Raise UserError when the tokenizer has ids that the model has no row for."""
    if tokens > run.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokens} tokens, model.vocab_size is {run.model.vocab_size}: "
            f"set --model.vocab-size {-(-tokens // 64) * 64} or train a smaller tokenizer"
        )
