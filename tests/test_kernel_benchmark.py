"""benchmarks/kernels.py: what it says where there is no card, and what it makes of figures."""

import json
import sys

import pytest

from benchmarks import kernel_rows
from benchmarks import kernels as script
from maxstack.kernels import Unsupported


def test_without_a_card_every_row_is_not_measured(tmp_path, monkeypatch, capsys):
    file = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--json", str(file)])
    script.main()
    found = json.loads(file.read_text())
    assert {row["verdict"] for row in found["rows"]} == {"not measured: no GPU"}
    assert all(row["medians"] == {} for row in found["rows"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(found["rows"])
    assert all(line.endswith("| not measured: no GPU |") for line in lines)
    goals = {row["goal"] for row in found["rows"]}
    for goal in (
        "≥ 1 × the best peer", "≥ 0.95 × the best peer", "≥ 1.5 × the best peer", "≥ 80% of bandwidth",
        "≥ 70% of bandwidth", "≥ 2.4 × the best peer, ≥ 60% of bandwidth",
    ):  # fmt: skip
        assert goal in goals


def refuse():
    raise Unsupported("tokamax is not installed")


def row(goal, ours=2.0, peer=3.0, **more):
    contenders = {"ours": lambda: lambda: ours, "peer": lambda: lambda: peer, "tokamax": refuse}
    return script.Row(kernel="k", shape="s", goal=goal, contenders=contenders, **more)


@pytest.mark.parametrize(
    ("goal", "chip", "verdict"),
    [
        (script.Goal(peer=1.5), "sm90", "met"),
        (script.Goal(peer=1.6), "sm90", "missed"),
        (script.Goal(peer=1.5, bandwidth=0.51), "sm90", "missed"),
        (script.Goal(bandwidth=0.5), "sm90", "met"),
        (script.Goal(peer=1.6), "v5e", "measured; the goal is for Hopper, and this is v5e"),
        (script.Goal(), "sm90", "no goal"),
    ],
)
def test_goals_are_met_or_missed_by_what_was_measured(goal, chip, verdict):
    one = row(goal, bytes=10.0)
    told = script.told(one, script.measured(one, 3), memory=10.0, products=1.0, chip=chip)
    assert told["verdict"] == verdict
    assert (told["best_peer"], told["times_best_peer"], told["of_bandwidth"]) == ("peer", 1.5, 0.5)
    assert "tokamax not measured: tokamax is not installed" in script.table([told])


def test_no_peer_and_no_kernel_of_ours_are_no_figures():
    alone = script.Row(
        kernel="k", shape="s", goal=script.Goal(peer=1.0), contenders={"ours": lambda: lambda: 1.0}
    )
    told = script.told(alone, script.measured(alone, 1), memory=1.0, products=1.0, chip="sm90")
    assert told["verdict"] == "not measured: no peer took part"
    absent = script.Row(kernel="k", shape="s", goal=script.Goal(peer=1.0), contenders={"ours": refuse})
    told = script.told(absent, script.measured(absent, 1), memory=1.0, products=1.0, chip="sm90")
    assert told["verdict"] == "not measured: tokamax is not installed"


def test_peers_that_are_not_there_say_so():
    with pytest.raises(Unsupported, match="nonesuch is not installed"):
        kernel_rows.optional("nonesuch")
    with pytest.raises(Unsupported, match="no --torch-python"):
        kernel_rows.Torch("").attention(length=1)
