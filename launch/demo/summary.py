"""The demo's last page: three tables that a person reads."""

from __future__ import annotations

from statistics import median

from rich.markup import escape

from polygraft.launch.demo.report import Report
from polygraft.launch.front import print_chosen, print_front
from polygraft.launch.output import count, loss, print_table, screen


def print_summary(report: Report) -> None:
    training, packing, burst, mixing = report.training, report.packing, report.burst, report.mixing
    _title(
        "Trained",
        f"{packing.median_jobs:g} jobs in the median step, {training.tokens_s:.0f} tokens/s together, "
        f"{training.wall_s:.0f} s",
    )
    print_table(
        ("job", "method", "#parameters", "#loss before", "#after", "#tokens/s", "model"),
        (
            (
                one.job.id,
                escape(one.tenant.plan.label),
                count(one.job.parameters),
                loss(one.job.loss_before),
                loss(one.job.loss_after),
                f"{one.tokens_s:.0f}",
                one.job.fine_tuned_model,
            )
            for one in training.trained
        ),
        empty="",
    )
    searched = report.searched
    _title(
        "Found",
        f"the Pareto front of {len(searched.points)} trials; {len(searched.stopped)} others were stopped, which saved "
        f"{searched.saved:.0%} of the steps; {searched.wall_s:.0f} s; drawn to {searched.chart}",
    )
    print_front(searched.front)
    print_chosen(searched.search)
    _title("Served", f"up to {mixing.most_grafts} grafts of {mixing.methods_then} methods in one decoding step")
    answers = burst.answers
    tpots = [answer.tpot_s for answer in answers if answer.tokens > 1]
    print_table(
        ("#requests", "#models", "#tokens", "#tokens/s", "#TTFT median", "#max", "#TPOT median", "#max"),
        [
            (
                len(answers),
                len({answer.model for answer in answers}),
                burst.tokens,
                f"{burst.tokens_s:.0f}",
                f"{median(a.ttft_s for a in answers):.2f} s",
                f"{max(a.ttft_s for a in answers):.2f} s",
                f"{median(tpots or [0.0]) * 1000:.0f} ms",
                f"{max(tpots, default=0.0) * 1000:.0f} ms",
            )
        ],
        empty="",
    )
    screen.print(
        f"\nPeak memory {report.peak_memory_bytes / 2**30:.2f} GiB, {report.wall_s:.0f} s in all.", highlight=False
    )


def _title(name: str, note: str) -> None:
    screen.print(f"\n[bold]{name}[/]  [dim]{escape(note)}[/]", highlight=False, soft_wrap=True)
