"""transformers' side of decode_cpu.py: a Llama of the same shape with random float32 weights; one turn a line."""

import json
import sys
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


class Theirs:
    def __init__(self, shape: dict):
        self.shape = shape
        config = LlamaConfig(
            vocab_size=shape["vocab_size"], hidden_size=shape["width"], num_hidden_layers=shape["depth"],
            num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
            head_dim=shape["head_size"], intermediate_size=shape["feed_forward"], tie_word_embeddings=True,
            max_position_embeddings=2048, rope_theta=1e5,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).float().eval()
        self.caches = {}

    @torch.inference_mode()
    def prefill(self, rows: int) -> None:
        ids = torch.randint(self.shape["vocab_size"], (rows, self.shape["cached"]))
        cache = DynamicCache(config=self.model.config)
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.caches[rows] = (cache, out.logits[:, -1:].argmax(-1))

    @torch.inference_mode()
    def decode(self, rows: int) -> None:
        cache, ids = self.caches[rows]
        if extra := cache.get_seq_length() - self.shape["cached"]:
            cache.crop(-extra)
        for _ in range(self.shape["tokens"]):
            ids = self.model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            ids.tolist()


theirs = Theirs(json.loads(sys.argv[1]))
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    what, rows = line.split()
    start = time.perf_counter()
    getattr(theirs, what)(int(rows))
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
