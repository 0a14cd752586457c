"""The promises of `ActorRef` over Ray, and what only another process can do: die, be found."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path

import pytest
import ray

from aidb_ray.errors import AidbError, ConfigError, UnavailableError
from aidb_ray.runtime import ActorOptions, ActorRef, Cluster, RayRef, connect_cluster, find, spawn
from tests.unit.test_runtime_local import (
    ERRORS,
    Probe,
    StartProbe,
    test_a_call_does_not_see_the_context_of_its_caller,
    test_a_late_error_of_a_shielded_call_is_logged,
    test_a_shielded_call_outlives_its_cancelled_caller,
    test_a_shielded_call_outlives_its_time,
    test_arguments_and_answers_travel_by_value,
    test_ask_returns_what_the_method_returns,
    test_calls_interleave_at_awaits,
    test_cancelling_the_caller_cancels_the_method,
    test_errors_arrive_as_themselves,
    test_running_out_of_time_cancels_the_method_and_is_unknown,
    test_start_runs_unasked,
    test_stop_lets_the_actor_close_down_and_ends_it,
    until,
    until_event,
)

__all__ = [
    "test_a_call_does_not_see_the_context_of_its_caller",
    "test_a_late_error_of_a_shielded_call_is_logged",
    "test_a_shielded_call_outlives_its_cancelled_caller",
    "test_a_shielded_call_outlives_its_time",
    "test_arguments_and_answers_travel_by_value",
    "test_ask_returns_what_the_method_returns",
    "test_calls_interleave_at_awaits",
    "test_cancelling_the_caller_cancels_the_method",
    "test_errors_arrive_as_themselves",
    "test_running_out_of_time_cancels_the_method_and_is_unknown",
    "test_start_runs_unasked",
    "test_stop_lets_the_actor_close_down_and_ends_it",
]

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

REPOSITORY = Path(__file__).parents[2]


class UnsendableError(Exception):
    """Cannot be unpickled: its constructor wants something that pickle does not keep."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)


class Worker:
    """An actor that asks other actors, and whose process has properties."""

    def __init__(self, other: ActorRef[Probe] | None = None) -> None:
        self._other = other

    async def relay(self, left: str, right: str) -> str:
        assert self._other is not None
        return await self._other.ask(Probe.join, left, right=right)

    async def relay_to(self, other: ActorRef[Probe], left: str, right: str) -> str:
        return await other.ask(Probe.join, left, right=right)

    async def wait_through(self, *, shielded: bool) -> str:
        assert self._other is not None
        ask = self._other.ask_shielded if shielded else self._other.ask
        return await ask(Probe.pass_gate, "inner")

    async def fail_unsendably(self) -> None:
        raise UnsendableError(reason="of its own making")

    async def answer_unsendably(self) -> object:
        return threading.Lock()

    async def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    async def niceness(self) -> int:
        return os.nice(0)

    async def loop_module(self) -> str:
        return type(asyncio.get_running_loop()).__module__


class Broken:
    """An actor that cannot be constructed."""

    def __init__(self) -> None:
        raise OSError("no such thing")

    async def ping(self) -> None: ...


@pytest.fixture
def start_probe() -> StartProbe:
    async def start(diary: Path | None = None) -> ActorRef[Probe]:
        return await spawn(Probe, ActorOptions(), diary)

    return start


# A process takes a second or more to start, so tests that leave no mark share these two.
@pytest.fixture(scope="module")
def shared_probe(cluster: Cluster) -> Iterator[ActorRef[Probe]]:
    ref = asyncio.run(spawn(Probe, ActorOptions()))
    yield ref
    asyncio.run(ref.stop())


@pytest.fixture(scope="module")
def worker(cluster: Cluster) -> Iterator[RayRef[Worker]]:
    ref = asyncio.run(spawn(Worker, ActorOptions()))
    yield ref
    asyncio.run(ref.stop())


@pytest.fixture
async def probe(shared_probe: ActorRef[Probe]) -> ActorRef[Probe]:
    await until_event(shared_probe, "started")
    await shared_probe.ask(Probe.reset)
    return shared_probe


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4()}"


