"""Where a run keeps its rows and its witnesses, so that the same command finds them again."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from examples.word_problems_parts.witness import Witness


@dataclass(frozen=True)
class Place:
    """The directory of one task: these problems, solved in this way."""

    root: Path
    task: str

    @property
    def store(self) -> Path:
        """The database's data directory."""
        return self.root / "store"

    @property
    def database(self) -> str:
        """Name of the database, another for each directory: a cluster may hold several."""
        return join_words(self.task, _digest(str(self.root).encode()))

    @property
    def rounds(self) -> Witness:
        """Notes each model round."""
        return Witness(self.root / "rounds.jsonl")

    @property
    def calls(self) -> Witness:
        """Notes each call of the calculator."""
        return Witness(self.root / "calls.jsonl")

    @property
    def events(self) -> Witness:
        """Notes starts and ends of the driver, and kills."""
        return Witness(self.root / "events.jsonl")


def name_task(data: Path, *ways: str) -> str:
    """Return a name that is equal for equal problems that are solved in the same ways."""
    return join_words(data.stem, _digest(data.read_bytes()), *ways)


def join_words(*words: str) -> str:
    """Join those that are not empty to a name for a file or a database."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(filter(None, words))).strip("-")


def open_place(root: Path, task: str) -> Place:
    """Create the directory, or find it again.

    Raises:
        ValueError: `root` is the directory of another task, whose answers would be found there.
    """
    place = Place(root.resolve(), task)
    place.root.mkdir(parents=True, exist_ok=True)
    label = place.root / "task.txt"
    if not label.exists():
        # Whole or not at all, whenever we are killed.
        draft = label.with_suffix(".tmp")
        draft.write_text(task, "utf-8")
        draft.replace(label)
    if (other := label.read_text("utf-8")) != task:
        raise ValueError(f"{root} holds the task {other!r}, not {task!r}; choose another.")
    return place


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=4).hexdigest()
