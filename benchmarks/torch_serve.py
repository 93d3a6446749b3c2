"""transformers' side of serve_cpu.py: `generate` on static batches in the order of the trace, or its continuous
batching.

    python torch_serve.py FOLDER static|continuous TRACE AT_ONCE QUICK
"""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE = 64


@torch.inference_mode()
def static(model, asks, at_once):
    """Batches padded on the left; each runs until its longest answer is done."""
    tokens = 0
    for start in range(0, len(asks), at_once):
        batch = asks[start : start + at_once]
        width, longest = max(len(prompt) for prompt, _ in batch), max(count for _, count in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        model.generate(ids, attention_mask=mask, generation_config=config(longest))
        tokens += sum(count for _, count in batch)
    return tokens


def config(tokens, **more):
    return GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=None, do_sample=False, eos_token_id=None, pad_token_id=0, **more
    )


@torch.inference_mode()
def continuous(model, asks, at_once):
    """All requests are given at once, at most `at_once` run: its own scheduler decides."""
    # Sized by what the trace needs: by itself it takes most of the machine's memory, and is slower for it.
    longest = max(len(prompt) + count for prompt, count in asks)
    sizes = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=(-(-longest // PAGE) + 1) * at_once, max_batch_tokens=512,
        max_requests_per_batch=at_once, allow_block_sharing=False,
    )  # fmt: skip
    manager = model.init_continuous_batching(
        generation_config=config(max(count for _, count in asks)), continuous_batching_config=sizes
    )
    manager.start()
    try:
        left, under_way, tokens = list(reversed(asks)), 0, 0
        while left or under_way:
            while left and under_way < at_once:
                prompt, count = left.pop()
                manager.add_request(prompt, max_new_tokens=count)
                under_way += 1
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                under_way -= 1
                tokens += len(result.generated_tokens)
            if not manager.is_running():
                raise SystemExit("the manager of continuous batching has stopped")
        return tokens
    finally:
        manager.stop(block=True)


folder, kind, trace, at_once, _ = sys.argv[1:]
torch.set_num_threads(int(os.environ["MAXSTACK_BENCH_THREADS"]))
with open(trace) as lines:
    asks = [(row["prompt"], row["output_tokens"]) for row in map(json.loads, lines)]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
serve = static if kind == "static" else continuous
serve(model, [([7, 8, 9, i], 8) for i in range(int(at_once))], int(at_once))
begun = time.perf_counter()
tokens = serve(model, asks, int(at_once))
seconds = time.perf_counter() - begun
print(json.dumps({"seconds": seconds, "output_tokens": tokens, "output_tokens_per_s": tokens / seconds}))
