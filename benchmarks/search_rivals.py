"""What a user would search with in place of packs: Ray Tune with PEFT in a process a trial, with or without keeping the
process and its model for the next trial, and Optuna with PEFT in one process."""

from __future__ import annotations

import os
import time
from pathlib import Path

from assignment import Task
from child import Reply, answer, task
from ray import tune
from search_peft import Lora, PeftTrial
from search_work import ETA, ROWS, START, WARM_TRIAL, Work

WARM_STEPS = 2


class Tune:
    """Ray is there before a round; its actors are the round's."""

    def __init__(self, given: Task) -> None:
        self._task, self._work = given, Work.read(given.folder)

    def load(self) -> Reply:
        import ray

        os.environ |= {
            "RAY_AIR_NEW_OUTPUT": "0",
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "RAY_AUTH_MODE": "disabled",
        }
        ray.init(
            num_cpus=self._task.threads, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20
        )
        return {"dtype": self._task.variant}

    def round(self) -> Reply:
        at_once, halving = int(self._task.variant.split()[1]), self._work.halving
        given = {"folder": self._task.folder, "variant": self._task.variant, "steps": self._task.size}
        trainable = tune.with_resources(tune.with_parameters(PeftTrial, **given), {"cpu": self._task.threads / at_once})
        rungs = self._work.stops(self._task.size)
        asha = tune.schedulers.AsyncHyperBandScheduler(
            time_attr="step",
            metric="train_loss",
            mode="min",
            grace_period=rungs[0],
            reduction_factor=ETA,
            max_t=self._task.size,
        )
        start = time.monotonic()
        results = tune.Tuner(
            trainable,
            param_space={"number": tune.grid_search(list(self._task.jobs))},
            tune_config=tune.TuneConfig(
                scheduler=asha if halving else None,
                max_concurrent_trials=at_once,
                reuse_actors=self._task.kind == "tune_reuse",
            ),
            run_config=tune.RunConfig(
                storage_path=f"{self._task.folder}/tune",
                name=f"{self._task.kind}-{time.monotonic_ns()}",
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
        stop = time.monotonic()
        if results.num_errors:
            raise RuntimeError(str(results.errors[0])[-300:])
        found = (results[index].metrics for index in range(len(results)))
        ended = [one for one in found if one and "loss" in one]
        losses = {str(one["config"]["number"]): one["loss"] for one in ended}
        return _reply(self._work, self._task, start, stop, losses)


class InTurn:
    """Optuna asks for the trials that are fixed; adapters come and go on one model."""

    def __init__(self, given: Task) -> None:
        self._task, self._work = given, Work.read(given.folder)

    def load(self) -> Reply:
        dtype = self._task.variant.split()[0]
        self._lora = Lora(self._work, dtype, self._task.threads)
        for _ in self._lora.train(self._work.trials[0], [WARM_STEPS], WARM_STEPS):
            pass
        return {"dtype": self._task.variant, "bare": self._lora.bare()}

    def check(self) -> Reply:
        """Train the job that opens our service's pack, and keep what it begins with."""
        work, steps = self._work, len(self._work.warm)
        self._lora.save_start(WARM_TRIAL, Path(work.folder) / START)
        for _ in self._lora.train(WARM_TRIAL, [steps], steps, work.warm):
            trained = self._lora.held_out()
        return {"trained": trained}

    def round(self) -> Reply:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        losses: dict[str, float] = {}

        def objective(asked: optuna.Trial) -> tuple[float, float]:
            trial = self._work.trials[self._task.jobs[asked.suggest_int("index", 0, len(self._task.jobs) - 1)]]
            for _ in self._lora.train(trial, [self._task.size], self._task.size):
                losses[str(trial.number)] = self._lora.held_out()
            return losses[str(trial.number)], float(trial.parameters)

        study = optuna.create_study(directions=["minimize", "minimize"])
        for index in range(len(self._task.jobs)):
            study.enqueue_trial({"index": index})
        start = time.monotonic()
        study.optimize(objective, n_trials=len(self._task.jobs))
        return _reply(self._work, self._task, start, time.monotonic(), losses)


def _reply(work: Work, given: Task, start: float, stop: float, losses: dict[str, float]) -> Reply:
    """Tokens as if every trial had been trained to its end."""
    batch = len(work.order[0])
    tokens = len(given.jobs) * given.size * batch * ROWS
    return {"tokens": tokens, "start": start, "stop": stop, "losses": losses}


if __name__ == "__main__":
    arm = InTurn(task()) if task().kind == "optuna" else Tune(task())
    checks = {"check": arm.check} if isinstance(arm, InTurn) else {}
    answer({"load": arm.load, "round": arm.round, **checks})
