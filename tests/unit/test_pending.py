from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.effects.pending import PendingWork

Queue = PendingWork[str, str]


def make_queue(*, max_running: int = 2) -> Queue:
    return PendingWork(max_running=max_running)


def take_all(queue: Queue, now_ms: int = 0) -> Iterator[str]:
    while (session := queue.take(now_ms=now_ms)) is not None:
        yield session


def test_a_session_is_taken_once_until_it_is_done() -> None:
    queue = make_queue()
    queue.put("a", "1")
    queue.put("a", "2")

    assert list(take_all(queue)) == ["a"]
    assert queue.due_keys("a", now_ms=0) == ["1", "2"]
    assert queue.running == {"a"}


def test_no_more_sessions_are_at_work_than_allowed() -> None:
    queue = make_queue(max_running=2)
    for session in "abc":
        queue.put(session, "1")

    assert list(take_all(queue)) == ["a", "b"]
    queue.discard("a", "1")
    queue.done("a", now_ms=0)
    assert list(take_all(queue)) == ["c"]


def test_a_busy_session_goes_to_the_back() -> None:
    queue = make_queue(max_running=1)
    queue.put("busy", "1")
    queue.put("busy", "2")
    queue.put("other", "1")

    assert queue.take(now_ms=0) == "busy"
    queue.discard("busy", "1")
    queue.done("busy", now_ms=0)

    assert queue.take(now_ms=0) == "other"


def test_what_comes_while_a_session_is_at_work_waits_for_its_next_turn() -> None:
    queue = make_queue()
    queue.put("a", "1")
    assert queue.take(now_ms=0) == "a"
    queue.put("a", "2")
    assert queue.take(now_ms=0) is None

    queue.discard("a", "1")
    queue.done("a", now_ms=0)

    assert queue.take(now_ms=0) == "a"
    assert queue.due_keys("a", now_ms=0) == ["2"]


def test_a_key_waits_until_it_is_due() -> None:
    queue = make_queue()
    queue.put("a", "later", not_before_ms=100, now_ms=0)

    assert queue.take(now_ms=99) is None
    assert queue.next_due_ms() == 100
    assert not queue.has_work(now_ms=99)
    assert queue.take(now_ms=100) == "a"
    assert queue.next_due_ms() is None


def test_a_key_that_comes_due_while_its_session_is_at_work_is_not_forgotten() -> None:
    queue = make_queue()
    queue.put("a", "now")
    queue.put("a", "later", not_before_ms=100, now_ms=0)
    assert queue.take(now_ms=0) == "a"
    assert queue.take(now_ms=150) is None

    queue.discard("a", "now")
    queue.done("a", now_ms=150)

    assert queue.take(now_ms=150) == "a"


def test_a_key_that_is_put_off_is_not_taken_early() -> None:
    queue = make_queue()
    queue.put("a", "1")
    queue.put("a", "1", not_before_ms=100, now_ms=0)

    assert queue.take(now_ms=0) is None
    assert queue.take(now_ms=100) == "a"


def test_a_session_whose_keys_are_gone_is_not_taken() -> None:
    queue = make_queue()
    queue.put("a", "1")
    queue.discard("a", "1")
    queue.discard("a", "never there")
    queue.discard("nobody", "1")

    assert queue.take(now_ms=0) is None
    assert len(queue) == 0


def test_a_session_that_rests_is_left_alone_whatever_comes() -> None:
    queue = make_queue()
    queue.put("a", "1")
    queue.take(now_ms=0)
    queue.rest("a", until_ms=50)
    queue.done("a", now_ms=0)
    queue.put("a", "2", now_ms=10)

    assert queue.take(now_ms=49) is None
    assert queue.has_work("a", now_ms=49)
    assert queue.take(now_ms=50) == "a"
    assert queue.due_keys("a", now_ms=50) == ["1", "2"]


def test_a_session_that_rests_until_woken_is_no_work() -> None:
    queue = make_queue()
    queue.put("a", "1")
    queue.rest("a")

    assert queue.take(now_ms=1 << 60) is None
    assert not queue.has_work(now_ms=0)
    assert not queue.has_work("a", now_ms=0)
    queue.put("a", "2")
    assert not queue.has_work(now_ms=0)
    assert not queue.has_work("a", now_ms=0)
    queue.wake("a", now_ms=0)
    assert queue.take(now_ms=0) == "a"


def test_a_later_rest_is_not_ended_by_an_earlier_one() -> None:
    queue = make_queue()
    queue.put("a", "1")
    queue.rest("a", until_ms=50)
    queue.rest("a", until_ms=100)

    assert queue.take(now_ms=60) is None
    assert queue.take(now_ms=100) == "a"


