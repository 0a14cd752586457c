"""How often work is tried again, and checks of the bounds that users write."""

from __future__ import annotations

from dataclasses import dataclass

from aidb_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Retry:
    """How often work is tried again after an error that may pass, or a lost process.

    Of an agent the work is a model round; of an effect what it does for a row, which a process
    tries again under the same claim. The pause doubles from `first_pause_ms` up to
    `longest_pause_ms`, with jitter; a provider that says how long to wait is believed up to
    `longest_pause_ms`. What a model or a tool says is final is not tried again.

    Attributes:
        max_attempts: Errors in a row after which it fails; 1 is without retry.
        max_interruptions: Ends of a process in a row, in the middle of a round or its tool calls,
            or of the work for a row, after which the generation fails with the code `interrupted`,
            the row with `tool_crashed`. Crashes and stops count alike, also those that other work
            brought about. From the third on it goes on alone: while no other such generation does,
            or nothing else in the executor. So of generations one that merely ran beside is failed
            only by fewer than 4.
    """

    max_attempts: int = 4
    first_pause_ms: int = 250
    longest_pause_ms: int = 30_000
    max_interruptions: int = 10

    def __post_init__(self) -> None:
        check_bounds(self, "max_attempts", "max_interruptions", least=1)
        check_bounds(self, "first_pause_ms", "longest_pause_ms", least=0)

    def pause_ms(self, failures: int, *, asked_ms: int | None = None, jitter: float) -> int:
        """Return the pause after so many failures; `jitter` is between 0 and 1."""
        pause = min(self.first_pause_ms << min(failures - 1, 16), self.longest_pause_ms)
        return max(round(pause * (0.5 + jitter / 2)), min(asked_ms or 0, self.longest_pause_ms))


def check_bounds(of: object, *names: str, least: int, may_be_none: bool = False) -> None:
    """Raise if one of these fields is not a whole number of `least` or more."""
    for name in names:
        value = getattr(of, name)
        if value is None and may_be_none:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            none = " or None" if may_be_none else ""
            raise ConfigError(
                f"{name} is a whole number, {least} or more{none}, not {value!r}.",
                code="invalid_bound",
            )
