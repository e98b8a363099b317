"""Every kind of space, as one type that a record can hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from polygraft.tuning.space import Space
from polygraft.tuning.spaces.positions import PositionSpace
from polygraft.tuning.spaces.s4 import S4Space

AnySpace = Annotated[Space | S4Space | PositionSpace, Field(discriminator="kind")]
