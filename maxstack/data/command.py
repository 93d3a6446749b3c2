"""`maxstack data`: prepare training data, look at prepared folders, check them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxstack.config import UserError, load_run, override, result_folder
from maxstack.data.config import DataConfig
from maxstack.data.corpora import CORPORA
from maxstack.data.prepare import PreparedData, prepare, prepare_into
from maxstack.data.progress import shown
from maxstack.data.store import PreparedSource


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = argparse.ArgumentParser(prog="maxstack data", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    make = parts.add_parser("prepare", help="fetch, read and tokenise the sources of a recipe")
    make.add_argument(
        "recipe", help="run file whose config() gives a DataConfig, or a run that has one as `data`"
    )
    make.add_argument(
        "--out", help="folder for one prepared folder a source; without it they go into the cache"
    )
    make.epilog = (
        "More words override fields of the recipe, as in `maxstack train`: --tokenizer.vocab-size 8192"
    )
    for name, words in (
        ("show", "say what prepared folders hold"),
        ("verify", "compare every file's checksum"),
    ):
        part = parts.add_parser(name, help=words)
        part.add_argument("folders", nargs="+", type=Path)
    parts.add_parser("corpora", help="list the corpora that can be fetched by name")
    given, rest = parser.parse_known_args(argv)
    if rest and given.part != "prepare":
        raise UserError(f"maxstack data {given.part}: unknown words {' '.join(rest)}")
    if given.part == "prepare":
        _prepare(given.recipe, given.out, rest)
    elif given.part == "corpora":
        for name, corpus in CORPORA.items():
            print(f"corpus:{name}  {corpus.bytes / 1e6:.1f} MB in {corpus.files} files, {corpus.licence}")
    else:
        for folder in given.folders:
            source = PreparedSource(folder)
            if given.part == "verify":
                source.verify()
            print(
                describe(source) + ("\n  every file is as it was written" if given.part == "verify" else "")
            )
    return 0


def _prepare(recipe: str, out: str | None, overrides: list[str]) -> None:
    config: Any = override(load_run(recipe), overrides, f"maxstack data prepare {recipe}")
    if out == "":
        raise UserError("--out is empty: name a folder, or leave --out away to prepare into the cache")
    data = config if isinstance(config, DataConfig) else getattr(config, "data", None)
    if not isinstance(data, DataConfig):
        raise UserError(
            f"{recipe}: config() gives a {type(config).__name__}, neither a DataConfig nor a run with data"
        )
    with shown() as report:
        if out is None:
            prepared: PreparedData = prepare(data, report)
        else:
            prepared = prepare_into(data, result_folder(Path(out), "--out"), report)
    for source in prepared.sources.values():
        print(describe(source))


def describe(source: PreparedSource) -> str:
    """What a prepared folder holds, in a few lines."""
    tokenizer, read = source.meta["tokenizer"], source.meta["read"]
    lines = [f"{source.name}: {source.folder}"]
    for split in (source.train, source.held_out):
        per_token = f", {split.bytes / split.tokens:.2f} bytes a token" if split.tokens else ""
        lines.append(
            f"  {split.name:9} {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes{per_token}"
        )
    lines.append(f"  tokenizer {tokenizer['vocab_size']:,} tokens, {tokenizer['fingerprint'][:12]}")
    lines.append(f"  content   {source.fingerprint[:12]}")
    left_out = ", ".join(f"{count:,} {name}" for name, count in read.items() if count)
    return "\n".join([*lines, *([f"  documents {left_out}"] if left_out else [])])
