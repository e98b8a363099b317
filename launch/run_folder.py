"""The files in `<home>/run` through which the supervisor, its children and the commands know of each other."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from polygraft.cluster.service import write_private
from polygraft.kernels.common.room import is_full
from polygraft.launch.processes import Identity

_TAIL_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Supervision:
    """The supervisor that owns this folder, its live children in the order they started, and the folder of Ray's
    sockets and logs, which is removed with them."""

    supervisor: Identity
    children: tuple[Identity, ...]
    scratch: str


@dataclass(frozen=True, slots=True)
class RunFolder:
    home: Path

    @property
    def path(self) -> Path:
        return self.home / "run"

    @property
    def settings(self) -> Path:
        """The settings this service was started with, as JSON."""
        return self.path / "settings.json"

    @property
    def lock(self) -> Path:
        """Held by the supervisor as long as it lives."""
        return self.path / "lock"

    @property
    def ray_token(self) -> Path:
        return self.path / "ray_token"

    def log(self, name: str) -> Path:
        return self.path / f"{name}.log"

    @property
    def stage(self) -> str:
        """What the service is busy with, for whoever waits for it; empty when it never began."""
        return _read(self._stage)

    def enter(self, stage: str) -> None:
        """Say what the service is busy with; nothing is said where there is no room for it."""
        self._say(self._stage, stage)

    @property
    def reason(self) -> str:
        """Why the service ended by itself, in one line; empty when it did not."""
        return _read(self._reason)

    def fail(self, reason: str) -> None:
        """Say why the service ends; the last reason is the one that counts."""
        self._say(self._reason, " ".join(reason.split()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever started the service has to know of its start."""
        return tuple(_read(self._notes).splitlines())

    def note(self, text: str) -> None:
        self._say(self._notes, "\n".join((*self.notes, " ".join(text.split()))))

    def clear(self) -> None:
        """Forget what an earlier service said."""
        for path in (self._reason, self._notes):
            path.unlink(missing_ok=True)

    @property
    def supervision(self) -> Supervision | None:
        """Who was the last supervisor here; it need not be alive."""
        try:
            record = json.loads(self._supervision.read_text())
            children = tuple(Identity(**child) for child in record["children"])
            return Supervision(Identity(**record["supervisor"]), children, record["scratch"])
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def supervise(self, supervision: Supervision) -> None:
        write_private(self._supervision, json.dumps(asdict(supervision)))

    def tail(self, name: str, lines: int = 15) -> str:
        """The last lines of a log, empty when there is none."""
        try:
            with self.log(name).open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - _TAIL_BYTES))
                return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    @staticmethod
    def _say(file: Path, text: str) -> None:
        try:
            write_private(file, text)
        except OSError as error:
            if not is_full(error):
                raise

    @property
    def _stage(self) -> Path:
        return self.path / "stage"

    @property
    def _reason(self) -> Path:
        return self.path / "reason"

    @property
    def _notes(self) -> Path:
        return self.path / "notes"

    @property
    def _supervision(self) -> Path:
        return self.path / "supervisor.json"


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""
