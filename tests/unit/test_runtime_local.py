"""What every `ActorRef` promises, shown of `LocalRef`; the Ray tests import the same tests."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import pytest

from aidb_ray import errors
from aidb_ray.errors import AidbError, ToolError, UnavailableError
from aidb_ray.runtime import ActorRef, LocalRef

ERRORS: tuple[Exception, ...] = (
    errors.AidbError("base", code="special"),
    errors.ConfigError("config"),
    errors.CoroutineError("a plain function, please"),
    errors.NotReadyError("not ready"),
    errors.RowError("row", collection="c", key="k", loc=("a", 1)),
    errors.KeyExistsError("exists", collection="c", key="k"),
    errors.KeyMissingError("missing", collection="c", key="k"),
    errors.ContractError("contract", collection="c", key="k", loc=("a",)),
    errors.ConflictError("conflict", collection="c", key="k", current={"a": 1}, revision=7),
    errors.QueryError("query"),
    errors.FencedError(resource="bucket", our_epoch=1, current_epoch=2),
    errors.ToolError("tool"),
    errors.ModelError("model", retryable=True, status=429, retry_after_ms=10),
    errors.RunCancelledError("run", reason="user"),
    errors.WebhookError("webhook", code="stale", status=409),
    errors.UnavailableError("away", outcome="not_applied"),
    errors.StorageError("storage"),
    errors.StorageFullError("full"),
    errors.CorruptionError("damage", file="f", offset=3, first_revision=4, last_revision=5),
    errors.StoreMismatchError("mismatch"),
    errors.StoreLockedError("locked", pid=12, host="h"),
    errors.SlowConsumerError("slow", resume=9),
    errors.CompactedError("compacted", oldest=8),
    KeyError("not ours"),
    TimeoutError("the method's own"),
)

current_caller = contextvars.ContextVar("current_caller", default="nobody")


class Probe:
    """An actor that tells what happens to it, in memory and, for its end, in a file."""

    def __init__(self, diary: Path | None = None, *, start_fails: bool = False) -> None:
        self._diary = diary
        self._start_fails = start_fails
        self._events: list[str] = []
        self._gate = asyncio.Event()

    async def start(self) -> None:
        if self._start_fails:
            raise ToolError("no start")
        self._events.append("started")

    async def stop(self) -> None:
        if self._diary is not None:
            self._diary.write_text("stopped", encoding="utf-8")

    async def events(self) -> list[str]:
        return self._events

    async def reset(self) -> None:
        self._events = self._events[:1]
        self._gate = asyncio.Event()

    async def join(self, left: str, *, right: str) -> str:
        return left + right

    async def fail(self, index: int) -> None:
        raise ERRORS[index]

    async def open_gate(self) -> None:
        self._gate.set()

    async def pass_gate(self, mark: str) -> str:
        self._events.append(f"{mark} waits")
        try:
            await self._gate.wait()
        except asyncio.CancelledError:
            self._events.append(f"{mark} cancelled")
            raise
        self._events.append(f"{mark} passed")
        return mark

    async def fail_after_gate(self) -> None:
        await self.pass_gate("failing")
        raise ToolError("too late")

    async def extend(self, items: list[str]) -> list[str]:
        items.append("from the actor")
        return items

    async def caller(self) -> str:
        return current_caller.get()


class StartProbe(Protocol):
    """Starts a `Probe`, wherever."""

    async def __call__(self, diary: Path | None = None) -> ActorRef[Probe]: ...


@pytest.fixture
def start_probe() -> StartProbe:
    async def start(diary: Path | None = None) -> ActorRef[Probe]:
        return LocalRef(Probe(diary))

    return start


@pytest.fixture
async def probe(start_probe: StartProbe) -> AsyncIterator[ActorRef[Probe]]:
    ref = await start_probe()
    await until_event(ref, "started")
    yield ref
    await ref.stop()


async def until_event(probe: ActorRef[Probe], event: str) -> list[str]:
    """Ask until `event` happened; another process cannot be awaited otherwise."""
    async with asyncio.timeout(20):
        while event not in (events := await probe.ask(Probe.events)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return events


async def until(is_so: Callable[[], bool]) -> None:
    """Look until something happened in another process."""
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110  As above.
            await asyncio.sleep(0.01)


def test_every_error_class_has_a_sample() -> None:
    classes = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, AidbError)
    }

    assert classes == {type(error) for error in ERRORS if isinstance(error, AidbError)}


async def test_ask_returns_what_the_method_returns(probe: ActorRef[Probe]) -> None:
    assert await probe.ask(Probe.join, "a", right="b") == "ab"
    assert await probe.ask_shielded(Probe.join, "a", right="b") == "ab"


@pytest.mark.parametrize("shielded", [False, True])
async def test_errors_arrive_as_themselves(probe: ActorRef[Probe], *, shielded: bool) -> None:
    ask = probe.ask_shielded if shielded else probe.ask
    for index, sent in enumerate(ERRORS):
        with pytest.raises(type(sent)) as caught:
            await ask(Probe.fail, index)

        assert type(caught.value) is type(sent)
        assert caught.value.args == sent.args
        fields = {**vars(caught.value)}
        fields.pop("__notes__", None)
        assert fields == vars(sent)


async def test_calls_interleave_at_awaits(probe: ActorRef[Probe]) -> None:
    waiting = asyncio.create_task(probe.ask(Probe.pass_gate, "a"))
    await until_event(probe, "a waits")

    await probe.ask(Probe.open_gate)

    assert await waiting == "a"


async def test_cancelling_the_caller_cancels_the_method(probe: ActorRef[Probe]) -> None:
    waiting = asyncio.create_task(probe.ask(Probe.pass_gate, "a"))
    await until_event(probe, "a waits")

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    await until_event(probe, "a cancelled")


async def test_running_out_of_time_cancels_the_method_and_is_unknown(
    probe: ActorRef[Probe],
) -> None:
    with pytest.raises(UnavailableError, match="pass_gate gave no answer within 300 ms") as caught:
        await probe.with_timeout(300).ask(Probe.pass_gate, "a")

    assert (caught.value.outcome, caught.value.code) == ("unknown", "timed_out")
    await until_event(probe, "a cancelled")


async def test_a_shielded_call_outlives_its_cancelled_caller(probe: ActorRef[Probe]) -> None:
    waiting = asyncio.create_task(probe.ask_shielded(Probe.pass_gate, "a"))
    await until_event(probe, "a waits")

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await probe.ask(Probe.open_gate)

    assert "a cancelled" not in await until_event(probe, "a passed")


async def test_a_shielded_call_outlives_its_time(probe: ActorRef[Probe]) -> None:
    with pytest.raises(UnavailableError) as caught:
        await probe.with_timeout(300).ask_shielded(Probe.pass_gate, "a")
    await probe.ask(Probe.open_gate)

    assert caught.value.outcome == "unknown"
    assert "a cancelled" not in await until_event(probe, "a passed")


async def test_a_late_error_of_a_shielded_call_is_logged(
    probe: ActorRef[Probe], caplog: pytest.LogCaptureFixture
) -> None:
    waiting = asyncio.create_task(probe.ask_shielded(Probe.fail_after_gate))
    await until_event(probe, "failing waits")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    with caplog.at_level(logging.ERROR, logger="aidb_ray.runtime"):
        await probe.ask(Probe.open_gate)
        await until(lambda: "Probe.fail_after_gate failed after its caller left" in caplog.text)

    assert "too late" in caplog.text


async def test_arguments_and_answers_travel_by_value(probe: ActorRef[Probe]) -> None:
    items = ["mine"]

    answer = await probe.ask(Probe.extend, items)
    (await probe.ask(Probe.events)).append("not theirs")

    assert items == ["mine"]
    assert answer == ["mine", "from the actor"]
    assert "not theirs" not in await probe.ask(Probe.events)


async def test_a_call_does_not_see_the_context_of_its_caller(probe: ActorRef[Probe]) -> None:
    token = current_caller.set("me")
    try:
        assert await probe.ask(Probe.caller) == "nobody"
    finally:
        current_caller.reset(token)


async def test_start_runs_unasked(probe: ActorRef[Probe]) -> None:
    await until_event(probe, "started")


async def test_stop_lets_the_actor_close_down_and_ends_it(
    start_probe: StartProbe, tmp_path: Path
) -> None:
    probe = await start_probe(tmp_path / "diary")
    waiting = asyncio.create_task(probe.ask(Probe.pass_gate, "a"))
    await until_event(probe, "a waits")

    await probe.stop()

    assert (tmp_path / "diary").read_text(encoding="utf-8") == "stopped"
    with pytest.raises(UnavailableError) as in_flight:
        await waiting
    assert (in_flight.value.outcome, in_flight.value.code) == ("unknown", "unavailable")
    with pytest.raises(UnavailableError) as after:
        await probe.ask(Probe.join, "a", right="b")
    assert after.value.outcome == "not_applied"
    await probe.stop()


async def test_an_actor_that_could_not_start_says_so_and_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    probe = LocalRef(Probe(start_fails=True))

    assert await probe.ask(Probe.join, "a", right="b") == "ab"
    await probe.stop()

    assert "Probe could not start" in caplog.text
    assert "ToolError: no start" in caplog.text


async def test_more_pending_calls_than_allowed_are_refused() -> None:
    probe = LocalRef(Probe(), max_pending_calls=1)
    waiting = asyncio.create_task(probe.ask(Probe.pass_gate, "a"))
    await until(lambda: bool(probe._calls))

    with pytest.raises(UnavailableError) as caught:
        await probe.ask(Probe.join, "a", right="b")

    assert (caught.value.outcome, caught.value.code) == ("not_applied", "overloaded")
    waiting.cancel()
    await asyncio.wait([waiting])
    assert await probe.ask(Probe.join, "a", right="b") == "ab"


async def test_a_cancelled_local_call_has_ended_when_ask_raises() -> None:
    steps: list[str] = []

    class Slow:
        async def hang(self) -> None:
            steps.append("waits")
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(10):
                    await asyncio.sleep(0)
                steps.append("ended")

    slow = LocalRef(Slow())
    waiting = asyncio.create_task(slow.ask(Slow.hang))
    await until(lambda: steps == ["waits"])

    waiting.cancel()
    await asyncio.wait([waiting])

    assert steps == ["waits", "ended"]


async def test_stopping_ends_a_start_that_still_runs() -> None:
    ended = asyncio.Event()

    class Runner:
        async def start(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async def ping(self) -> None: ...

    runner = LocalRef(Runner())
    await runner.ask(Runner.ping)

    await runner.stop()

    assert ended.is_set()


async def test_an_actor_that_does_not_stop_in_time_is_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Stubborn:
        async def stop(self) -> None:
            await asyncio.Event().wait()

        async def ping(self) -> None: ...

    stubborn = LocalRef(Stubborn(), timeout_ms=20)

    await stubborn.stop()

    assert "did not stop within 20 ms" in caplog.text
    with pytest.raises(UnavailableError):
        await stubborn.ask(Stubborn.ping)
