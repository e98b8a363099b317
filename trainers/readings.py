"""What the files of a pack's jobs hold, read and tokenised once for all the jobs whose files they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from polygraft.grafts.text.jsonl import as_written
from polygraft.grafts.text.lengths import Lengths
from polygraft.trainers.job import Sample, TrainJob


@dataclass(frozen=True, slots=True)
class Reading:
    """The samples of a file, and how long they were before they were cut."""

    samples: tuple[Sample, ...] = ()
    lengths: Lengths = Lengths()  # noqa: RUF009  # frozen


@dataclass(slots=True)
class Readings:
    """Of one tokeniser."""

    _found: dict[Hashable, Reading] = field(default_factory=dict)

    def of(self, file: Path, how: Hashable, read: Callable[[], Reading]) -> Reading:
        """What `read` makes of the file, or has made of it in the same way since it was last written. Raises OSError
        where it is not there, and what `read` raises."""
        key = as_written(file), how
        if key not in self._found:
            self._found[key] = read()
        return self._found[key]

    def forget_but(self, jobs: Iterable[TrainJob]) -> None:
        """All that none of these jobs has: the others cost no memory beside it."""
        had = {id(samples) for job in jobs for samples in job.files.values()}
        self._found = {key: one for key, one in self._found.items() if id(one.samples) in had}
