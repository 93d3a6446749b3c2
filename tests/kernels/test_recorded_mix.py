"""The main loop that is found in a kernel's PTX, and what its instructions are said to allow."""

from collections import Counter

import pytest

from benchmarks import kernel_loops, kernel_mix

PTX = """.visible .entry paged_attention_mosaic_gpu_kernel(
    .param .u64 p
)
.reqntid 128
{
    .reg .b32 %r<9>;
    .loc 1 2 3
    add.f32 %f1, %f2, %f3;          // once, before
    @%p1 bra $L__BB0_9;
$L__BB0_1:                          // the loop
    {
        LAB_WAIT: mbarrier.try_wait.parity.shared.b64 P1, [%r1], %r2;
        @P1 bra.uni DONE;
        bra.uni LAB_WAIT;
        DONE:
    }
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2}, %rd1, %rd2, p, 1, 1;
    ex2.approx.ftz.f32 %f1, %f2;
    @%p2 bra $L__BB0_3;
    st.shared.v4.b32 [%r1], {%r1, %r2, %r3, %r4};   // in few turns
    bra.uni $L__BB0_3;
$L__BB0_3:
    {
        LAB_WAIT: mbarrier.try_wait.parity.shared.b64 P1, [%r1], %r2;
        @P1 bra.uni DONE;
        bra.uni LAB_WAIT;
        DONE:
    }
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2}, {%r1, %r2}, %rd2, p, 1, 1;
    cvt.rn.bf16x2.f32 %r1, %f1, %f2;
    cvt.rn.bf16x2.f32 %r1, %f1, %f2;
    @%p3 bra $L__BB0_1;
$L__BB0_9:
    mul.f32 %f1, %f2, %f3;          // once, behind
    ret;
}
"""


def test_what_stands_outside_of_the_loop_does_not_count_and_rare_parts_are_told_apart():
    (loop,) = kernel_loops.main_loops(PTX)
    assert loop.fewest["ex2.approx.ftz.f32"] == 1
    assert loop.fewest["cvt.rn.bf16x2.f32"] == 2
    assert loop.fewest["mbarrier.try_wait.parity.shared.b64"] == 2
    assert (loop.fewest["st.shared.v4.b32"], loop.most["st.shared.v4.b32"]) == (0, 1)
    assert not any(name in loop.most for name in ("add.f32", "mul.f32"))
    assert kernel_loops.flops_of(loop.fewest) == 2 * 2 * 64 * 8 * 16


def test_a_product_waits_for_operands_in_shared_memory_and_not_for_those_in_registers():
    (loop,) = kernel_loops.main_loops(PTX)
    units = kernel_mix.clocks(loop.fewest)
    # Rows of 32 bytes: 64 + 8 of the first, 8 of the second.
    assert units["tensor"] == (32 * 72 + 32 * 8) / 128
    assert units["exp"] == 8
    assert units["other"] == 4


def test_blocks_of_threads_share_the_units_and_wait_each_for_itself():
    """400 clocks of additions and 100 of exponentials a turn, 4,000 bytes: 10 a clock at once, of 19.9."""
    names = Counter(
        {"add.f32": 400, "ex2.approx.f32": 12, "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16": 1}
    )
    loop = kernel_loops.Loop(names, names)
    bytes_a_turn = 4000
    found = {"loops": [loop], "warpgroups": 1, "threads": 128, "registers": 168, "shared": 200_000}
    one = kernel_mix.bandwidth(found, bytes_a_turn / (64 * 16), None)
    two = kernel_mix.bandwidth(found | {"shared": 100_000}, bytes_a_turn / (64 * 16), None)
    assert one == {"B a turn": "4,000", "clocks a turn": "412 / 514", "bandwidth allowed": "49% / 39%"}
    assert two["clocks a turn"] == "412 / 412"


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("fma.rn.bf16x2", "float"), ("add.rn.f32", "float"), ("add.s32", "other"), ("mul.wide.s32", "other"),
        ("max.f32", "other"), ("shfl.sync.bfly.b32", "shuffle"), ("lop3.b32", "other"), ("bar.sync", "rest"),
        ("ld.shared.b32", "rest"), ("rcp.approx.f32", "exp"),
    ],
)  # fmt: skip
def test_each_instruction_has_its_unit(name, unit):
    lanes = kernel_mix.LANES_A_CLOCK
    units = kernel_mix.clocks(Counter({name: 1}))
    assert {each for each in lanes if units[each]} == {unit}
