"""SentencePiece models of every kind that is read, and what the sentencepiece library makes of hard_strings.json.

Run in an environment with sentencepiece (0.2.3 made these): python make_sentencepiece.py
"""

import io
import json
import os
import random
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
STRINGS = json.loads((HERE / "hard_strings.json").read_text())
# Texts of the project's own, so that the models can be given away.
CORPUS = [(HERE.parents[2] / "README.md").read_text(), *STRINGS] * 3
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
# Rules as a table of code points: full-width forms, ligatures, other spaces, and one of two letters.
RULES = "FF41\t61\nFF11\t31\nFB01\t66 69\n3000\t20\n9\t20\nA\t20\nC5\t61 61\n65 301\tE9\n337F\t682A 5F0F\n"
SYMBOLS = ["<user>", "<sep>", *(f"[UNUSED_TOKEN_{i}]" for i in range(140, 147))]
KINDS = {
    "bpe": {"model_type": "bpe", **PLAIN},
    "bpe_no_prefix": {
        "model_type": "bpe", **PLAIN, "add_dummy_prefix": False, "split_digits": True,
        "user_defined_symbols": [*SYMBOLS, "\n", "\n\n", "▁▁", "▁▁▁"], "pad_id": 3,
    },
    "bpe_symbols": {"model_type": "bpe", **PLAIN, "user_defined_symbols": SYMBOLS, "control_symbols": ["<mark>"]},
    "bpe_squeezed": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "bpe_rules": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_tsv": "rules.tsv"},
    "unigram": {"model_type": "unigram", **PLAIN, "control_symbols": ["<mark>"]},
    "unigram_rules": {"model_type": "unigram", "normalization_rule_tsv": "rules.tsv"},
}  # fmt: skip


def model_of(options: dict) -> bytes:
    made = io.BytesIO()
    lines = (line for text in CORPUS for line in joined(text).split("\n") if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=made, vocab_size=700, hard_vocab_limit=False,
        character_coverage=0.98, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return made.getvalue()


def joined(text: str) -> str:
    """Without lone halves of surrogate pairs, which no UTF-8 holds."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def decoded(processor: sentencepiece.SentencePieceProcessor, rng: random.Random) -> list:
    """Random ids, without the unknown one, and their text; 32 is the space that no text begins with as a byte."""
    usable = [
        i for i in range(processor.get_piece_size())
        if i != processor.unk_id() and processor.id_to_piece(i) != "<0x20>" and not processor.is_control(i)
    ]  # fmt: skip
    bytes_only = [i for i in usable if processor.is_byte(i)] or usable
    found = []
    for _ in range(40):
        ids = [rng.choice(bytes_only if rng.random() < 0.3 else usable) for _ in range(rng.randint(0, 8))]
        found.append([ids, processor.decode(ids)])
    return found


def main() -> None:
    os.chdir(HERE)  # the models hold the name of the file of rules: without a folder
    Path("rules.tsv").write_text(RULES)
    for name, options in KINDS.items():
        data = model_of(options)
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        ids = [processor.encode(joined(text)) for text in STRINGS]
        golden = {"ids": ids, "decoded": decoded(processor, random.Random(0))}
        (HERE / f"{name}.model").write_bytes(data)
        (HERE / f"{name}.json").write_text(
            json.dumps(golden, separators=(",", ":"), ensure_ascii=True) + "\n"
        )
    Path("rules.tsv").unlink()


if __name__ == "__main__":
    main()
