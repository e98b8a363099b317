"""What held-out examples say before a graft has learnt anything. Of one that adds nothing yet it is what they say of
the bare backbone, whatever its sizes and places are, so that the trials of a search compute it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.spec import Branch
from polygraft.trainers.evaluate import Judgement
from polygraft.trainers.job import Sample


def adds_nothing(graft: BoundGraft, values: Mapping[str, Tensor]) -> bool:
    """Whether the forward has the bits of the bare backbone's: all that it has are branches whose B is 0, and y + 0 is
    y."""
    spec = graft.spec
    if spec.head or any(not isinstance(slot, Branch) or slot.form is not None for slot in spec.slots):
        return False
    return not any(bool(values[tensor.name].any()) for tensor in graft.tensors if tensor.part == "B")


@dataclass(slots=True)
class Untrained:
    """The last such judgement of a pack, of these samples at so many rows at a time."""

    _of: tuple[Sequence[Sample], int] | None = None
    _found: Judgement | None = None

    def judged(self, samples: Sequence[Sample], max_rows: int, judge: Callable[[], Judgement]) -> Judgement:
        """What `judge` says, or has said of the same samples."""
        if self._found is None or self._of != (samples, max_rows):
            self._of, self._found = (samples, max_rows), judge()
        return self._found
