"""Decode steps compiled for chips that are not here: what moves is counted right, kept, and predicted from."""

import json
from functools import partial

import pytest

from maxstack.bench.command import main
from maxstack.bench.serve.recorded import SETTINGS, cost_of, kept, seconds, setting_of
from maxstack.bench.serve.step_bytes import of_kernel, step_bytes
from maxstack.config import UserError
from maxstack.plan.hlo import arrays, computations
from maxstack.plan.traffic import traffic
from maxstack.serve.cost import CHIPS
from maxstack.serve.plan import Decode, Plan
from maxstack.serve.request import Request
from tests.kernels.chips import needs_libtpu

# ruff: noqa: E501
PROGRAM = """HloModule small

%sliced (param_0: f32[4,256,128], param_1: s32[]) -> f32[256,128] {
  %param_0 = f32[4,256,128]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %constant.1 = s32[]{:T(128)} constant(0)
  %cut = f32[1,256,128]{2,1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %constant.1, %constant.1), dynamic_slice_sizes={1,256,128}
  ROOT %flat = f32[256,128]{1,0:T(8,128)} bitcast(%cut)
}

%condition (arg.1: (s32[], f32[4,256,128], f32[64,3,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,3,128]{2,1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %bound = s32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

%body (arg.2: (s32[], f32[4,256,128], f32[64,3,128])) -> (s32[], f32[4,256,128], f32[64,3,128]) {
  %arg.2 = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,3,128]{2,1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %stack = f32[4,256,128]{2,1,0:T(8,128)} get-tuple-element(%arg.2), index=1
  %pool = f32[64,3,128]{2,1,0:T(8,128)} get-tuple-element(%arg.2), index=2
  %own = f32[256,128]{1,0:T(8,128)S(1)} fusion(%stack, %i.2), kind=kLoop, calls=%sliced
  %kernel.7 = f32[64,3,128]{2,1,0:T(8,128)} custom-call(%pool, %own), custom_call_target="tpu_custom_call", metadata={op_name="known"}
  %zero = s32[]{:T(128)} constant(0)
  %row = f32[1,1,128]{2,1,0:T(8,128)S(1)} iota(), iota_dimension=2
  %put = f32[64,3,128]{2,1,0:T(8,128)} dynamic-update-slice(%kernel.7, %row, %i.2, %zero, %zero)
  ROOT %next = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,3,128]{2,1,0:T(8,128)}) tuple(%i.2, %stack, %put)
}

ENTRY %main (p0: f32[4,256,128], p1: f32[64,3,128]) -> f32[64,3,128] {
  %p0 = f32[4,256,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[64,3,128]{2,1,0:T(8,128)} parameter(1)
  %none = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}, /*index=2*/f32[64,3,128]{2,1,0:T(8,128)}) tuple(%none, %p0, %p1)
  %loop = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,3,128]{2,1,0:T(8,128)}) while(%begin), condition=%condition, body=%body
  %left = f32[64,3,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=2
  ROOT %copied = f32[64,3,128]{2,1,0:T(8,128)} copy(%left)
}
"""