def test_the_rest_of_a_session_ends_with_its_keys() -> None:
    queue = make_queue()
    queue.put("a", "1")
    queue.rest("a")
    queue.discard("a", "1")
    queue.put("a", "2")

    assert queue.take(now_ms=0) == "a"


def test_one_session_can_be_asked_for() -> None:
    queue = make_queue(max_running=1)
    queue.put("a", "1")
    queue.put("b", "1")

    assert queue.take(now_ms=0, only="c") is None
    assert queue.take(now_ms=0, only="b") == "b"
    assert queue.take(now_ms=0, only="a") is None


def test_a_session_can_be_seized_over_the_limit_but_not_from_its_worker() -> None:
    queue = make_queue(max_running=1)
    queue.put("a", "1")
    queue.put("b", "1")
    assert queue.take(now_ms=0) == "a"

    assert queue.seize("b")
    assert not queue.seize("b")
    assert not queue.seize("a")
    queue.done("b", now_ms=0)
    queue.discard("a", "1")
    queue.done("a", now_ms=0)
    assert queue.take(now_ms=0) == "b"


def test_new_keys_replace_the_old_and_sessions_at_work_go_on() -> None:
    queue = make_queue()
    queue.put("at work", "1")
    queue.put("gone", "1")
    queue.put("resting", "1")
    queue.rest("resting")
    assert queue.take(now_ms=0) == "at work"

    queue.replace([("at work", "1", 0), ("resting", "1", 0), ("new", "1", 5)], now_ms=0)

    assert list(take_all(queue)) == ["resting"]
    assert queue.running == {"at work", "resting"}
    queue.done("at work", now_ms=6)
    assert len(queue) == 3


SESSIONS = st.sampled_from("abc")
KEYS = st.sampled_from("xy")
STEPS = st.one_of(
    st.tuples(st.just("put"), SESSIONS, KEYS, st.integers(0, 20)),
    st.tuples(st.just("discard"), SESSIONS, KEYS, st.just(0)),
    st.tuples(st.just("take"), SESSIONS, KEYS, st.integers(0, 1)),
    st.tuples(st.just("done"), SESSIONS, KEYS, st.just(0)),
    st.tuples(st.just("rest"), SESSIONS, KEYS, st.integers(0, 10)),
    st.tuples(st.just("wait"), SESSIONS, KEYS, st.integers(1, 10)),
)


@given(st.lists(STEPS, max_size=40))
def test_what_is_due_is_always_taken_and_nothing_else(
    steps: list[tuple[str, str, str, int]],
) -> None:
    """Oracle: a session may be taken exactly if it is not at work, rests not and has a due key."""
    queue = make_queue(max_running=10)
    keys: dict[tuple[str, str], int] = {}
    rests: dict[str, int] = {}
    running: set[str] = set()
    now = 0

    def due(session: str) -> bool:
        return rests.get(session, 0) <= now and any(
            at <= now for (of, _), at in keys.items() if of == session
        )

    for step, session, key, number in steps:
        match step:
            case "put":
                queue.put(session, key, not_before_ms=number, now_ms=now)
                keys[session, key] = number
            case "discard":
                queue.discard(session, key)
                keys.pop((session, key), None)
                if not any(of == session for of, _ in keys):
                    rests.pop(session, None)
            case "take":
                allowed = {each for each in "abc" if due(each) and each not in running}
                taken = queue.take(now_ms=now, only=session if number else None)
                if number:
                    assert taken == (session if session in allowed else None)
                else:
                    assert taken in (allowed or {None})
                if taken is not None:
                    running.add(taken)
            case "done" if session in running:
                queue.done(session, now_ms=now)
                running.remove(session)
            case "rest":
                queue.rest(session, until_ms=now + number)
                if any(of == session for of, _ in keys):
                    rests[session] = now + number
            case _:
                now += number

        assert queue.running == running
        assert len(queue) == len(keys)
    assert sorted(take_all(queue, now)) == [s for s in "abc" if due(s) and s not in running]


def test_who_shares_a_queue_may_reach_further_and_who_hurries_goes_first() -> None:
    queue: PendingWork[str, int] = PendingWork(max_running=9)
    for session in "abcd":
        queue.put(session, 1)
    queue.hurry("c")
    queue.hurry("absent")

    assert queue.take(now_ms=0, skip=1) == "c"
    assert queue.take(now_ms=0, skip=1) == "b"
    assert queue.take(now_ms=0, skip=9) == "d"
    assert queue.take(now_ms=0) == "a"
    assert queue.take(now_ms=0, skip=3) is None