@pytest.fixture
async def named(name: str) -> AsyncIterator[RayRef[Probe]]:
    ref = await spawn(Probe, ActorOptions(name=name, detached=True))
    yield ref
    await ref.stop()


async def test_an_error_brings_its_remote_traceback(probe: ActorRef[Probe]) -> None:
    with pytest.raises(KeyError) as caught:
        await probe.ask(Probe.fail, [type(error) for error in ERRORS].index(KeyError))

    (note,) = caught.value.__notes__
    assert "Raised in Probe.fail in another process" in note
    assert "raise ERRORS[index]" in note


async def test_what_cannot_be_sent_is_told_in_words(worker: RayRef[Worker]) -> None:
    with pytest.raises(AidbError, match="UnsendableError: of its own making") as raised:
        await worker.ask(Worker.fail_unsendably)
    with pytest.raises(AidbError, match=r"cannot pickle '_thread\.lock'") as answered:
        await worker.ask(Worker.answer_unsendably)

    assert raised.value.code == answered.value.code == "remote_error"
    assert "raise UnsendableError" in raised.value.__notes__[0]


async def test_an_actor_that_could_not_start_still_answers() -> None:
    failed = await spawn(Probe, ActorOptions(), start_fails=True)

    assert await failed.ask(Probe.events) == []
    await failed.stop()


async def test_a_constructor_that_raises_is_a_configuration_error() -> None:
    broken = await spawn(Broken, ActorOptions())

    with pytest.raises(ConfigError):
        await broken.wait_alive()
    with pytest.raises(ConfigError, match="the constructor raised OSError: no such thing"):
        await broken.ask(Broken.ping)


async def test_a_node_that_does_not_exist_is_a_configuration_error() -> None:
    lost = await spawn(Probe, ActorOptions(node_id="ab" * 28))

    with pytest.raises(ConfigError, match="has no place"):
        await lost.ask(Probe.events)


async def test_an_actor_can_be_pinned_to_a_node(cluster: Cluster) -> None:
    pinned = await spawn(Probe, ActorOptions(node_id=cluster.node_id))

    assert await pinned.ask(Probe.join, "a", right="b") == "ab"
    await pinned.stop()


async def test_environment_and_event_loop_of_an_actor() -> None:
    worker = await spawn(Worker, ActorOptions(env={"AIDB_TEST": "set"}))

    assert await worker.ask(Worker.variable, "AIDB_TEST") == "set"
    assert await worker.ask(Worker.loop_module) == "uvloop"
    assert await worker.ask(Worker.niceness) == os.nice(0)
    await worker.stop()


async def test_a_killed_actor_is_unavailable_and_then_another_process(
    named: RayRef[Probe],
) -> None:
    """Calls under way are in doubt; calls made while Ray restarts the actor never ran."""
    pid = await named.wait_alive()
    waiting = asyncio.create_task(named.ask(Probe.pass_gate, "a"))
    await until_event(named, "a waits")

    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        with pytest.raises(UnavailableError) as in_flight:
            await waiting
        outcomes: set[str] = set()
        while "not_applied" not in outcomes and "answered" not in outcomes:
            outcomes.add(await outcome_of_asking(named))
    new_pid = await named.wait_alive()

    assert in_flight.value.outcome == "unknown"
    assert "answered" not in outcomes
    assert new_pid != pid
    assert await until_event(named, "started") == ["started"]


async def outcome_of_asking(probe: ActorRef[Probe]) -> str:
    try:
        await probe.ask(Probe.events)
    except UnavailableError as error:
        return error.outcome
    return "answered"


async def test_an_actor_that_is_not_restarted_has_ended() -> None:
    mortal = await spawn(Probe, ActorOptions(max_restarts=0))
    os.kill(await mortal.wait_alive(), signal.SIGKILL)

    async with asyncio.timeout(10):
        while await outcome_of_asking(mortal) != "not_applied":
            pass
    with pytest.raises(UnavailableError, match="the actor has ended"):
        await mortal.wait_alive()


