"""The demo's eight jobs as data, in the order of the corpus' tenants: which graft, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue

SEED = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoJob:
    """`label` names the method in tables; the rest is what is asked of the API."""

    label: str
    peft: str
    learning_rate: float
    batch_size: int
    max_length: int
    n_epochs: int
    schedule: str = "linear"

    def body(self, *, model: str, training_file: str, validation_file: str, suffix: str) -> dict[str, JsonValue]:
        """The request for POST /v1/fine_tuning/jobs."""
        training: dict[str, JsonValue] = {
            "peft": self.peft,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "n_epochs": self.n_epochs,
            "schedule": self.schedule,
        }
        return {
            "model": model,
            "training_file": training_file,
            "validation_file": validation_file,
            "suffix": suffix,
            "seed": SEED,
            "method": {"type": "supervised", "supervised": {"hyperparameters": training}},
        }


JOBS = (
    DemoJob(
        label="LoRA r=8, attention",
        peft="lora(r=8, alpha=16, at=attn.*)",
        learning_rate=1e-3,
        batch_size=4,
        max_length=96,
        n_epochs=1,
    ),
    DemoJob(
        label="LoRA r=16, all linears",
        peft="lora(r=16, alpha=32)",
        learning_rate=5e-4,
        batch_size=8,
        max_length=64,
        n_epochs=1,
    ),
    DemoJob(
        label="DoRA r=8",
        peft="dora(r=8, alpha=16)",
        learning_rate=1e-3,
        batch_size=8,
        max_length=80,
        n_epochs=1,
        schedule="cosine",
    ),
    DemoJob(
        label="IA3",
        peft="ia3",
        learning_rate=1e-2,
        batch_size=4,
        max_length=96,
        n_epochs=2,
    ),
    DemoJob(
        label="BitFit",
        peft="bitfit",
        learning_rate=5e-3,
        batch_size=4,
        max_length=64,
        n_epochs=2,
        schedule="constant",
    ),
    DemoJob(
        label="prefix(10)",
        peft="prefix(10)",
        learning_rate=1e-2,
        batch_size=4,
        max_length=48,
        n_epochs=1,
        schedule="cosine",
    ),
    DemoJob(
        label="serial adapter",
        peft="serial(32)",
        learning_rate=2e-3,
        batch_size=6,
        max_length=96,
        n_epochs=1,
    ),
    DemoJob(
        label="parallel adapter",
        peft="parallel(32)",
        learning_rate=2e-3,
        batch_size=6,
        max_length=80,
        n_epochs=1,
    ),
)
