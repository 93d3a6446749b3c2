"""Routes under /manage/: adapters, weights, drain, profile. Only with the management key; without one they are 404."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from maxstack.config import UserError
from maxstack.serve.http.errors import ApiError
from maxstack.serve.operate.operation import Operation

LONGEST_PATH = 4096
LONGEST_PROFILE_S = 60.0


class Asked(BaseModel):
    """What a request may say, and nothing else."""

    model_config = ConfigDict(extra="forbid")


class NewAdapter(Asked):
    """An adapter in a folder of the server's."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:/-]+$")
    folder: str = Field(min_length=1, max_length=LONGEST_PATH)


class NewWeights(Asked):
    """A model of the same shape in a folder or file of the server's."""

    model: str = Field(min_length=1, max_length=LONGEST_PATH)
    step: int | None = Field(None, ge=0, le=10**12)
    averaged: bool = False


class Drain(Asked):
    """Finish what is under way, take nothing more, and leave."""


class Profile(Asked):
    """A trace of what the device does for a while, in a folder of the server's."""

    folder: str = Field(min_length=1, max_length=LONGEST_PATH)
    seconds: float = Field(5.0, ge=0.1, le=LONGEST_PROFILE_S)


def management(operation: Operation) -> APIRouter:
    """The routes. One change at a time."""
    router = APIRouter(prefix="/manage", tags=["management"])
    turn = asyncio.Lock()
    _adapters(router, operation, turn)
    _engine(router, operation, turn)
    return router


def _adapters(router: APIRouter, operation: Operation, turn: asyncio.Lock) -> None:
    """Adapters come and go."""

    def adapters() -> Any:
        return engine_of(operation, "adapters", "takes no adapters")

    @router.get("/adapters", summary="Names of the adapters that are loaded")
    async def listed() -> dict[str, Any]:
        return {"adapters": list(adapters().names())}

    @router.post("/adapters", summary="Load an adapter; nothing is compiled, nobody waits")
    async def loaded(new: NewAdapter) -> dict[str, Any]:
        folder = local(new.folder)
        async with turn:
            await asyncio.to_thread(adapters().load, new.name, folder)
        return {"adapters": list(adapters().names())}

    @router.delete("/adapters/{name:path}", summary="Forget an adapter")
    async def unloaded(name: str) -> dict[str, Any]:
        if name not in adapters().names():
            raise ApiError(404, f"there is no adapter {name!r}", code="not_found")
        async with turn:
            await asyncio.to_thread(adapters().unload, name)
        return {"adapters": list(adapters().names())}


def _engine(router: APIRouter, operation: Operation, turn: asyncio.Lock) -> None:
    """Weights, drain, profile."""

    @router.post("/weights", summary="Other weights of the same shape, between two steps")
    async def swapped(new: NewWeights) -> dict[str, Any]:
        place, swap = local(new.model), engine_of(operation, "swap_weights", "swaps no weights")
        async with turn:
            model = await asyncio.to_thread(read_model, place, new, operation)
            with _patience(operation):
                await swap(model)
        return {"model": str(place)}

    @router.post("/drain", summary="Finish what is under way, take nothing more, and leave with exit code 0")
    async def drained(new: Drain | None = None) -> dict[str, Any]:
        operation.draining = True
        operation.drain_asked.set()
        return {"status": "draining", "under_way": operation.under_way - 1}

    @router.post("/profile", summary="A trace of the device for some seconds (jax.profiler)")
    async def profiled(new: Profile) -> dict[str, Any]:
        if turn.locked():
            raise ApiError(409, "another change is under way", code="busy")
        async with turn:
            await asyncio.to_thread(profile, Path(new.folder), new.seconds)
        return {"folder": new.folder, "seconds": new.seconds}


def engine_of(operation: Operation, ability: str, lacks: str) -> Any:
    """What the engine can do. Raises ApiError where it cannot, or is not there yet."""
    if operation.engine is None:
        raise ApiError(503, "the engine is not there yet", code="starting")
    found = getattr(operation.engine, ability, None)
    if found is None:
        raise ApiError(400, f"this engine {lacks}", code="not_supported")
    return found


def local(place: str) -> Path:
    """Something on this machine; names that stand for something elsewhere are refused."""
    path = Path(place)
    if not path.exists():
        raise UserError(f"{place} is neither a folder nor a file of the server's: nothing is fetched")
    return path


def read_model(place: Path, new: NewWeights, operation: Operation) -> Any:
    """The model in a place, with its weights held as the first model's were."""
    from maxstack.models.load import load

    model, _ = load(place, step=new.step, averaged=new.averaged, **operation.loading)
    return model


def profile(folder: Path, seconds: float) -> None:
    """Trace for some seconds."""
    import jax

    try:
        jax.profiler.start_trace(str(folder))
    except (OSError, RuntimeError) as error:
        raise UserError(f"no trace can be made in {folder}: {error}") from error
    try:
        threading.Event().wait(seconds)
    finally:
        jax.profiler.stop_trace()


@contextlib.contextmanager
def _patience(operation: Operation) -> Iterator[None]:
    """The watchdog knows that something long is done between two steps."""
    if operation.watchdog is None:
        yield
        return
    with operation.watchdog.patient():
        yield