async def test_spawning_a_name_again_finds_the_actor(name: str) -> None:
    options = ActorOptions(name=name, detached=True)

    refs = await asyncio.gather(*(spawn(Probe, options) for _ in range(6)))

    assert len({await ref.wait_alive() for ref in refs}) == 1
    await refs[0].stop()


async def test_a_named_ref_finds_the_next_actor_of_that_name(
    named: RayRef[Probe], name: str
) -> None:
    pid = await named.wait_alive()
    other = await find(Probe, name)
    assert other is not None
    await named.stop()
    assert await find(Probe, name) is None

    await spawn(Probe, ActorOptions(name=name, detached=True))

    assert await other.wait_alive() == await named.wait_alive() != pid


async def test_a_pinned_ref_leaves_the_next_actor_of_its_name_alone(
    named: RayRef[Probe], name: str
) -> None:
    await named.wait_alive()
    other = await find(Probe, name)
    assert other is not None
    pinned = other.pinned()
    assert await outcome_of_asking(pinned) == "answered"
    await named.stop()
    await spawn(Probe, ActorOptions(name=name, detached=True))
    pid = await named.wait_alive()

    async with asyncio.timeout(20):
        while await outcome_of_asking(pinned) != "not_applied":
            pass
    await pinned.stop()

    assert await named.wait_alive() == pid


async def test_a_name_that_nobody_has() -> None:
    assert await find(Probe, "nobody") is None
    lost: RayRef[Probe] = RayRef(None, name="nobody")

    with pytest.raises(UnavailableError, match="no actor named 'nobody'") as caught:
        await lost.ask(Probe.events)
    with pytest.raises(UnavailableError):
        await lost.wait_alive(50)
    await lost.stop()

    assert caught.value.outcome == "not_applied"


async def test_a_detached_actor_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="needs a name"):
        ActorOptions(detached=True)


async def test_refs_travel_to_other_processes(
    named: RayRef[Probe], probe: ActorRef[Probe], worker: RayRef[Worker]
) -> None:
    holder = await spawn(Worker, ActorOptions(), probe)

    assert await worker.ask(Worker.relay_to, named, "a", "b") == "ab"
    assert await worker.ask(Worker.relay_to, probe, "a", "b") == "ab"
    assert await holder.ask(Worker.relay, "a", "b") == "ab"
    assert await pickle.loads(pickle.dumps(named)).ask(Probe.join, "a", right="b") == "ab"
    await holder.stop()


@pytest.mark.parametrize(("shielded", "end"), [(False, "cancelled"), (True, "passed")])
async def test_cancelling_reaches_through_an_actor_up_to_a_shield(
    probe: ActorRef[Probe], *, shielded: bool, end: str
) -> None:
    middle = await spawn(Worker, ActorOptions(), probe)
    outer = asyncio.create_task(middle.ask(Worker.wait_through, shielded=shielded))
    await until_event(probe, "inner waits")

    outer.cancel()
    await asyncio.wait([outer])
    # The middle actor answers this after it was told of the cancellation.
    await middle.ask(Worker.relay, "a", "b")
    if shielded:
        await probe.ask(Probe.open_gate)

    events = await until_event(probe, f"inner {end}")
    assert events[-2:] == ["inner waits", f"inner {end}"]
    await middle.stop()


async def test_more_pending_calls_than_allowed_are_refused() -> None:
    busy = await spawn(Probe, ActorOptions(max_pending_calls=1))
    waiting = asyncio.create_task(busy.ask(Probe.pass_gate, "a"))
    await asyncio.sleep(0)

    with pytest.raises(UnavailableError) as caught:
        await busy.ask(Probe.events)

    assert (caught.value.outcome, caught.value.code) == ("not_applied", "overloaded")
    waiting.cancel()
    await asyncio.wait([waiting])
    await busy.stop()


