"""Run by test_ray.py with a Python that has Ray: two replicas on this machine, asked through Ray's proxy."""

import concurrent.futures
import importlib
import json
import sys
import time
import urllib.request
from pathlib import Path


def ask(url: str, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def main(model: str, port: int, out: str) -> None:
    ray, serve = importlib.import_module("ray"), importlib.import_module("ray.serve")
    from maxstack.serve.ray_app import app

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = {"model": model, "name": "tiny", "replicas": 2, "rows": 2, "max_length": 32}
        serve.run(app(args), name="maxstack", route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        instances: set[str] = set()
        end = time.monotonic() + 60
        while len(instances) < 2 and time.monotonic() < end:
            instances.add(ask(url, "/version")["instance"])
        asked = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            texts = {
                answer["choices"][0]["text"]
                for answer in pool.map(lambda _: ask(url, "/v1/completions", asked), range(24))
            }
        found = {"instances": len(instances), "texts": len(texts), "ready": ask(url, "/ready")["status"]}
        Path(out).write_text(json.dumps(found))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
