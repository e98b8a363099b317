"""A store's URL as others may print it."""

from __future__ import annotations

import re


class StoreUrl(str):
    """The URL, which shows no password where it is printed among other things: Serve logs the arguments of a policy."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(re.sub(r"//[^@/]*@", "//***@", self))
