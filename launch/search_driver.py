"""A search's driver as a Ray actor, and how the service's head keeps all of them."""

from __future__ import annotations

import logging
import time
from threading import Thread
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from polygraft.cluster.actors.place import ON_HEAD
from polygraft.cluster.model import Search, StudyId
from polygraft.cluster.settings import Settings
from polygraft.cluster.store import keys
from polygraft.cluster.store.base import Conflict, StoreError
from polygraft.cluster.store.connect import connect
from polygraft.launch.machine import Machine
from polygraft.tuning.keeper import Ended, Keeper

_LOOK_S = 0.5
_LOG = logging.getLogger(__name__)


class SearchDriver:
    """One call runs a search to its end; then its process is over."""

    def run(self, settings: str, study: str, url: str, key: str) -> Ended:
        """`settings` is JSON. Faults that another driver may outlive are raised."""
        from polygraft.cluster.client import Client
        from polygraft.tuning.driver import search
        from polygraft.tuning.finals import Final
        from polygraft.tuning.record import BadRecord, decode
        from polygraft.tuning.retrain import retrain
        from polygraft.tuning.study import Trial
        from polygraft.tuning.terms import Access

        read, id = Settings.model_validate_json(settings), StudyId(study)
        store = connect(read.store_url)
        try:
            found = store.get(keys.study(id))
            if found is None:
                return Ended(fault=f"{study} has no record", for_good=True)
            plan, tenant = decode(found.value.body).plan, found.value.tenant

            def tell(trial: Trial) -> None:
                message = f"trial {trial.number} {trial.state.value}: {trial.candidate.peft}"
                store.append(keys.search_log(id), {"message": message, "at": time.time(), "trial": trial.number})

            done = search(
                plan,
                store=store,
                access=Access(url, key),
                tenant=tenant,
                folder=read.data / "searches",
                study=id,
                on_trial=tell,
            )
            if plan.seeds and done.front:

                def tell_final(final: Final) -> None:
                    message = f"trial {final.trial} trained again with seed {final.seed}: {final.loss}"
                    store.append(keys.search_log(id), {"message": message, "at": time.time(), "trial": final.trial})

                with Client(url, key) as client:
                    retrain(store, id, done.front, client, tell=tell_final)
            return Ended(note=done.ended)
        except BadRecord as error:
            return Ended(fault=str(error), for_good=True)
        finally:
            store.close()


class RemoteDriver:
    """The actor and the one call of it."""

    def __init__(self, settings: Settings, url: str, search: Search, key: str) -> None:
        options = ray.remote(SearchDriver).options(num_cpus=0, resources=ON_HEAD, max_restarts=0)
        self._actor = cast("ActorHandle[SearchDriver]", options.remote())
        self._call: ray.ObjectRef[Ended] = self._actor.run.remote(settings.told, search.id, url, key)

    def ended(self) -> Ended | None:
        try:
            found = ray.get(self._call, timeout=0)
        except GetTimeoutError:
            return None
        except (RayError, Conflict, StoreError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            found = Ended(fault=lines[-1].strip() if lines else type(error).__name__)
        self.kill()
        return found

    def kill(self) -> None:
        ray.kill(self._actor)


def keeper_of(settings: Settings, url: str) -> Keeper:
    """Of all searches of the service, whose store must run and whose API must answer at `url`."""
    most = settings.limits.searches or Machine.here(settings).searches
    return Keeper(
        connect(settings.store_url),
        lambda search, key: RemoteDriver(settings, url, search, key),
        time.time,
        most=most,
    )


def look(keeper: Keeper) -> None:
    """One round; a store that does not answer now is asked again in the next."""
    try:
        keeper.tick()
    except StoreError as error:
        _LOG.warning("searches are not looked after now: %s", error)


class SearchKeeper:
    """The keeper as an actor, for clusters without a head of ours; it looks for as long as it lives."""

    def __init__(self, settings: str, url: str) -> None:
        self._keeper = keeper_of(Settings.model_validate_json(settings), url)
        self._thread = Thread(target=self._run, name="searches", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise if the loop is over."""
        if not self._thread.is_alive():
            raise RuntimeError("the loop that keeps searches has ended")

    def _run(self) -> None:
        while True:
            look(self._keeper)
            time.sleep(_LOOK_S)
