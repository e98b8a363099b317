"""The servers of the benchmarks over HTTP, ours and vLLM's, and vLLM's client that drives both."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import httpx
import psutil
from harness import ArmFailed
from machine import cores
from material import GRAFTS, Material

MODEL = "smollm2"
ALL_CORES = "all cores"  # vLLM's engine on all of them; by itself it leaves one to its server
_READY_S, _RUN_S, _TAIL = 600.0, 1200.0, 400
_CONTEXT, _PROMPTS = 512, 16
_FORMS = {"chat": ("openai-chat", "/v1/chat/completions"), "text": ("openai", "/v1/completions")}
_PARTS = {  # of our service by the classes in the titles that Ray gives its processes
    ":ServeReplica:polygraft:ingress": "ingress",
    ":ProxyActor": "proxy",
    ":ServeController": "Serve's controller",
    ":Host": "engine",
}


def module(graft: int) -> str:
    """What a graft of the material is called as a model."""
    return f"graft-{graft}"


class Server(Protocol):
    """A process that serves the material's backbone and grafts."""

    url: str
    key: str

    def wait(self) -> None:
        """Return when it answers. Raises ArmFailed."""
        ...

    def pss(self) -> int: ...

    def cpu(self) -> Mapping[str, float]:
        """CPU seconds so far of its processes, by what they are; never raises."""
        ...

    def close(self) -> None: ...


