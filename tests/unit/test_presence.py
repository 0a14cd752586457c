from __future__ import annotations

from aidb_ray.store.presence import NamePresence


def test_a_name_that_was_added_is_never_denied_and_few_others_are_affirmed() -> None:
    presence = NamePresence()
    for at in range(50_000):
        presence.add(f"aidb://in/{at}")

    assert all(presence.may_contain(f"aidb://in/{at}") for at in range(50_000))
    mistakes = sum(presence.may_contain(f"aidb://out/{at}") for at in range(20_000))
    assert mistakes < 20_000 * 0.04


def test_nothing_is_in_an_empty_one() -> None:
    assert not NamePresence().may_contain("aidb://a")
