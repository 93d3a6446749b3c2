import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.config import UserError
from maxstack.data.formats import Document, ReadCounts, find_files, read_documents, split_document


def read(source, counts=None):
    return list(read_documents(source, find_files(source.path), counts or ReadCounts()))


def test_one_document_a_text_file(source):
    [document] = read(source("one\r\ntwo\r\n"))
    assert document.text == "one\ntwo\n"
    assert document.origin.endswith("data.txt:1")


def test_separator_splits_and_lines_are_counted(source):
    documents = read(source("a\nb\n---\nc\n---\n\n---\nd", separator="\n---\n"))
    assert [(d.text, d.line) for d in documents] == [("a\nb", 1), ("c", 4), ("d", 8)]


def test_separator_is_found_across_read_blocks_and_dos_line_ends(source):
    text = "x" * (2**20 - 3) + "\r\n\r\n" + "y" * 2**20 + "\r\n\r\nz"
    documents = read(source(text, separator="\n\n", split_documents_bytes=0))
    assert [len(d.text) for d in documents] == [2**20 - 3, 2**20, 1]


def test_a_byte_order_mark_is_no_text(source):
    assert read(source(b"\xef\xbb\xbfhello"))[0].text == "hello"
    assert read(source(b'\xef\xbb\xbf{"text": "hello"}\n', "bom.jsonl"))[0].text == "hello"


def test_jsonl_reads_text_or_content_and_names_lines(source):
    rows = [{"text": "one"}, {"id": "7", "content": "two"}]
    documents = read(source("\n".join(map(json.dumps, rows)) + "\n\n", "rows.jsonl"))
    assert [(d.text, d.line) for d in documents] == [("one", 1), ("two", 2)]


def test_parquet_column(tmp_path, source):
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"id": [1, 2, 3], "body": ["one", None, "three"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    made = source(
        (tmp_path / "rows.parquet").read_bytes(), "copy.parquet", text_keys=("body",), invalid="skip"
    )
    counts = ReadCounts()
    assert [(d.text, d.line) for d in read(made, counts)] == [("one", 1), ("three", 3)]
    assert counts.skipped == 1
    with pytest.raises(UserError, match=r"no column 'text'.*id, body"):
        read(source((tmp_path / "rows.parquet").read_bytes(), "copy.parquet", text_keys=("text",)))
    with pytest.raises(UserError, match=r"copy\.parquet:2: no text"):
        read(source((tmp_path / "rows.parquet").read_bytes(), "copy.parquet", text_keys=("body",)))
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(source(b"PAR1 not really", "bad.parquet"))


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)]
)
def test_compressed_files(source, suffix, compress):
    content = compress(b'{"text": "one"}\n{"text": "two"}\n' * 50)
    assert len(read(source(content, f"rows.jsonl.{suffix}"))) == 100
    with pytest.raises(UserError, match=f"rows.jsonl.{suffix}: damaged or cut off"):
        read(source(content[: len(content) // 2], f"rows.jsonl.{suffix}"))


def test_zstandard_with_several_frames(source):
    import pyarrow

    codec = pyarrow.Codec("zstd")
    frame = codec.compress(b'{"text": "one"}\n' * 50, asbytes=True)
    assert len(read(source(frame * 2, "rows.jsonl.zst"))) == 100
    with pytest.raises(UserError, match=r"rows.jsonl.zst: damaged or cut off"):
        read(source(frame[: len(frame) // 2], "rows.jsonl.zst"))
    with pytest.raises(UserError, match=r"rows.jsonl.zst: damaged or cut off"):
        read(source(b"no zstandard at all", "rows.jsonl.zst"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": 1}', "it is int"),
        (b'{"body": "x", "id": 1}', "its keys are 'body', 'id'"),
        (b"{}", "its keys are none"),
        (b'["text"]', "a JSON list"),
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "\xff"}', "byte 0xff is not valid utf-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_jsonl_line_is_named_or_left_out(source, line, words):
    content = b'{"text": "good"}\n' + line + b'\n{"text": "also"}\n'
    with pytest.raises(UserError, match=words) as caught:
        read(source(content, "rows.jsonl"))
    assert "rows.jsonl:2" in str(caught.value)
    counts = ReadCounts()
    assert [d.text for d in read(source(content, "rows.jsonl", invalid="skip"), counts)] == ["good", "also"]
    assert counts.skipped == 1


def test_invalid_bytes_by_policy(source):
    content = b"first line\nsecond \xe9 line\n"
    with pytest.raises(UserError, match=r"data.txt:2: byte 0xe9 is not valid utf-8.*latin-1"):
        read(source(content))
    counts = ReadCounts()
    assert read(source(content, invalid="replace"), counts)[0].text == "first line\nsecond \ufffd line\n"
    assert counts.replaced == 1
    assert read(source(content, invalid="skip"), counts) == []
    assert counts.skipped == 1
    assert "é" in read(source(content, encoding="latin-1"))[0].text
    with pytest.raises(ValueError, match="unknown encoding: klingon"):
        read(source(content, encoding="klingon"))


def test_invalid_byte_after_a_separator_names_its_own_line(source):
    with pytest.raises(UserError, match=r"data.txt:4:"):
        read(source(b"a\n\nb\n\xff\n\nc", separator="\n\n"))


def test_blank_documents_are_counted(source):
    counts = ReadCounts()
    assert read(source(" \n\n", separator=""), counts) == []
    assert counts.empty == 1


def test_files_of_folders_and_globs_in_a_stable_order(tmp_path):
    for name in ("b.txt", "sub/a.jsonl", "a.md", "picture.png", "c.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [f.name for f in find_files(str(tmp_path))] == ["a.md", "b.txt", "c.jsonl.gz", "a.jsonl"]
    assert [f.name for f in find_files(f"{tmp_path}/*.txt")] == ["b.txt"]
    assert [f.name for f in find_files(f"{tmp_path}/**/*.jsonl")] == ["a.jsonl"]
    assert [f.name for f in find_files(f"{tmp_path}/picture.png")] == ["picture.png"]


def test_nothing_to_read_is_refused_by_name(tmp_path):
    for path, words in [
        ("none.txt", "neither a file nor a folder"),
        ("", "no file of a known kind"),
        ("*.x", "no file"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            find_files(f"{tmp_path}/{path}")
        assert str(tmp_path) in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab é\n", min_size=1, max_size=400), st.integers(8, 60))
def test_parts_of_a_document_join_to_it_and_are_about_the_limit(text, limit):
    parts = list(split_document(Document(text, "file", 5), limit))
    kept = [part.text for part in parts]
    # Parts of nothing but white space are left out; all else is there, in order.
    assert "".join("".join(kept).split()) == "".join(text.split())
    # A part has at most its share of characters, and a character here at most 2 bytes.
    assert all(len(part.text) <= limit for part in parts)
    at = 0
    for part in parts:
        at = text.index(part.text, at)
        assert part.line == 5 + text[:at].count("\n")
        at += len(part.text)


def test_parts_are_cut_after_blank_lines():
    text = "".join(f"verse {n}\nand more\n\n" for n in range(100))
    parts = [part.text for part in split_document(Document(text, "file", 1), 500)]
    assert "".join(parts) == text
    assert all(part.endswith("\n\n") for part in parts)
    assert max(map(len, parts)) <= 500
