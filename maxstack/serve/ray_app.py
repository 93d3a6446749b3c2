"""The server as a Ray Serve application: replicas of it, which Ray starts, watches, routes to and ends.

serve run maxstack.serve.ray_app:app model=smollm2-135m-instruct replicas=2
serve deploy launch/serve_ray.yaml

Arguments are those of `maxstack serve`, with _ for - ("max_length": 2048); of it, Ray has the address and the drain.
"""

import asyncio
import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from maxstack.config import UserError
from maxstack.models.compiled_cache import use_compiled_cache
from maxstack.serve.arguments import parser
from maxstack.serve.assemble import Parts
from maxstack.serve.http.app import create_app
from maxstack.serve.meaning import settings_of
from maxstack.serve.operate.phases import Phases

log = logging.getLogger(__name__)

NOT_HERE = (
    "host",
    "port",
    "grpc_port",
    "compile_only",
    "drain_seconds",
    "allow_no_key",
    "tls_cert",
    "tls_key",
)
OURS = {"replicas": 1, "accelerators": 0, "cpus": 1, "most_under_way": 256, "drain_seconds": 120}
"""What Ray is told: replicas, GPUs and CPUs of each, requests that one is sent at once, seconds for them to finish."""


class Replica:
    """One server without a socket: Ray hands it the requests."""

    def __init__(self, words: Sequence[str]):
        args = parser().parse_args(list(words))
        use_compiled_cache()
        self.parts = Parts(args, settings_of(args), Phases(log.info))
        self.engine = self.parts.begin()
        self.parts.operation.phases.finish("a replica answers")

    def __serve_build_asgi_app__(self) -> Any:
        """The application, as Ray asks for it."""
        return create_app(self.engine, self.parts.settings, operation=self.parts.operation)

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        well, told = self.parts.operation.health()
        if not well:
            raise RuntimeError(f"the engine is {told['status']}: {told['reason']}")

    async def __del__(self) -> None:
        """The last that Ray calls, when the requests are done."""
        self.parts.operation.draining = True
        await asyncio.to_thread(self.engine.close)
        await asyncio.to_thread(self.parts.operation.close)


def app(args: Mapping[str, Any]) -> Any:
    """The application, for `serve run` and `serve deploy`. Raises UserError for arguments that are none."""
    serve: Any = importlib.import_module("ray.serve")
    own = {name: type(default)(args.get(name, default)) for name, default in OURS.items()}
    words = words_of({name: value for name, value in args.items() if name not in OURS})
    deployment = serve.deployment(
        serve.ingress()(Replica), name="maxstack", num_replicas=own["replicas"],
        max_ongoing_requests=own["most_under_way"], graceful_shutdown_timeout_s=own["drain_seconds"],
        health_check_period_s=10, health_check_timeout_s=30,
        ray_actor_options={"num_cpus": own["cpus"], "num_gpus": own["accelerators"]},
    )  # fmt: skip
    return deployment.bind(words)


def words_of(args: Mapping[str, Any]) -> list[str]:
    """Arguments as the command line has them."""
    words: list[str] = []
    for name, value in args.items():
        if name in NOT_HERE:
            raise UserError(f"{name} is not for replicas: Ray has the address, and says who may ask it")
        flag = "--" + name.replace("_", "-")
        if value is True or value == "true":
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not False and value is not None:
            words.append(f"{flag}={value}")
    parser().parse_args(words)  # here, not in a replica far away
    return words
