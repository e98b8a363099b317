"""What to do now: `decide` answers every job that waits. Pure: equal snapshots, equal decisions."""

from __future__ import annotations

from polygraft.cluster.decisions import Admit, CancelJob, ClosePack, Decision, Hold, OpenPack, Refuse
from polygraft.cluster.model import DeviceId, Job, Pack, PackId, Snapshot
from polygraft.cluster.policy.admission import fair_order, stop_reason
from polygraft.cluster.policy.budget import Budget
from polygraft.cluster.policy.loading import loading
from polygraft.cluster.policy.packing import (
    backing_off,
    free_device,
    is_idle,
    new_pack_id,
    pack_bytes,
    usable_pack,
    why_no_pack,
)
from polygraft.cluster.states import PackState, Reason


def decide(snapshot: Snapshot) -> tuple[Decision, ...]:
    """One round: 1 cancel, 2 order, 3 admit, 4 open packs, 5 close idle packs, 6 hold or refuse what is left,
    7 load and unload backbones."""
    jobs = snapshot.jobs.values()
    cancels = tuple(
        CancelJob(job.id, job.pack, reason)
        for job in sorted(jobs, key=lambda job: job.id)
        if (reason := stop_reason(job, snapshot.now)) is not None
    )
    stopped = {cancel.job for cancel in cancels}

    round_ = _Round(snapshot)
    placed = tuple(round_.place(job) for job in fair_order(jobs) if job.id not in stopped)

    wanted = {job.spec.backbone for job in jobs if job.waiting and job.id not in stopped}
    closes = tuple(
        ClosePack(pack.id, Reason.IDLE)
        for pack in sorted(snapshot.packs.values(), key=lambda pack: pack.id)
        if pack.backbone not in wanted and is_idle(pack, snapshot.jobs, now=snapshot.now, idle_s=snapshot.limits.idle_s)
    )
    return (*cancels, *round_.opened, *placed, *closes, *loading(snapshot))


class _Round:
    """The packs as they fill during one round."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.opened: list[OpenPack] = []
        self._snapshot = snapshot
        self._budgets: dict[PackId, Budget] = {}
        self._full: dict[PackId, Reason] = {}
        self._taken: set[DeviceId] = set()

    def place(self, job: Job) -> Decision:
        limits, backbone = self._snapshot.limits, job.spec.backbone
        if backbone not in self._snapshot.backbones:
            return Refuse(job.id, Reason.NO_BACKBONE)
        if job.attempts >= limits.max_attempts:
            return Refuse(job.id, Reason.PACKS_FAILED)
        if Budget(limits).refusal(job) is not None:
            return Refuse(job.id, Reason.TOO_LARGE)
        pack = usable_pack(self._snapshot.packs.values(), backbone)
        if pack is None:
            return Hold(job.id, self._open(backbone))
        if pack.state is PackState.OPENING:
            return Hold(job.id, Reason.PACK_OPENING)
        return self._admit(job, pack)

    def _admit(self, job: Job, pack: Pack) -> Decision:
        """The first job that does not fit stops the queue, or small jobs could overtake a large one for ever."""
        if pack.id not in self._budgets:
            present = (one for one in self._snapshot.jobs.values() if one.pack == pack.id and one.active)
            self._budgets[pack.id] = Budget(self._snapshot.limits, present)
        budget = self._budgets[pack.id]
        reason = self._full.get(pack.id) or budget.refusal(job)
        if reason is not None:
            self._full[pack.id] = reason
            return Hold(job.id, reason)
        budget.take(job)
        return Admit(job.id, pack.id)

    def _open(self, backbone: str) -> Reason:
        """Open a pack if there is room; why the job waits either way."""
        if any(one.backbone == backbone for one in self.opened):
            return Reason.PACK_OPENING
        if backing_off(self._snapshot, backbone):
            return Reason.PACK_BACKOFF
        device = free_device(self._snapshot, self._taken)
        if device is None:
            return why_no_pack(self._snapshot.packs.values(), backbone)
        self._taken.add(device.id)
        pack = new_pack_id(self._snapshot, len(self.opened))
        self.opened.append(OpenPack(pack, backbone, (device.id,), pack_bytes(device)))
        return Reason.PACK_OPENING
