"""What a method's file says of it in words: the docstring of the function that builds its slots, in fixed parts.

The first paragraph says what the method does, with the number of the paper's equation, or of the section, algorithm or
theorem where it numbers no equation; paragraphs after it what its arguments mean, where their names do not.
`Deviations:` begins what differs from the paper, "none known" where the code was held against it and nothing did;
`Choose when:` what speaks for it and against it. Torch-free.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from polygraft.grafts.methods.declare import Method

_DEVIATIONS, _CHOOSE = "Deviations: ", "Choose when: "
_NUMBERED = re.compile(
    r"\b(?:eq\.|sections?|algorithm|proposition|theorem) \d+(?:\.\d+)*(?:(?: to | and |, |-)\d+(?:\.\d+)*)*"
)


@dataclass(frozen=True, slots=True)
class Description:
    """A method in words, each part one paragraph; `arguments` may be empty."""

    summary: str
    arguments: str
    deviations: str
    choose: str

    @property
    def stated(self) -> tuple[str, ...]:
        """Where the papers that the summary names state the method, as `eq. 3`; empty where no number is given."""
        return tuple(_NUMBERED.findall(self.summary))


def describe(method: Method) -> Description:
    """Raises ValueError where a part is missing."""
    paragraphs = [" ".join(one.split()) for one in (inspect.getdoc(method.slots) or "").split("\n\n")]
    headed = {head: [one for one in paragraphs if one.startswith(head)] for head in (_DEVIATIONS, _CHOOSE)}
    if not paragraphs[0] or any(len(found) != 1 for found in headed.values()):
        raise ValueError(f"{method.name}: the docstring needs a summary, '{_DEVIATIONS}' and '{_CHOOSE}'")
    (deviations,), (choose,) = headed.values()
    summary, *arguments = (one for one in paragraphs if one not in (deviations, choose))
    return Description(
        summary=summary,
        arguments=" ".join(arguments),
        deviations=deviations.removeprefix(_DEVIATIONS),
        choose=choose.removeprefix(_CHOOSE),
    )
