"""The peer of `kernels.py`: PyTorch's scaled_dot_product_attention, causal, bfloat16, in its own process.

Each line on standard input is one turn: a JSON object with length, heads, kv_heads, size, backward and seconds. Answers
with the seconds of one call on the GPU, or why there are none.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F


def prepared(length, heads, kv_heads, size, backward, **_):
    """A call with its arrays in place: forward, or backward alone."""
    q, k, v = (
        torch.randn(1, n, length, size, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
        for n in (heads, kv_heads, kv_heads)
    )

    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    if not backward:
        return forward
    out = forward()
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)


def seconds(call, least):
    """Of one call, over as many as fill `least`."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(1, round(least / max(time.perf_counter() - start, 1e-9)))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def main():
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    kept = None, None
    for line in sys.stdin:
        spec = json.loads(line)
        if not torch.cuda.is_available():
            print(json.dumps({"declined": "torch finds no GPU"}), flush=True)
            continue
        try:
            if kept[0] != line:
                kept = None, None
                kept = line, prepared(**spec)
            answer = {"seconds": seconds(kept[1], spec["seconds"])}
        except RuntimeError as error:
            answer = {"declined": str(error).splitlines()[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
