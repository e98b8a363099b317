"""What the trials of a search are given beside their jobs. Imports nothing that takes long: a driver begins jobs before
it has loaded Ray Tune."""

from __future__ import annotations

from dataclasses import dataclass, field

CALL_S = 15.0  # one call of the service


@dataclass(frozen=True, slots=True)
class Access:
    """The service's URL, without /v1, and an API key of the tenant who pays."""

    url: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Terms:
    """What all trials of a study have in common: the lease of their jobs."""

    study: str
    lease_s: float
