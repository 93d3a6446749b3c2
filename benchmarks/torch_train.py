"""The peer of `train_cpu.py`: the same transformer, optimizer and batch in PyTorch, eager or compiled.

Runs in any interpreter that has torch; prints one JSON object. Also used as a line server (`--serve`): each line on
standard input asks for one more timed step, so that two frameworks can take turns on one machine.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, one fused projection for q, k and v."""

    def __init__(self, d: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.splits = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.head_dim = head_dim
        self.qkv = nn.Linear(d, sum(self.splits), bias=False)
        self.out = nn.Linear(heads * head_dim, d, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q, k, v = (
            y.view(b, t, -1, self.head_dim).transpose(1, 2) for y in self.qkv(x).split(self.splits, dim=-1)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


def rotate(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class FeedForward(nn.Module):
    """SwiGLU, gate and up in one product."""

    def __init__(self, d: int, ff: int):
        super().__init__()
        self.gate_up = nn.Linear(d, 2 * ff, bias=False)
        self.down = nn.Linear(ff, d, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, shape: argparse.Namespace):
        super().__init__()
        self.norm_attention = nn.RMSNorm(shape.d, eps=1e-5)
        self.attention = Attention(shape.d, shape.heads, shape.kv_heads, shape.head_dim)
        self.norm_ff = nn.RMSNorm(shape.d, eps=1e-5)
        self.ff = FeedForward(shape.d, shape.ff)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm_attention(x), cos, sin)
        return x + self.ff(self.norm_ff(x))


class Transformer(nn.Module):
    """Llama-like decoder returning the mean cross-entropy of the next token."""

    def __init__(self, shape: argparse.Namespace, dtype: torch.dtype):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.d)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.d, eps=1e-5)
        self.head = nn.Linear(shape.d, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        angles = torch.outer(
            torch.arange(shape.length).float(),
            10000.0 ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim),
        )
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


class Run:
    """A model, its optimizer and the step that both frameworks do: loss, gradients, clip, AdamW."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(0)
        self.args = args
        self.dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        self.model = Transformer(args, self.dtype)
        decayed = [w for w in self.model.parameters() if w.dim() >= 2]
        rest = [w for w in self.model.parameters() if w.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
        ids = torch.randint(args.vocabulary, (args.accumulation, args.rows, args.length + 1))
        self.tokens, self.labels = ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
        self.loss = torch.compile(self.model) if args.mode == "compile" else self.model

    def step(self) -> float:
        total = 0.0
        for tokens, labels in zip(self.tokens, self.labels, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.args.dtype == "bf16"):
                loss = self.loss(tokens, labels) / self.args.accumulation
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("d", "layers", "heads", "kv-heads", "head-dim", "ff", "vocabulary", "length", "rows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--tied", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--mode", choices=("eager", "compile"), default="eager")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--serve", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    run = Run(args)
    first = run.step()
    for _ in range(args.warmup - 1):
        run.step()
    ready = time.perf_counter() - start
    # The highest resident size from here on is that of steps, not of compilation.
    Path("/proc/self/clear_refs").write_text("5")
    seconds, loss = [], first
    if args.serve:
        print(json.dumps({"ready": ready}), flush=True)
    for _ in sys.stdin if args.serve else range(args.steps):
        start, used = time.perf_counter(), time.process_time()
        loss = run.step()
        seconds.append(time.perf_counter() - start)
        if args.serve:
            print(json.dumps({"seconds": seconds[-1], "cpu_seconds": time.process_time() - used}), flush=True)
    tokens = args.accumulation * args.rows * args.length
    report = {
        "framework": f"torch {torch.__version__}",
        "mode": args.mode,
        "dtype": args.dtype,
        "parameters": sum(w.numel() for w in run.model.parameters()),
        "tokens_per_second": tokens / statistics.median(seconds) if seconds else None,
        "seconds": seconds,
        "first_loss": first,
        "last_loss": loss,
        "peak_rss_gib": status_kib("VmHWM") / 2**20,
        "lifetime_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "ready_seconds": ready,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
