"""llama.cpp's side of serve_cpu.py: its batch interface with continuous batching, as its server and llama-parallel
use it: decoding rows first, prompts in what is left of a batch.

    python llama_serve.py FILE.gguf UNIFIED TRACE AT_ONCE QUICK
"""

import json
import os
import statistics
import sys
import time

import llama_cpp as ll
import numpy as np

BATCH = 512


class Row:
    """A slot, and the request in it."""

    def __init__(self, number):
        self.number = number
        self.prompt = None

    def take(self, prompt, tokens, now):
        self.prompt, self.left = prompt, tokens
        self.read, self.length, self.begun, self.first, self.count = 0, 0, now, None, 0

    @property
    def decodes(self):
        return self.prompt is not None and self.read == len(self.prompt)


class Theirs:
    def __init__(self, path, unified, at_once, longest):
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        each = -(-longest // 256) * 256
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = (
            each * at_once,
            BATCH,
            BATCH,
            at_once,
        )
        params.n_threads = params.n_threads_batch = int(os.environ["MAXSTACK_BENCH_THREADS"])
        params.kv_unified = unified
        self.context = ll.llama_init_from_model(self.model, params)
        self.memory = ll.llama_get_memory(self.context)
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.batch = ll.llama_batch_init(BATCH, 0, 1)
        self.rows = [Row(i) for i in range(at_once)]

    def add(self, token, position, row, logits):
        i = self.batch.n_tokens
        self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, position, 1
        self.batch.seq_id[i][0], self.batch.logits[i] = row, logits
        self.batch.n_tokens = i + 1
        return i

    def step(self):
        """One batch; rows with new tokens."""
        self.batch.n_tokens, places = 0, {}
        for row in self.rows:
            if row.decodes:
                places[row] = self.add(row.token, row.length, row.number, True)
                row.length += 1
        for row in self.rows:
            while row.prompt is not None and row.read < len(row.prompt) and self.batch.n_tokens < BATCH:
                last = row.read == len(row.prompt) - 1
                place = self.add(row.prompt[row.read], row.length, row.number, last)
                row.read, row.length = row.read + 1, row.length + 1
                if last:
                    places[row] = place
        if ll.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        for row, place in places.items():
            logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, place), (self.vocabulary,))
            row.token = int(logits.argmax())
        return places

    def serve(self, asks):
        waiting, heard = list(reversed(asks)), []
        while waiting or any(row.prompt is not None for row in self.rows):
            for row in self.rows:
                if row.prompt is None and waiting:
                    row.take(*waiting.pop(), time.perf_counter())
            for row in self.step():
                now = time.perf_counter()
                row.first = row.first or now
                row.count, row.left = row.count + 1, row.left - 1
                if not row.left:
                    each = (now - row.first) / max(row.count - 1, 1)
                    heard.append((row.first - row.begun, each, row.count))
                    ll.llama_memory_seq_rm(self.memory, row.number, -1, -1)
                    row.prompt = None
        return heard


path, unified, trace, at_once, _ = sys.argv[1:]
with open(trace) as lines:
    asks = [(row["prompt"], row["output_tokens"]) for row in map(json.loads, lines)]
theirs = Theirs(path, unified == "1", int(at_once), max(len(prompt) + tokens for prompt, tokens in asks))
theirs.serve([([7, 8, 9, i], 8) for i in range(int(at_once))])
begun = time.perf_counter()
heard = theirs.serve(asks)
seconds = time.perf_counter() - begun
tokens = sum(count for _, _, count in heard)
print(json.dumps({
    "seconds": seconds, "output_tokens": tokens, "output_tokens_per_s": tokens / seconds,
    "ttft_s": statistics.median(first for first, _, _ in heard),
    "tpot_s": statistics.median(each for _, each, count in heard if count > 1),
}))  # fmt: skip
