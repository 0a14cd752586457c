"""Effects as their users hold them: created, awaited, looked at, closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from uuid import uuid4

from aidb_ray.database import Database, current_database, set_current_database
from aidb_ray.effects.definition import EffectDefinition
from aidb_ray.effects.loop import EffectLoop, EffectStatus
from aidb_ray.errors import AidbError, UnavailableError
from aidb_ray.runtime import ActorOptions, ActorRef, LocalRef, spawn

logger = logging.getLogger(__name__)

_START_MS = 120_000
_STOP_MS = 60_000
_PAUSE_S = 0.2


class EffectActor:
    """One executor of an effect as an actor. `__init__` only stores; `start` begins."""

    def __init__(self, database: Database, definition: EffectDefinition, index: int) -> None:
        self._database = database
        self._definition = definition
        self._index = index
        self._loop: EffectLoop | None = None
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take over what an earlier process of this executor left, and begin.

        Raises:
            AidbError: the store cannot be reached or refused; each call tries again.
        """
        if self._starting is None:
            set_current_database(self._database)
            self._starting = asyncio.create_task(self._start())
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except AidbError:
            if self._starting is starting:
                self._starting = None
            raise

    async def _start(self) -> None:
        definition = self._definition
        place = f"{definition.name}/{self._index}@"
        # The actor's name is its own, so whoever had it before has ended, or is fenced from now on.
        loop = EffectLoop(self._database, definition, f"{place}{uuid4()}", heir_of=place)
        try:
            await loop.start()
        except BaseException:
            await loop.aclose()
            raise
        self._loop = loop

    async def status(self) -> EffectStatus:
        """Return how the executor is doing, once it works."""
        await self.start()
        assert self._loop is not None
        return self._loop.status

    def die(self) -> None:
        """Stop everything where it is, as the end of its process does."""
        if self._starting is not None:
            self._starting.cancel()
        if self._loop is not None:
            self._loop.die()

    async def stop(self) -> None:
        """Stop what runs where it is, for others to take over."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._loop is not None:
            await self._loop.aclose()


class Effect:
    """A running effect. Dropping the handle stops nothing; leaving it as a context manager does.

    An effect with `placement="actor"` is found by its name, on a cluster or in this process:
    creating it again with an equal definition attaches to the one that runs, with another
    definition replaces it. Closing any of its handles ends it.
    """

    def __init__(self, database: Database, definition: EffectDefinition) -> None:
        self.name = definition.name
        self.database = database
        self._definition = definition
        self._refs: list[ActorRef[EffectActor]] = []
        self._loop: EffectLoop | None = None
        self._starting = asyncio.get_running_loop().create_task(self._begin())
        self._starting.add_done_callback(_retrieve)

    def __repr__(self) -> str:
        return f"<Effect {self.name!r}>"

    async def __aenter__(self) -> Effect:
        await self.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def ready(self) -> None:
        """Wait until it works.

        Raises:
            AidbError: it could not start; every awaited method raises the same.
        """
        await asyncio.shield(self._starting)

    async def status(self) -> list[EffectStatus]:
        """Return how each executor is doing."""
        await self.ready()
        if self._loop is not None:
            return [self._loop.status]
        return list(await asyncio.gather(*(ref.ask(EffectActor.status) for ref in self._refs)))

    async def actors(self) -> list[ActorRef[EffectActor]]:
        """Return the addresses of the executors that are actors, once every one works."""
        await self.ready()
        return list(self._refs)

    async def aclose(self) -> None:
        """End the effect: what runs is cancelled, and its rows are left for whoever comes next.

        Tools in threads cannot be cancelled: they are waited for up to `grace_ms`, and then their
        process is ended, if it is not this one.
        """
        if not self._starting.done():
            await asyncio.wait([self._starting])
        if self._loop is not None:
            await self._loop.aclose()
        await _stop(self._refs)
        found = self.database.local_effects.get(self.name)
        if found is not None and found[1] is self._refs:
            del self.database.local_effects[self.name]
        self.database.forget_effect(self)

    async def disconnect(self) -> None:
        """End what cannot go on without the connection: detached actors do."""
        cluster = self.database.cluster
        if self._loop is not None or self.database.is_local or cluster is None or cluster.owned:
            await self.aclose()

    async def _begin(self) -> None:
        definition, database = self._definition, self.database
        if definition.placement == "here":
            holder = f"{definition.name}/here@{uuid4()}"
            loop = EffectLoop(database, definition, holder)
            try:
                await loop.start()
            except BaseException:
                await loop.aclose()
                raise
            self._loop = loop
            return
        if database.is_local:
            self._refs = await self._find_or_make_here()
        else:
            self._refs = [await self._start_actor(index) for index in range(definition.processes)]
        starting = (ref.with_timeout(_START_MS).ask(EffectActor.start) for ref in self._refs)
        await asyncio.gather(*starting)

    async def _find_or_make_here(self) -> list[ActorRef[EffectActor]]:
        """Return the executors of this process that have this name and definition."""
        definition, running = self._definition, self.database.local_effects
        fingerprint = definition.fingerprint()
        found = running.get(definition.name)
        while found is not None and found[0] == fingerprint:
            if await _are_alive(found[1]):
                return found[1]
            if running.get(definition.name) is found:
                break
            # Somebody else was faster to replace what had ended.
            found = running.get(definition.name)
        refs: list[ActorRef[EffectActor]] = [
            LocalRef(EffectActor(self.database, definition, index))
            for index in range(definition.processes)
        ]
        running[definition.name] = fingerprint, refs
        if found is not None:
            await _stop(found[1])
        return refs

    async def _start_actor(self, index: int) -> ActorRef[EffectActor]:
        """Return the actor that has this definition: one that runs, or one that is started.

        A name has one actor, so of many that start the same effect one creates it and the others
        find it. What one looked at may be replaced in the next moment; so whoever ends an actor
        ends the one it looked at, and looks again.
        """
        definition, database = self._definition, self.database
        owned = database.cluster is not None and database.cluster.owned
        options = ActorOptions(
            name=f"aidb/{database.name}/effect/{definition.name}/{index}",
            detached=not owned,
            **dict(definition.ray_options),
        )
        fingerprint = definition.fingerprint()
        deadline = asyncio.get_running_loop().time() + _START_MS / 1000
        while True:
            ref = await spawn(EffectActor, options, database, definition, index)
            try:
                status = await ref.with_timeout(_START_MS).ask(EffectActor.status)
            except UnavailableError:
                # Being restarted, or ended; whichever, the name leads to what runs next.
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(_PAUSE_S)
            else:
                if status.fingerprint == fingerprint:
                    return ref
                await ref.pinned().with_timeout(_STOP_MS).stop()


def start_effect(definition: EffectDefinition, database: Database | None) -> Effect:
    """Start an effect in the background; returns at once.

    Raises:
        ConfigError: there is no database.
    """
    home = database or current_database()
    effect = Effect(home, definition)
    home.keep_effect(effect)
    return effect


async def _are_alive(refs: Sequence[ActorRef[EffectActor]]) -> bool:
    try:
        await asyncio.gather(*(ref.ask(EffectActor.status) for ref in refs))
    except UnavailableError:
        return False
    return True


async def _stop(refs: Sequence[ActorRef[EffectActor]]) -> None:
    await asyncio.gather(*(ref.with_timeout(_STOP_MS).stop() for ref in refs))


def _retrieve(starting: asyncio.Task[None]) -> None:
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.error("an effect could not start: %s", error)
