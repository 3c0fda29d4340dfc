"""Requests get room for their states in the order in which they asked, each its own."""

import asyncio
from pathlib import Path

import pytest

from shared.errors import GenerationError
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.presets import write_random_checkpoint
from shared.state_room import StateRoom

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, "tiny", seed=5)
    return directory


@pytest.fixture
def engine(model: Path) -> Engine:
    """An engine with two slots and 256 tokens."""
    return Engine.load(model, "float32", threads=1, room=Room(slots=2, tokens=256))


async def take(room: StateRoom, tokens: int, name: str, served: list[str]) -> None:
    async with room.state(tokens):
        served.append(name)


async def turns_of_the_loop() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_request_waits_for_a_slot(engine: Engine) -> None:
    room, served = StateRoom(engine), list[str]()
    async with asyncio.TaskGroup() as tasks, room.state(10), room.state(10):
        tasks.create_task(take(room, 10, "third", served))
        await turns_of_the_loop()
        assert served == []
    assert served == ["third"]


async def test_a_long_request_is_not_passed_over_by_short_ones(engine: Engine) -> None:
    room, served = StateRoom(engine), list[str]()
    async with asyncio.TaskGroup() as tasks, room.state(200):
        tasks.create_task(take(room, 250, "long", served))
        await turns_of_the_loop()
        tasks.create_task(take(room, 10, "short", served))
        await turns_of_the_loop()
        assert served == []
    assert served == ["long", "short"]


async def test_a_request_that_is_cancelled_while_it_waits_lets_the_next_one_through(
    engine: Engine,
) -> None:
    room, served = StateRoom(engine), list[str]()
    async with asyncio.TaskGroup() as tasks, room.state(100):
        waiting = tasks.create_task(take(room, 250, "long", served))
        await turns_of_the_loop()
        tasks.create_task(take(room, 10, "short", served))
        await turns_of_the_loop()
        waiting.cancel()
        await turns_of_the_loop()
        assert served == ["short"]


async def test_a_request_that_never_fits_is_refused_with_both_sizes(engine: Engine) -> None:
    with pytest.raises(GenerationError, match="needs room for 257 tokens, this worker has 256"):
        async with StateRoom(engine).state(257):
            pytest.fail("there was room")


async def test_room_that_a_computation_uses_is_free_only_when_it_ends(engine: Engine) -> None:
    room, served = StateRoom(engine), list[str]()
    async with asyncio.TaskGroup() as tasks:
        async with room.state(200) as state:
            computing = state.in_use()
            computing.__enter__()
        tasks.create_task(take(room, 100, "next", served))
        await turns_of_the_loop()
        assert served == []
        await asyncio.to_thread(computing.__exit__, None, None, None)
    assert served == ["next"]


async def test_a_released_state_is_no_longer_computed_on(engine: Engine) -> None:
    state = engine.new_state(10)
    state.release()
    state.release()
    with pytest.raises(ValueError, match="released"):
        engine.prefill([[1, 2, 3]], [state])
    assert engine.has_room(256)
