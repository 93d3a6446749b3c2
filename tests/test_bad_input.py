"""What a user gets wrong, from the command line: exit code, message, no traceback."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from maxstack.config import log_faults_in
from maxstack.data.tokenizer import train_bpe
from maxstack.train import session
from maxstack.train.folder import alone_in
from tests.commands import STEPS, maxstack, refusal, write_run_file

Parts = Sequence[str]


@pytest.fixture(autouse=True)
def _no_fault_folder(tmp_path: Path) -> None:
    log_faults_in(tmp_path / "absent")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    return refusal(capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.py, its run, finished, in `run`, and its data in `cache`."""
    folder = tmp_path_factory.mktemp("finished")
    assert maxstack("train", write_run_file(folder)) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished / "run", tmp_path / "copied")
    return tmp_path / "copied"


# ------------------------------------------------------------------------------------------------- run files


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"def config(:\n", ["r.py:1: invalid syntax: def config(:"]),
        (b"x = 1\0", ["r.py: not Python", "null bytes"]),
        (b"x = '\xe9'\n", ["r.py:1", "utf-8"]),
        (b"once upon a time\n", ["r.py:1: invalid syntax"]),
        (b"import sys\nsys.exit(7)\n", ["r.py:2: SystemExit: 7"]),
        (b"def config():\n    return config()\n", ["r.py:2: RecursionError"]),
        (b"def config():\n    raise KeyError('k')\n", ["r.py:2: KeyError: 'k'"]),
        (b"config = None\n", ["no function config()"]),
        (b"import maxstack.data as d\ndef config():\n    return d.shakespeare()\n", ["a DataConfig", "a RunConfig"]),
    ],
)  # fmt: skip
def test_a_bad_run_file_is_refused_by_every_verb_that_reads_one(tmp_path, refused, content, parts):
    path = tmp_path / "r.py"
    path.write_bytes(content)
    refused(2, parts, "train", path)
    refused(2, parts, "inspect", path)


