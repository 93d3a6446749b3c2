"""llama.cpp's side of decode_cpu.py: a float32 GGUF file, float32 cache, rows as sequences of one batch."""

import json
import os
import sys
import time

import llama_cpp as ll


class Theirs:
    def __init__(self, shape: dict, path: str):
        self.shape = shape
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8 * 640, 512, 512, 8
        params.n_threads = params.n_threads_batch = os.cpu_count()
        params.type_k = params.type_v = 0  # float32
        self.context = ll.llama_init_from_model(self.model, params)
        self.memory = ll.llama_get_memory(self.context)
        self.batch = ll.llama_batch_init(512, 0, 1)

    def run(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Entries (token, position, row, wants logits)."""
        self.batch.n_tokens = len(entries)
        for i, (token, position, row, logits) in enumerate(entries):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, position, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = row, logits
        if ll.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")

    def prefill(self, rows: int) -> None:
        ll.llama_memory_clear(self.memory, True)
        length = self.shape["cached"]
        for row in range(rows):
            self.run([(100 + i, i, row, i == length - 1) for i in range(length)])

    def decode(self, rows: int) -> None:
        length = self.shape["cached"]
        for row in range(rows):
            ll.llama_memory_seq_rm(self.memory, row, length, -1)
        for i in range(self.shape["tokens"]):
            self.run([(100 + i, length + i, row, True) for row in range(rows)])
            for row in range(rows):
                ll.llama_get_logits_ith(self.context, row)[0]


theirs = Theirs(json.loads(sys.argv[1]), sys.argv[2])
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    what, rows = line.split()
    start = time.perf_counter()
    getattr(theirs, what)(int(rows))
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