class Ours:
    """`polygraft up` with a home of its own; grafts are loaded as vLLM is told of them, by name and folder. `options`
    are more of its own, `settings` more of its environment."""

    def __init__(
        self,
        home: Path,
        grafts: Mapping[str, Path] | None = None,
        *,
        options: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        grafts, self._home = grafts or {}, home
        roots = json.dumps(sorted({str(folder.parent) for folder in grafts.values()}))
        self._environment = os.environ | {"POLYGRAFT_HOME": str(home), "POLYGRAFT_GRAFT_ROOTS": roots}
        self._environment |= settings or {}
        for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # the service sets its own
            self._environment.pop(name, None)
        try:
            self._polygraft("up", "--port", "0", "--timeout", f"{_READY_S:.0f}", *options)
            service = json.loads((home / "run" / "service.json").read_text())
            self.url, self._pid = service["url"], service["pid"]
            self.key = (home / "api_key").read_text().strip()
            for name, folder in grafts.items():
                self._load(name, folder)
        except BaseException:  # it lives on by itself, however far it came
            with suppress(ArmFailed):
                self.close()
            raise

    def wait(self) -> None: ...

    def pss(self, of: Sequence[str] = ("",)) -> int:
        """Of its processes whose titles have one of the words `of`."""
        return pss_of(self._pid, of)

    def cpu(self) -> Mapping[str, float]:
        return _cpu(self._pid, _PARTS)

    def close(self) -> None:
        self._polygraft("down")

    def _load(self, name: str, folder: Path) -> None:
        body = {"lora_name": name, "lora_path": str(folder)}
        headers = {"Authorization": f"Bearer {self.key}"}
        answer = httpx.post(f"{self.url}/v1/load_lora_adapter", json=body, headers=headers, timeout=120)
        if answer.status_code != 200:
            raise ArmFailed(answer.text[:_TAIL])

    def _polygraft(self, *command: str) -> None:
        words = [sys.executable, "-m", "polygraft.launch", *command]
        done = subprocess.run(words, env=self._environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise ArmFailed(f"polygraft {command[0]}: {(done.stderr or done.stdout)[-_TAIL:]}")


class Vllm:
    """`vllm serve` in its own environment, which a server with LoRA is started apart for: it slows the bare model.
    `variant` is ALL_CORES, or another word for its own choice."""

    key = "none"

    def __init__(self, folder: Path, python: Path, *, lora: bool, variant: str) -> None:
        material = Material.read(str(folder))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = ["--host", "127.0.0.1", "--port", f"{port}", "--served-model-name", MODEL, "--dtype", "bfloat16"]
        options += ["--max-model-len", f"{_CONTEXT}", "--max-num-seqs", f"{_PROMPTS}", "--enable-prefix-caching"]
        if lora:
            options += ["--enable-lora", "--max-loras", f"{GRAFTS}", "--max-lora-rank", "16", "--lora-modules"]
            options += [f"{module(graft)}={material.graft_folder(graft)}" for graft in range(GRAFTS)]
        environment = _vllm_environment(folder) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
            environment.pop(name, None)
        if variant == ALL_CORES:
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{cores() - 1}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        self._log = folder / f"vllm-{port}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python.with_name("vllm")), "serve", material.backbone, *options],
                stdout=log,
                stderr=log,
                env=environment,
            )

    def wait(self) -> None:
        until = time.monotonic() + _READY_S
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(1)
        raise ArmFailed(f"vllm serve: {self._log.read_text(errors='replace')[-_TAIL:]}")

    def pss(self) -> int:
        return pss_of(self._process.pid)

    def cpu(self) -> Mapping[str, float]:
        return _cpu(self._process.pid, {})

    def close(self) -> None:
        _end(self._process)


class Client:
    """`vllm bench serve`, unchanged, in forks of one process, which starts with the first of them
    (over_http_client.py)."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._folder = python, folder
        self._tokenizer = Material.read(str(folder)).backbone
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, server: Server, form: str, *, lora: bool, options: Mapping[str, int]) -> Mapping[str, float]:
        """What it writes down of a run. Raises ArmFailed."""
        backend, endpoint = _FORMS[form]
        result = self._folder / f"result-{time.monotonic_ns()}.json"
        words = ["bench", "serve", "--backend", backend, "--endpoint", endpoint]
        words += ["--base-url", server.url, "--model", MODEL, "--tokenizer", self._tokenizer]
        words += ["--dataset-name", "random", "--temperature", "0", "--disable-tqdm", "--metric-percentiles", "99"]
        words += ["--header", f"Authorization=Bearer {server.key}"]
        words += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
        words += [word for name, value in options.items() for word in (f"--{name}", f"{value}")]
        if lora:
            words += ["--lora-assignment", "round-robin", "--lora-modules", *map(module, range(GRAFTS))]
        log = result.with_suffix(".log")
        status = self._done({"words": words, "log": str(log)})
        if status != 0 or not result.exists():
            raise ArmFailed(f"vllm bench serve ({status}): {log.read_text(errors='replace')[-_TAIL:]}")
        found: Mapping[str, float] = json.loads(result.read_text())
        return found

    def close(self) -> None:
        if self._process is not None:
            _end(self._process)

    def _done(self, command: Mapping[str, object]) -> int:
        """Its exit status, once it is over."""
        if self._process is None:
            self._process = subprocess.Popen(
                [str(self._python), "-P", str(Path(__file__).with_name("over_http_client.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=_vllm_environment(self._folder),
            )
            self._hear(self._process)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(command)}\n".encode())
        return self._hear(self._process)

    def _hear(self, process: subprocess.Popen[bytes]) -> int:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], _RUN_S)[0]:
            raise ArmFailed(f"vllm bench serve took more than {_RUN_S:.0f} s")
        if not (line := process.stdout.readline()):
            raise ArmFailed("the process of vllm bench serve ended")
        return int(line)


def _vllm_environment(folder: Path) -> dict[str, str]:
    """Its command asks for the version of a distribution called vllm, which vllm-cpu has under its own name."""
    metadata = folder / "names" / "vllm-0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(metadata.parent.parent)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    tree = _tree(process.pid)
    process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=20)
    for one in alive:
        with suppress(psutil.Error):
            one.kill()
    process.wait()


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def pss_of(pid: int, of: Sequence[str] = ("",)) -> int:
    """Bytes of the process and all below it, those whose titles have one of the words `of`."""
    total = 0
    for process in _tree(pid):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if not any(word in title for word in of):
                continue
            memory = process.memory_full_info()
            total += int(getattr(memory, "pss", memory.uss))
    return total


def _cpu(pid: int, parts: Mapping[str, str]) -> Mapping[str, float]:
    """By part, "others" for what is none of them."""
    found = {**dict.fromkeys(parts.values(), 0.0), "others": 0.0}
    for process in _tree(pid):
        with suppress(psutil.Error):
            title, times = " ".join(process.cmdline()), process.cpu_times()
            ray = title.startswith("ray::")
            part = next((name for word, name in parts.items() if ray and word in title), "others")
            found[part] += times.user + times.system
    return found
