"""A real server on a free port of this machine, in a thread, around a tiny model that writes letters."""

import dataclasses
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn

from maxstack.data.tokenizer import Tokenizer, byte_tokenizer
from maxstack.serve import AsyncEngine
from maxstack.serve.http import Operation, Settings, create_app, server_config
from maxstack.serve.plan import Limits
from tests.models.tiny import build
from tests.serve.driven import CONFIG, VOCAB

LETTERS = {str(token): -100.0 for token in range(VOCAB) if not 97 <= token < 123}
"""A logit_bias that leaves a byte model letters only: its text is what the tokens say."""
TEMPLATE = (
    "{% if tools %}tools{% for t in tools %} {{ t.function.name }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
LIMITS = Limits(
    rows=4,
    page=8,
    pages=128,
    max_length=256,
    chunks=((1, 16), (2, 32)),
    steps=(1, 4),
    tokens_a_step=68,
    waiting=12,
)
SETTINGS = Settings(model_name="tiny", aliases=("gpt-tiny",), chat_template=TEMPLATE)


def tiny_engine(
    tokenizer: Tokenizer | None = None, limits: Limits = LIMITS, buckets: tuple[int, ...] = (1, 4)
) -> AsyncEngine:
    """Ready to work."""
    tokenizer = tokenizer or byte_tokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    engine = AsyncEngine(build(config), tokenizer, limits=limits, buckets=buckets)
    engine.warm_up()
    return engine


def client_of(url: str) -> Any:
    """The unmodified client, asking once."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@contextmanager
def served(
    engine: AsyncEngine, settings: Settings = SETTINGS, operation: Operation | None = None, *, room: int = 0
) -> Iterator[str]:
    """The address of a server that runs until the end of the block. `room` is how many bytes the system holds for a
    client that does not read; by default what it likes."""
    with socket.socket() as own:
        if room:  # before they are made, connections take it over from here
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
        server = uvicorn.Server(server_config(create_app(engine, settings, operation=operation), settings))
        server.config.load()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
        thread.start()
        tick = threading.Event()
        for _ in range(1000):
            if server.started or not thread.is_alive():
                break
            tick.wait(0.01)
        assert server.started, "the server has not started"
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server has not stopped"


def settle(engine: AsyncEngine) -> None:
    """Wait until the engine is idle, and see that nobody holds a page."""
    tick = threading.Event()
    for _ in range(1000):
        if engine.scheduler.idle:
            break
        tick.wait(0.01)
    assert engine.scheduler.idle
    assert engine.scheduler.pages.available == engine.limits.pages
    assert not engine._open