async def test_connecting_again_joins_and_closing_leaves_it_to_the_others() -> None:
    async with await connect_cluster() as again:
        assert again.owned
        with pytest.raises(ConfigError, match="cannot join"):
            await connect_cluster("127.0.0.1:1")

    probe = await spawn(Probe, ActorOptions())
    assert await probe.ask(Probe.join, "a", right="b") == "ab"
    await probe.stop()


SECOND_DRIVER = """
import asyncio, sys
from aidb_ray.errors import AidbError
from aidb_ray.runtime import ActorOptions, connect_cluster, find, spawn
from tests.unit.test_runtime_local import Probe

async def code_of(work):
    try:
        await work
    except AidbError as error:
        return error.code
    return "fine"

async def main():
    print(await code_of(connect_cluster("127.0.0.1:1")))
    print(await code_of(connect_cluster("not an address")))
    async with await connect_cluster() as cluster:
        probe = await find(Probe, sys.argv[1])
        own = await spawn(Probe, ActorOptions())
        print(cluster.owned, await probe.ask(Probe.join, "found ", right="it"))
    print(await code_of(own.ask(Probe.events)), await code_of(own.wait_alive()))
    print(await code_of(own.stop()))
    print(await code_of(find(Probe, "any")), await code_of(spawn(Probe, ActorOptions())))

asyncio.run(main())
"""


async def test_a_second_driver_finds_a_detached_actor(named: RayRef[Probe], name: str) -> None:
    pid = await named.wait_alive()

    output = await run_driver(SECOND_DRIVER, name, RAY_ADDRESS=cluster_address())

    assert output.splitlines() == [
        "unavailable",
        "config_error",
        "False found it",
        "not_connected not_connected",
        "fine",
        "not_connected not_connected",
    ]
    assert await named.wait_alive() == pid


KILLED_DRIVER = """
import asyncio, os, signal, sys
import ray
sys.path.insert(0, sys.argv[1])
from aidb_ray.runtime import ActorOptions, connect_cluster, spawn
from tests.unit.test_runtime_local import Probe

async def main():
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    cluster = await connect_cluster(num_cpus=1)
    assert cluster.owned
    probe = await spawn(Probe, ActorOptions(name="survivor", detached=True))
    pid = await probe.wait_alive()
    os.kill(os.getpid(), signal.SIGTERM)
    await terminated.wait()
    print(pid, ray.get_runtime_context().gcs_address, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_killed_driver_takes_its_cluster_with_it(tmp_path: Path) -> None:
    """Until then SIGTERM is the driver's, its imports reach the actor, its secret stays secret."""
    assert processes_that_mention(cluster_address())

    output = await run_driver(
        KILLED_DRIVER,
        str(REPOSITORY),
        status=-signal.SIGKILL,
        directory=tmp_path,
        without=("RAY_AUTH_MODE", "PYTHONPATH"),
        stderr=subprocess.STDOUT,
        HOME=str(tmp_path),
    )

    pid, address = output.splitlines()[-1].split()
    assert "SIGTERM" not in output
    assert address != cluster_address()
    assert mode_of(tmp_path / ".ray" / "auth_token") == 0o600
    await until(lambda: not is_running(int(pid)))
    await until(lambda: not processes_that_mention(address))


async def run_driver(
    script: str,
    *args: str,
    status: int = 0,
    directory: Path = REPOSITORY,
    without: Collection[str] = (),
    stderr: int | None = None,
    **variables: str,
) -> str:
    """Run `script` in a process of its own and return what it prints."""
    kept = {key: value for key, value in os.environ.items() if key not in without}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        *args,
        cwd=directory,
        env=kept | variables,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    async with asyncio.timeout(120):
        output, _ = await process.communicate()
    assert process.returncode == status
    return output.decode()


def cluster_address() -> str:
    return str(ray.get_runtime_context().gcs_address)  # pyright: ignore[reportUnknownArgumentType]


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return False


def processes_that_mention(address: str) -> list[str]:
    """Return the command lines of Ray's own processes in the cluster at `address`."""
    lines: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if address in line]
