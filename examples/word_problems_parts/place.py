"""Where a run keeps its rows and its witnesses, so that the same command finds them again."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from examples.word_problems_parts.witness import Witness


@dataclass(frozen=True)
class Place:
    """The directory of one task: these problems, solved in this way.

    Attributes:
        database: Name of the database in it, unlike any other's: a cluster may hold several.
    """

    root: Path
    task: str
    database: str

    @property
    def rounds(self) -> Witness:
        """Notes each model round."""
        return Witness(self.root / "rounds.jsonl")

    @property
    def calls(self) -> Witness:
        """Notes each call of the calculator."""
        return Witness(self.root / "calls.jsonl")

    @property
    def answers(self) -> Witness:
        """Notes each reply that the driver got: no more is to be done in its session."""
        return Witness(self.root / "answers.jsonl")

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
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    label = root / "task.json"
    if not label.exists():
        # Whole or not at all, whenever we are killed.
        draft = label.with_suffix(".draft")
        fields = {"task": task, "database": join_words(task, uuid4().hex[:8])}
        draft.write_text(json.dumps(fields), "utf-8")
        draft.replace(label)
    place = Place(root, **json.loads(label.read_text("utf-8")))
    if place.task != task:
        raise ValueError(f"{root} holds the task {place.task!r}, not {task!r}; choose another.")
    return place


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=4).hexdigest()
