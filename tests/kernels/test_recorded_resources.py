"""What the compilers say of the kernels, beside what docs/kernels.md has on record of it."""

import json
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import kernel_programs, kernel_shapes, kernel_table
from benchmarks.kernel_table import TABLES, grown, measured, recorded, with_others
from maxstack.kernels import tiles
from maxstack.kernels.dispatch import Chip, compiling_for
from tests.kernels.chips import needs_cuda_compiler, needs_libtpu

QUICK = [
    ("tpu-attention", "v5e, 1B, 2048", "attention/mosaic_tpu_forward attention/mosaic_tpu_backward"),
    ("tpu-paged", "v5p, 70B, int4, 1", "paged_attention/mosaic_tpu"),
    ("tpu-paged", "v6e, 70B, int8, 256", "paged_attention/mosaic_tpu"),
    ("tpu-latents", "v5e, int4, 1", "paged_attention/mosaic_tpu"),
    ("tpu-latents", "v7x, bfloat16, 256", "paged_attention/mosaic_tpu"),
    ("tpu-append", "v5p, 8B, int8, 1", "paged_attention/mosaic_tpu_token"),
    ("tpu-append", "v6e, 8B, bfloat16, 512", "paged_attention/mosaic_tpu_append"),
    ("tpu-quantized", "v5e, 8B, int4-g128, 16", "quantized_matmul/mosaic_tpu"),
    ("tpu-quantized", "v7x, 8B, int4-g32, 4096", "quantized_matmul/mosaic_tpu"),
    ("tpu-quantized", "v7x, 1B, int8 × int8, 4096", "quantized_matmul/mosaic_tpu"),
    ("tpu-grouped", "v6e, Mixtral 8x7B, int8, 64", "grouped_matmul/mosaic_tpu"),
    ("tpu-grouped", "v7x, Qwen3-30B-A3B, bfloat16, 65536", "grouped_matmul/mosaic_tpu"),
    ("hopper-attention", "8B, none", "attention/mosaic_gpu_tile"),
    ("hopper-paged", "8B, int4, 1", "paged_attention/mosaic_gpu"),
    ("hopper-paged", "70B, bfloat16, 256", "paged_attention/mosaic_gpu"),
    ("hopper-latents", "bfloat16, 256", "paged_attention/mosaic_gpu_latent"),
    ("hopper-quantized", "8B, int8, 64", "quantized_matmul/mosaic_gpu"),
    ("hopper-quantized", "1B, int8 × int8, 16", "quantized_matmul/mosaic_gpu_int8"),
    ("hopper-grouped", "Mixtral 8x7B, bfloat16, 65536", "grouped_matmul/mosaic_gpu"),
    ("hopper-grouped", "Qwen3-30B-A3B, int4-g128, 64", "grouped_matmul/mosaic_gpu_quantized"),
]
"""Of each kernel and each form of it the cheapest row: table, key, and the files of kernels/ whose kernels are inside.
Where they cost the same the four TPUs take turns. Together half a minute of a core. The loss is XLA's on every
chip: its rows, seconds each, are left to the slow tests."""
MARKS = {
    "tpu": [needs_libtpu],
    "hopper": [needs_cuda_compiler],
    "cross": [needs_libtpu, needs_cuda_compiler],
}


def of(table):
    return MARKS[table.partition("-")[0]]


def key_of(table, values):
    """A key by its values."""
    (key,) = [key for key in TABLES[table].keys if ", ".join(key.values()) == values]
    return key


@pytest.mark.parametrize(
    ("table", "values"), [pytest.param(table, values, marks=of(table)) for table, values, _ in QUICK]
)
def test_kernels_take_no_more_than_recorded(table, values):
    rows = measured(table, key_of(table, values))
    assert rows
    assert grown(table, rows) == [], f"compiled with {kernel_table.compilers()}"


def test_each_run_compiles_a_row_of_every_kernel():
    kernels = kernel_table.ROOT / "kernels"
    written = {
        str(file.relative_to(kernels).with_suffix(""))
        for file in kernels.rglob("mosaic_*.py")
        if re.search(r"\b(pl\.pallas_call|plgpu\.kernel)\(", file.read_text())
    }
    assert written == {file for _, _, files in QUICK for file in files.split()}
    assert {table for table, _, _ in QUICK} == set(TABLES) - {"cross-entropy"}
    assert {key_of(*each[:2]).get("chip", "H200") for each in QUICK} == {*kernel_programs.CHIPS}


