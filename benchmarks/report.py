"""The record of a run as a person reads it."""

from __future__ import annotations

from statistics import median

from measure import Claim
from record import Outcome, Record
from rich.console import Console
from rich.table import Table

MIB = 1 << 20


def show(record: Record, console: Console) -> None:
    """Where it ran, the gate, the arms and the claims."""
    head = record.head
    versions = ", ".join(f"{name} {version}" for name, version in head.versions.items())
    shapes = ", ".join(f"{name} {size}" for name, size in head.shapes.items())
    console.print(f"[bold]{head.benchmark}[/] {shapes}" + (" [yellow](quick: proves nothing)[/]" if head.quick else ""))
    console.print(f"{head.machine.processor}, {head.machine.cores} cores; {versions}; commit {head.commit[:10]}")
    console.print(_gate(record))
    if record.arms:
        console.print(_arms(record))
    console.print(_claims(record))


def _gate(record: Record) -> Table:
    green = record.gate is not None and record.gate.holds
    title = "gate: [green]green[/]" if green else "gate: [red]red, so nothing is timed[/]"
    table = Table(title=title, title_justify="left")
    for column in ("check", "value", "limit", ""):
        table.add_column(column, justify="left" if column == "check" else "right")
    for check in record.gate.checks if record.gate else ():
        sign = "≥" if check.least else "≤"
        table.add_row(check.what, f"{check.value:.2e}", f"{sign} {check.limit:.2e}", _mark(check.holds))
    return table


def _arms(record: Record) -> Table:
    table = Table(title=f"arms, {len(record.samples)} rounds", title_justify="left")
    for column in ("arm", "what", "dtype", "tokens/s", "range", "PSS MiB", "over idle"):
        table.add_column(column, justify="left" if column in ("arm", "what", "dtype") else "right")
    for name, arm in record.arms.items():
        values = [sample[name] for sample in record.samples if name in sample]
        speed = (f"{median(values):.0f}", f"{min(values):.0f}-{max(values):.0f}") if values else ("", "")
        what = record.head.about[name] if arm.missing is None else f"[red]not measured: {arm.missing}[/]"
        table.add_row(name, what, _dtype(arm), *speed, *_memory(arm))
    return table


def _claims(record: Record) -> Table:
    table = Table(title="claims (the worse bound decides; of one id either must hold)", title_justify="left")
    for column in ("id", "ratio", "interval", "against", "goal", "holds"):
        table.add_column(column, justify="left" if column in ("id", "against") else "right")
    for claim in (*record.claims, *record.figures):
        bounds = "" if claim.low is None or claim.high is None else f"{claim.low:.2f}-{claim.high:.2f}"
        value = "" if claim.value is None else f"{claim.value:.2f}"
        goal = "" if claim.op is None else f"{claim.op} {claim.goal:g}"
        table.add_row(claim.id, value, bounds, claim.against or "", goal, _verdict(claim))
    return table


def _dtype(arm: Outcome) -> str:
    others = (f"{variant} {rate:.0f}" for variant, rate in arm.probes.items() if len(arm.probes) > 1)
    tried = ", ".join(others)
    return f"{arm.dtype} ({tried})" if tried else arm.dtype


def _memory(arm: Outcome) -> tuple[str, str]:
    if not arm.peak_bytes:
        return "", ""
    return f"{arm.peak_bytes / MIB:.0f}", f"{(arm.peak_bytes - arm.idle_bytes) / MIB:.0f}"


def _verdict(claim: Claim) -> str:
    if claim.value is None:
        return "[red]not measured[/]"
    return "" if claim.op is None else _mark(claim.holds)


def _mark(holds: bool | None) -> str:
    return "[green]yes[/]" if holds else "[red]no[/]"