def test_bytes_are_those_of_whole_tiles_in_hbm():
    (plain,) = arrays("f32[64,3,128]{2,1,0:T(8,128)}")
    assert (plain.bytes, plain.in_hbm) == (64 * 8 * 128 * 4, True)
    assert plain.part((1, 1, 128)) == 8 * 128 * 4
    (packed,) = arrays("s4[4,96]{1,0:T(32,128)(8,1)S(1)}")
    assert (packed.bytes, packed.in_hbm) == (32 * 128 // 2, False)
    (turned,) = arrays("bf16[128,3]{0,1:T(4,128)(2,1)}")
    assert turned.bytes == 4 * 128 * 2


def test_a_loop_counts_as_often_as_it_runs_slices_and_updates_for_what_they_touch():
    assert set(computations(PROGRAM)) == {"sliced", "condition", "body", "ENTRY"}
    calls = []

    def kernels(name, operands, results):
        calls.append((name, [None if one is None else one.shape for one in operands]))
        return 1000

    found = {one.name: (one.bytes, one.times) for one in traffic(PROGRAM, kernels)}
    pool = 64 * 8 * 128 * 4
    assert found == {
        "own": (
            4 * (256 * 128 * 4 + 4),
            4,
        ),  # each time the index and one layer of the stack, then on the chip
        "kernel.7": (4 * 1000, 4),
        "put": (4 * 2 * 8 * 128 * 4, 4),  # a row of a tile: the tile is read and written
        "copied": (2 * pool, 1),
    }
    assert calls == [("kernel.7", [(64, 3, 128), None])]


def test_kernels_move_the_pages_in_use_and_one_layer_of_a_stack():
    setting = setting_of("v6e-8b-int8", 16)
    pool, q = arrays("bf16[8192,8,128,128]{3,2,1,0:T(8,128)(2,1)}, bf16[16,8,4,128]{3,2,1,0:T(4,128)(2,1)}")
    out = arrays("f32[16,8,4,128]{3,2,1,0:T(4,128)S(1)}")
    count = partial(of_kernel, setting=setting)
    page = 8 * 128 * 128 * 2
    assert count("paged_attention.1", [None, q, pool, pool], out) == q.bytes + 2 * 16 * 16 * page
    # A page of values and a strip of 16 keys, both ways.
    assert count("append_token.2", [None, None, pool, pool], (pool, pool)) == 2 * 16 * (page + page // 8)
    values, scale = arrays("s8[32,1024,4096]{2,1,0:T(32,128)(4,1)}, f32[1,1,1024]{2,1,0:T(1,128)}")
    assert count("quantized_matmul.3", [None, None, values, scale], out) == 1024 * 4096 + 4096
    assert count("something_else", [pool], out) is None


def test_costs_are_those_of_the_kept_steps():
    for record in kept().values():
        cost = cost_of(record, of_bandwidth=1.0, of_products=1.0)
        for step in record["steps"]:
            request = Request(id="", prompt=(1,), arrived=0.0, max_tokens=9)
            rows = tuple(Decode(row, request, step["length"] + 1, 1) for row in range(step["rows"]))
            plan = Plan(0, (), (), (), None, rows, 1)
            # Rows between the fewest and the most are on no line exactly.
            assert cost.seconds(plan) == pytest.approx(seconds(record["chip"], step), rel=0.03)


def test_kept_steps_reach_the_goal():
    assert kept().keys() <= SETTINGS.keys()
    for record in kept().values():
        assert record["chip"] in CHIPS
        for step in record["steps"]:
            assert step["weights"] + step["cache"] >= 0.85 * step["moved"]


def test_a_kept_step_is_simulated_without_a_model(tmp_path, capsys):
    words = [
        "serve",
        "--simulate",
        "v6e-8b-int8",
        "--rate",
        "2",
        "--requests",
        "20",
        "--json",
        f"{tmp_path}/a",
    ]
    assert main(words) == 0
    assert "roofline, not measured" in capsys.readouterr().out
    row = json.loads((tmp_path / "a").read_text())
    # A step reads the weights, 7.5 GB, at 80 % of 1,640 GB/s at the least.
    assert 0.0057 < row["percentiles_s"]["tpot"]["p50"] < 0.02
    with pytest.raises(UserError, match="alone"):
        main([*words, "--model", "x"])


@pytest.mark.slow
@pytest.mark.tpu_aot
@needs_libtpu
def test_the_step_still_compiles_to_what_was_kept():
    step, _ = step_bytes(setting_of("v6e-8b-int8", 16))
    old = next(one for one in kept()["v6e-8b-int8"]["steps"] if one["rows"] == 16)
    assert step.useful > (old["weights"] + old["cache"]) / old["moved"] - 0.01
    assert step.memory < 1.01 * old["memory"]