@pytest.mark.slow
@pytest.mark.parametrize("table", [pytest.param(name, marks=of(name)) for name in TABLES])
def test_no_kernel_takes_more_than_recorded(table):
    script = [sys.executable, kernel_table.__file__, table, "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("table", TABLES)
def test_the_page_has_every_row_that_the_script_makes(table):
    rows = recorded(table)
    assert rows
    for key in TABLES[table].keys:
        assert any(row.items() >= key.items() for row in rows), key


@needs_libtpu
def test_a_larger_block_is_found_out():
    """A fault planted: twice the inputs a tile."""
    table, key = "tpu-quantized", key_of("tpu-quantized", "v5e, 8B, int4-g128, 16")
    function, arguments, _, _ = kernel_shapes.quantized_of(key["weights"], int(key["tokens"]), key["model"])
    with compiling_for(Chip("tpu", key["chip"])), tiles.asked() as requests:
        jax.eval_shape(lambda *each: function(*each), *arguments)
    (request,) = requests.values()
    with tiles.trying({request.key: {"inputs": 2 * request.current["inputs"]}}):
        (complaint,) = [each for each in grown(table, TABLES[table].measure(key)) if "VMEM" in each]
    assert complaint.startswith("tpu-quantized: v5e, 8B, int4-g128, 16: VMEM MiB ")


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_table, "PAGE", tmp_path / "page.md")
    rows = [row("8B", "int8", "1", spilled="0"), row("8B", "int4", "1", shared="100.0")]
    kernel_table.put("hopper-paged", kernel_table.table(rows) + "\n\nCompiled with something.")
    return rows


def row(model, pages, queries, registers="168", spilled="0", shared="64.0"):
    return {
        "model": model, "pages": pages, "queries": queries, "registers": registers, "spilled bytes": spilled,
        "shared KiB": shared, "peak allowed": "100% / 50%",
    }  # fmt: skip


def test_a_tenth_more_is_let_pass_and_beyond_it_is_told(page):
    assert recorded("hopper-paged") == page
    assert grown("hopper-paged", page) == []
    assert grown("hopper-paged", [row("8B", "int4", "1", shared="110.0", registers="160")]) == []
    assert grown("hopper-paged", [row("8B", "int4", "1", shared="110.2")]) == [
        "hopper-paged: 8B, int4, 1: shared KiB 100.0 -> 110.2"
    ]
    assert grown("hopper-paged", [row("8B", "int8", "1", spilled="4")]) == [
        "hopper-paged: 8B, int8, 1: spilled bytes 0 -> 4"
    ]
    assert grown("hopper-paged", [row("8B", "int8", "1", shared="-")]) == [
        "hopper-paged: 8B, int8, 1: shared KiB 64.0 -> -"
    ]
    assert grown("hopper-paged", [row("8B", "int8", "256")]) == [
        "hopper-paged: 8B, int8, 256 is not on the page"
    ]


def test_some_rows_are_written_and_the_others_stay_in_their_order(page):
    new = [row("1B", "int4", "256"), row("8B", "int8", "1", shared="70.0")]
    merged = with_others("hopper-paged", new)
    assert merged == [new[0], new[1], page[1]]


def test_rows_are_taken_up_again_unless_a_source_changed(page, tmp_path, monkeypatch, capsys):
    made, told = [], []

    def measured_here(name, key):
        made.append(key)
        return [row(key["model"], key["pages"], key["queries"], shared="70.0")]

    class Process:
        """One that compiles here."""

        returncode = 0

        def __init__(self, command, **options):
            kernel_table.compile_here(command[2], json.loads(command[4]))
            found = capsys.readouterr()
            self.stdout = found.out.splitlines(keepends=True)
            told.extend(found.err.splitlines())

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(kernel_table, "measured", measured_here)
    monkeypatch.setattr(kernel_table.subprocess, "Popen", Process)
    keys, file = TABLES["hopper-paged"].keys[:3], tmp_path / "rows.jsonl"
    kernel_table.compile_rows("hopper-paged", keys[:2], 1, file)
    capsys.readouterr()
    assert len(kernel_table.compile_rows("hopper-paged", keys, 1, file)) == 3
    assert made == keys
    assert told == [f"hopper-paged: 2 rows are in {file}"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hopper-paged 3/3; 1B, int8, 1; ")
    assert line.endswith("; not on the page")
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(kernel_table, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_table, "MAKERS", ())
    (tmp_path / "kernels" / "tiles.json").write_text("{}")
    kernel_table.compile_rows("hopper-paged", keys[:1], 1, file)
    assert made == [*keys, keys[0]]
