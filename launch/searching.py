"""A search of the service as a person follows it: its trials told as they are asked for and as they end."""

from __future__ import annotations

import time

from polygraft.cluster import searches as remote
from polygraft.cluster.client import Client
from polygraft.cluster.searches import RemoteSearch
from polygraft.launch.search_progress import SearchProgress
from polygraft.tuning.desk import read
from polygraft.tuning.study import Trial, TrialState

_FOLLOW_S = 1.0


def followed(client: Client, search: RemoteSearch) -> RemoteSearch:
    """The search once it is over. Raises what the client raises."""
    told: dict[int, TrialState] = {}
    said: str | None = None
    with SearchProgress(search.trials_total) as progress:
        while True:
            search = remote.show(client, search.id)
            for trial in trials_of(client, search):
                if told.get(trial.number) is not trial.state:
                    told[trial.number] = trial.state
                    progress.on_trial(trial)
            if search.final:
                return search
            if search.note != said and (said := search.note):
                progress.say(said)
            time.sleep(_FOLLOW_S)


def trials_of(client: Client, search: RemoteSearch) -> list[Trial]:
    """All of them, in the order they were asked for."""
    return [read(one.model_dump(exclude={"id", "object"})) for one in remote.trials(client, search.id)]
