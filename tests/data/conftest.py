"""Small corpora for the data tests, made from a seed."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from maxstack.data.config import DataConfig, SourceConfig, TokenizerConfig
from maxstack.data.prepare import PreparedData, prepare

WORDS = "the of and to king thou love night sweet blood crown shall come speak heart death honour fool sea".split()


def sentences(seed: int, count: int) -> str:
    """Lines of words with a number here and there, so that texts differ."""
    rng = random.Random(seed)
    lines = (" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(count))
    return "".join(
        f"{line}, {rng.randint(0, 999)}.\n" + ("\n" if i % 7 == 6 else "") for i, line in enumerate(lines)
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 1 to 40 lines, as text files in a folder."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(sentences(number, 1 + (number * 7) % 40))
    return folder


@pytest.fixture(scope="session")
def second_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 documents in a JSONL file."""
    import json

    file = tmp_path_factory.mktemp("second") / "rows.jsonl"
    rows = ({"id": n, "content": sentences(1000 + n, 5 + n % 9)} for n in range(30))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def config(corpus: Path, second_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources, 3 to 1, rows of 32 tokens."""
    return DataConfig(
        sources=(
            SourceConfig(name="plays", path=str(corpus), weight=3.0, held_out_fraction=0.1),
            SourceConfig(name="poems", path=str(second_corpus), weight=1.0, held_out_fraction=0.2),
        ),
        tokenizer=TokenizerConfig(vocab_size=300),
        seq_len=32,
        cache=str(tmp_path_factory.mktemp("cache")),
    )


@pytest.fixture(scope="session")
def prepared(config: DataConfig) -> PreparedData:
    """The two sources, prepared once for all tests."""
    return prepare(config)


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., SourceConfig]:
    """A source with one file of the given bytes."""

    def make(content: bytes | str, name: str = "data.txt", **settings) -> SourceConfig:
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return SourceConfig(name="made", path=str(file), **settings)

    return make
