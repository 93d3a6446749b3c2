"""A training step and the server's steps, compiled for chips that are not there: the kernels are inside, no pool is
copied, and docs/kernels.md says how often each kernel is called."""

from collections import Counter

import pytest

from benchmarks import kernel_whole
from benchmarks.kernel_whole import (
    CELL,
    Inside,
    apart,
    changed,
    compiled,
    faults,
    grouped,
    inside,
    keys,
    promised,
    recorded,
    words,
    write,
)
from tests.kernels.chips import needs_cuda_compiler, needs_libtpu

QUICK = {
    "program": "decode",
    "model": "dense",
    "weights": "int8",
    "cache": "int8",
    "chips": "1",
    "chip": "v6e",
}
TEXT = """HloModule step

%condition (arg.1: (s32[], bf16[8,2,128,128])) -> pred[] {
  %arg.1 = (s32[], bf16[8,2,128,128]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg.1), index=0
  %bound = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (arg.2: (s32[], bf16[8,2,128,128])) -> (s32[], bf16[8,2,128,128]) {
  %arg.2 = (s32[], bf16[8,2,128,128]{3,2,1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%arg.2), index=0
  %pool = bf16[8,2,128,128]{3,2,1,0} get-tuple-element(%arg.2), index=1
  %p.1 = bf16[8,2,128,128]{3,2,1,0} custom-call(%pool), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/while/body/append_token/pallas_call"}
  ROOT %next = (s32[], bf16[8,2,128,128]{3,2,1,0}) tuple(%i.2, %p.1)
}

%nobody (arg.3: bf16[8,2,128,128]) -> bf16[8,2,128,128] {
  ROOT %arg.3 = bf16[8,2,128,128]{3,2,1,0} parameter(0)
}

%asked (arg.4: bf16[8,2,128,128]) -> bf16[8,2,128,128] {
  %arg.4 = bf16[8,2,128,128]{3,2,1,0} parameter(0)
  ROOT %p.2 = bf16[8,2,128,128]{3,2,1,0} custom-call(%arg.4), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/cond/quantized_matmul/pallas_call"}
}

ENTRY %main (p0: bf16[8,2,128,128], p1: s32[]) -> bf16[8,2,128,128] {
  %p0 = bf16[8,2,128,128]{3,2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %begin = (s32[], bf16[8,2,128,128]{3,2,1,0}) tuple(%p1, %p0)
  %loop = (s32[], bf16[8,2,128,128]{3,2,1,0}) while(%begin), condition=%condition, body=%body
  %left = bf16[8,2,128,128]{3,2,1,0} get-tuple-element(%loop), index=1
  %kept = bf16[8,2,128,128]{3,2,1,0} conditional(%p1, %left, %left), branch_computations={%nobody, %asked}
  %turned = bf16[16,128,128]{2,1,0} bitcast(%kept)
  %copied = bf16[16,128,128]{1,2,0} copy(%turned)
  %k.1 = bf16[8,2,128,128]{3,2,1,0} custom-call(%copied), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(attention_backward))/pallas_call"}
  ROOT %k.2 = bf16[8,2,128,128]{3,2,1,0} custom-call(%k.1), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/attention_dkv/mpmd_map"}
}
"""  # noqa: E501


class Program:
    """A compiled program of this text."""

    def as_text(self):
        return TEXT

    def memory_analysis(self):
        class Sizes:
            temp_size_in_bytes = 7

        return Sizes()


def test_kernels_are_counted_as_often_as_they_run_and_a_pools_copies_found_in_any_shape():
    import jax.numpy as jnp

    found = inside(Program(), jnp.zeros((8, 2, 128, 128), jnp.bfloat16))
    assert found.kernels == {"append_token": 4, "attention_backward": 1, "attention_dkv": 1}
    assert [line.partition(" ")[0] for line in found.copies] == ["%copied"]
    assert inside(Program()).copies == []


def test_a_kernel_that_is_not_inside_and_a_copied_pool_are_told():
    whole = Inside(inside(Program()).kernels, [], 0)
    found = Inside(whole.kernels | {"paged_attention": 3, "quantized_matmul": 22}, [], 0)
    assert faults(QUICK, found) == []
    del found.kernels["paged_attention"]
    (said,) = faults(QUICK, found)
    assert said == "decode, dense, int8, int8, 1, v6e: paged_attention is not inside"
    assert "copies a pool" in faults(QUICK, whole._replace(copies=["%copied = …"]))[-1]


def test_a_step_that_copies_weights_is_told():
    kernels = Counter(append_token=3, paged_attention=3, quantized_matmul=22)
    assert faults(QUICK, Inside(kernels, [], 49, layer=100)) == []
    (said,) = faults(QUICK, Inside(kernels, [], 51_000_000, layer=100_000_000))
    assert said.endswith(
        "holds 51 MB beside what it is given, so that it copies weights: those of a layer are 100 MB"
    )
    assert faults(QUICK, Inside(kernels, [], 51)) == []  # a chunk's activations may be larger


def test_every_program_on_the_page_has_the_promised_kernels():
    rows = apart(recorded("whole"))
    assert rows
    for row in rows:
        said = {part.partition(" ")[0] for part in row[CELL].split(", ")}
        assert all(one & said for one in promised(row)), row


def test_chips_with_the_same_program_share_a_row_and_a_change_is_told(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("")
    monkeypatch.setitem(kernel_whole.put.__globals__, "PAGE", tmp_path / "page.md")
    found = Inside(inside(Program()).kernels, [], 0)
    write([QUICK | {CELL: words(found)}, QUICK | {"chip": "v5e", CELL: words(found)}])
    (row,) = recorded("whole")
    assert row["chip"] == "v5e, v6e"
    assert grouped(apart([row])) == [row]
    assert changed(QUICK, found) == []
    found.kernels["append_token"] += 1
    assert changed(QUICK, found)[0].endswith(
        "append_token 4, attention_backward 1, attention_dkv 1 -> " + words(found)
    )
    assert "not on the page" in changed(QUICK | {"chip": "v5p"}, found)[0]


def seen(key):
    found = compiled(key)
    assert faults(key, found) == []
    assert changed(key, found) == []


@needs_libtpu
def test_a_decode_step_has_the_kernels_of_the_page_inside_and_copies_no_pool():
    seen(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(
            key,
            id="-".join(key.values()),
            marks=needs_cuda_compiler if key["chip"] == "H200" else needs_libtpu,
        )
        for key in keys()
        if any(row.items() >= key.items() for row in apart(recorded("whole")))
    ],
)
def test_a_whole_program_has_the_kernels_of_the_page_inside_and_copies_no_pool(key):
    seen(key)