def test_no_run_file_is_answered_with_those_there_are(finished, tmp_path, refused):
    refused(2, ["usage: maxstack train RUN"], "train")
    refused(2, ["the run file comes first"], "train", "--steps", "3")
    refused(2, ["tini.py: no such run file; in that folder there is tiny.py"], "train", finished / "tini.py")
    refused(2, ["a folder, not a run file; in that folder there is tiny.py"], "train", finished)
    refused(2, ["holds no .py file"], "data", "prepare", tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------- settings

SETTINGS = [
    ("--optm.peak-lr 3", ["unknown --optm.peak-lr", "nearest known: --optim.peak-lr", "--help lists all"]),
    ("--steps abc", ["--steps: 'abc'", "expected int", "now 3"]),
    ("--steps", ["--steps: 'no value'"]),
    ("--steps -1", ["steps is -1: it must be at least 1"]),
    ("--steps 0", ["steps is 0"]),
    ("--out=", ["out is empty", "--out runs/NAME"]),
    ("--seed 99999999999999999999", ["seed is 99999999999999999999", "2**32 - 1"]),
    ("--z-loss nan", ["--z-loss: 'nan'", "expected float"]),
    ("--z-loss -1", ["z_loss is -1.0: it must not be negative"]),
    ("--optim.peak-lr -1", ["optim.peak_lr must be a positive number"]),
    ("--batch-rows 8 --micro-batches 3", ["batch_rows 8 must be a multiple of micro_batches 3"]),
    ("--batch-rows 7", ["batch of 7 rows does not divide over data x fsdp = 8 devices"]),
    ("--data.seq-len 128", ["data.seq_len 128 exceeds model.max_length 64", "raise model.max_length"]),
    ("--mesh.data 3 --mesh.fsdp 1", ["data 3 x fsdp 1", "takes 3 devices", "there are 8", "--mesh.*"]),
    ("--mesh.expert 2", ["mesh.expert is 2", "use 1"]),
    ("--mesh.fsdp 1 --mesh.tensor 8", ["2 does not divide by mesh tensor = 8", "--mesh.tensor"]),
    ("--model.stacks.0.pattern.0.attention.kv-heads 3", ["query heads 4 must be a multiple of kv heads 3"]),
    ("--model.vocab-size 128", ["tokenizer has 257 tokens, model.vocab_size is 128", "--model.vocab-size 320"]),
    ("--model.vocab-size 10000000000", ["out of memory before the first step", "GiB", "--model.vocab-size"]),
    ("--profile 5:2", ["telemetry.profile must be A:B", "'5:2'"]),
    ("--evaluation.every 0 --evaluation.overlap 32", ["evaluation.overlap 32", "data.seq_len 32"]),
    ("--evaluation.max-bytes 0", ["evaluation.max_bytes is 0: it must be at least 1"]),
    ("--samples.max-tokens 0", ["samples.max_tokens is 0"]),
    ("--samples.temperature nan", ["--samples.temperature: 'nan'"]),
    (f"--samples.every 0 --samples.prompts {'x' * 70}", ["has 71 tokens; give it 1 to 63", "--samples.every -1"]),
    ("--data.tokenizer.path /no/where", ["no tokenizer at /no/where", "tokenizer.json"]),
    ("--data.tokenizer.path= --data.tokenizer.vocab-size 9", ["tokenizer.vocab_size 9 must be at least 257"]),
    ("--data.sources.0.path=", ["source 'words': an empty path"]),
    ("--data.sources.0.encoding hex", ["source 'words'", "'hex' is not a text encoding"]),
    ("--data.sources.0.weight nan", ["--data.sources.0.weight: 'nan'"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), SETTINGS, ids=[words for words, _ in SETTINGS])
def test_a_setting_that_cannot_work_is_refused_before_anything_is_compiled(
    finished, tmp_path, refused, monkeypatch, words, parts
):
    monkeypatch.setattr(session, "compiled", None)
    refused(2, parts, "train", finished / "tiny.py", "--out", tmp_path / "out", *words.split())
    assert not list(tmp_path.rglob("metrics.jsonl"))


# ------------------------------------------------------------------------------------------------- text


def parquet(**columns: list) -> Callable[[Path], None]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


CORPORA: list[tuple[str, bytes | Callable[[Path], None], Parts]] = [
    ("empty.txt", b"", ["source 'words' is empty", "1 blank", "give it text"]),
    ("blank.txt", b" \n\t\n", ["source 'words' is empty"]),
    ("folder", Path.mkdir, ["holds no file of a known kind", ".jsonl"]),
    ("one.txt", b"all of it in one document", ["held_out_fraction 0.2", "split_documents_bytes"]),
    ("short.jsonl", b'{"text": "ab"}\n{"text": "c"}\n', ["fewer than one row of seq_len 32", "more text"]),
    ("bytes.txt", b"fine\nnot \xff fine\n", ["bytes.txt:2: byte 0xff is not valid utf-8", "invalid=replace"]),
    ("bytes.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["bytes.jsonl:2: byte 0xff"]),
    ("cut.jsonl", b'{"text": "a"}\n{"text": \n', ["cut.jsonl:2: not JSON", "invalid=skip"]),
    ("deep.jsonl", b"[" * 10**5 + b"\n", ["deep.jsonl:1: JSON that cannot be read", "invalid=skip"]),
    ("digits.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", ["digits.jsonl:1: JSON that cannot be read"]),
    ("list.jsonl", b'{"text": "a"}\n[1]\n', ["list.jsonl:2: a JSON list", "invalid=skip"]),
    ("body.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ["body.jsonl:2: no text", "keys are 'body'", "text_keys"]),
    ("null.jsonl", b'{"text": null}\n', ["null.jsonl:1: no text", "it is null"]),
    ("body.parquet", parquet(body=["a"]), ["no column 'text'", "it has body", "text_keys"]),
    ("null.parquet", parquet(text=["a", None]), ["null.parquet:2: no text in column 'text'", "invalid=skip"]),
    ("not.parquet", b"text", ["not.parquet: not a readable Parquet file"]),
    ("not.txt.gz", b"text", ["not.txt.gz: damaged or cut off compressed file"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "parts"), CORPORA, ids=[name for name, _, _ in CORPORA])
def test_text_that_cannot_be_used_is_named_by_file_and_line(
    finished, tmp_path, refused, name, content, parts
):
    path, out, cache = tmp_path / name, tmp_path / "out", tmp_path / "cache"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    words = [finished / "tiny.py", "--data.sources.0.path", path, "--data.cache", cache]
    text = refused(2, parts, "train", *words, "--out", out)
    assert f"the traceback is in {out / 'error.log'}" in text
    assert "UserError" in (out / "error.log").read_text()
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("no/where", ["neither a file nor a folder", str(Path.cwd())]),
        ("no/*.txt", ["no file matches 'no/*.txt'", str(Path.cwd())]),
        ("corpus:nope", ["no corpus is named 'nope'", "shakespeare"]),
        ("prepared:/no/where", ["/no/where is no prepared folder", "maxstack data prepare"]),
    ],
)
def test_text_that_is_not_there_is_said_with_where_it_was_looked_for(
    finished, tmp_path, refused, path, parts
):
    words = [finished / "tiny.py", "--data.sources.0.path", path]
    refused(2, parts, "train", *words, "--out", tmp_path / "out")


# ------------------------------------------------------------------------------------------------- other verbs

REQUESTS = [
    ("generate", 2, ["required: model"]),
    ("generate RUN x --temperature nan", 2, ["temperature is nan", "finite"]),
    ("generate RUN x --temperature -1", 2, ["temperature is -1.0"]),
    ("generate RUN x --max-tokens many", 2, ["--max-tokens", "'many'"]),
    ("generate RUN x --max-tokens 99", 2, ["2 tokens and max_tokens 99 exceed the model's 64", "shorten"]),
    ("generate RUN x --seed -1", 2, ["seed is -1", "2**32 - 1"]),
    ("generate RUN x --step 9", 2, ["no checkpoint of step 9", "there are [1, 2, 3]"]),
    ("generate RUN x --averaged", 2, ["keeps no average of the weights", "--optim.ema-decay"]),
    ("generate /no/where x", 2, ["/no/where: no such folder"]),
    ("generate RUN/tokenizer x", 2, ["there is no checkpoint in", "give a run folder"]),
    ("inspect /no/where", 2, ["/no/where: no such file or folder"]),
    ("inspect RUN/metrics.jsonl", 2, ["not something maxstack inspect knows", "a run folder"]),
    ("inspect RUN --step 99999999999999999999", 2, ["--step is 99999999999999999999"]),
    ("data nonsense", 2, ["'nonsense'", "prepare"]),
    ("data show RUN", 2, ["is no prepared folder", "maxstack data prepare"]),
    ("data prepare FILE --out=", 2, ["--out is empty"]),
    ("data prepare FILE --out FILE", 2, ["tiny.py cannot be made a folder: a file is in the way", "--out"]),
    ("data prepare FILE --out /proc/x", 2, ["/proc/x cannot be made a folder", "--out"]),
    ("data prepare FILE extra", 2, ["unexpected 'extra'"]),
    ("train FILE --out FILE", 2, ["tiny.py cannot be made a folder: a file is in the way", "--out"]),
    ("train FILE --out /dev/null/x", 2, ["/dev/null/x cannot be made a folder: Not a directory"]),
    (f"train FILE --out {'n' * 300}", 2, ["cannot be made a folder: File name too long"]),
]


@pytest.mark.parametrize(("words", "code", "parts"), REQUESTS, ids=[words[:50] for words, _, _ in REQUESTS])
def test_a_wrong_request_is_refused_with_what_to_ask_for(finished, refused, words, code, parts):
    places = {"RUN": str(finished / "run"), "FILE": str(finished / "tiny.py")}
    for name, place in places.items():
        words = words.replace(name, place)
    refused(code, parts, *words.split())


def test_a_prompt_that_is_refused_is_not_echoed(finished, capsys):
    assert maxstack("generate", finished / "run", "x" * 70) == 2
    assert capsys.readouterr().out == ""


def test_generate_starts_a_document_when_the_prompt_is_empty(finished):
    assert maxstack("generate", finished / "run", "", "--max-tokens", "1") == 0


# ------------------------------------------------------------------------------------------------- checkpoints


def flip(folder: Path, step: int) -> None:
    """Change one byte of the largest file of a checkpoint."""
    files = [path for path in (folder / "checkpoints" / f"{step:08}").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


def test_a_damaged_checkpoint_is_named_with_an_intact_one_and_training_goes_on_from_that(
    finished, copied, refused, caplog
):
    flip(copied, STEPS)
    refused(1, ["00000003 is damaged", "step 2 is intact", "--step 2"], "generate", copied, "x")
    assert maxstack("generate", copied, "x", "--max-tokens", "1", "--step", "2") == 0
    assert maxstack("train", finished / "tiny.py", "--out", copied) == 0
    assert (copied / "checkpoints" / "set_aside" / "00000003.0").is_dir()


def test_a_damaged_description_is_damage_and_not_another_wrong_thing(copied, refused):
    described = copied / "checkpoints" / "00000003" / "checkpoint.json"
    described.write_text(described.read_text().replace("BlockConfig", "BlackConfig"))
    refused(1, ["checkpoint.json has changed", "--step 2"], "generate", copied, "x")


def test_training_does_not_begin_anew_over_checkpoints_that_are_all_damaged(finished, copied, refused):
    for step in (1, 2, 3):
        flip(copied, step)
    before = (copied / "metrics.jsonl").read_bytes()
    refused(
        1,
        ["none of the checkpoints [1, 2, 3]", "another --out"],
        "train",
        finished / "tiny.py",
        "--out",
        copied,
    )
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(finished, copied, tmp_path, refused):
    train_bpe(["some other text"] * 9, 300).save(tmp_path / "other")
    again = ["train", finished / "tiny.py", "--out", copied, "--steps", "4"]
    parts = ["the checkpoint's tokenizer", "is not this run's", "Set data.tokenizer.path"]
    refused(2, parts, *again, "--data.tokenizer.path", tmp_path / "other")
    shutil.copytree(tmp_path / "other", copied / "tokenizer", dirs_exist_ok=True)
    refused(2, ["is not the tokenizer", "Put that one back"], "generate", copied, "x")


def test_a_second_process_is_kept_out_of_a_run(finished, copied, refused):
    with alone_in(copied):
        refused(
            2,
            ["another process trains into", "another --out"],
            "train",
            finished / "tiny.py",
            "--out",
            copied,
        )
