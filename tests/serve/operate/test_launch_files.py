"""The dashboard and the manifest name what there is."""

import json
import re
from pathlib import Path

import yaml

from maxstack.processes import NAMES
from maxstack.serve.arguments import parser
from maxstack.serve.http.gate import OPEN
from maxstack.serve.operate.metrics import Traffic
from maxstack.serve.operate.operation import Operation
from maxstack.serve.operate.request_log import RequestLog
from tests.serve.operate.pretend import engine

LAUNCH = Path(__file__).resolve().parents[3] / "launch"


def test_every_metric_of_the_dashboard_exists(tmp_path):
    with engine() as (made, _):
        operation = Operation("tiny", requests=RequestLog(tmp_path / "log"))
        operation.attach(made)
        operation.metrics.traffic = Traffic(weight_bytes=1, peak=1e9)
        operation.metrics.http_requests.labels("/", "GET", "200").inc()
        operation.metrics.http_seconds.labels("/").observe(1)
        made.scheduler.counters.request_success["stop"] = made.scheduler.counters.admission_rejections[
            "full"
        ] = 1
        operation.phases.finish("")
        known = set(re.findall(r"^([a-zA-Z_:]+)", operation.metrics.text()[0].decode(), re.MULTILINE))
        operation.close()
    board = json.loads((LAUNCH / "grafana.json").read_text())
    texts = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    texts += [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    named = {name for text in texts for name in re.findall(r"(?:maxstack:|process_)[a-z_]+", text)}
    assert len(named) > 20
    assert named <= known, named - known


def test_panels_lie_side_by_side_and_have_ids_of_their_own():
    panels = json.loads((LAUNCH / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_manifest_s_command_probes_and_times_fit_the_server():
    documents = list(yaml.safe_load_all((LAUNCH / "serve_kubernetes.yaml").read_text()))
    [pod] = [each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment"]
    [server] = pod["containers"]
    assert server["args"][:2] == ["maxstack", "serve"]
    args = parser().parse_args(server["args"][2:])
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert (args.port, args.grpc_port) == (ports["http"], ports["grpc"])
    probes = {name: server[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["path"] for probe in probes.values()} == OPEN
    assert probes["liveness"]["path"] == "/health"
    assert all(probe["port"] == "http" for probe in probes.values())
    waits = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert waits + args.drain_seconds < pod["terminationGracePeriodSeconds"]
    mounted = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert str(args.api_key_file).startswith(mounted["keys"])
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}


def test_all_processes_of_several_hosts_are_started_alike_and_find_each_other():
    documents = yaml.safe_load_all((LAUNCH / "serve_hosts_kubernetes.yaml").read_text())
    [group] = [
        each["spec"]["leaderWorkerTemplate"] for each in documents if each["kind"] == "LeaderWorkerSet"
    ]
    leader, worker = (group[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    assert worker == {**leader, **dict.fromkeys(name for name in leader if name.endswith("Probe"))}
    assert all(f"{name}=$LWS_" in leader["command"][2] for name in NAMES)
    args = parser().parse_args(leader["args"][2:])
    assert args.tensor == group["size"] * leader["resources"]["limits"]["nvidia.com/gpu"]
    assert {leader[f"{probe}Probe"]["httpGet"]["path"] for probe in ("readiness", "liveness")} == OPEN
