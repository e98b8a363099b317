"""Names that one would ask for and that are no method here, each with the reason or what to write in its place."""

from __future__ import annotations

from collections.abc import Mapping

_REASONS: Mapping[tuple[str, ...], str] = {
    ("lst", "side-tuning"): "a side network fed by every layer needs a ninth op, a ladder beside the backbone",
    ("galore",): "a dense gradient of W for each job, projected",
    (
        "full",
    ): "a dense gradient and optimiser state for all of W, for each job; child-tuning(p=1, at=...) trains a few "
    "projections whole",
    ("osf",): "it trains all of W, by a dense gradient kept in the complement of W's largest singular directions",
    ("coda", "meft"): "another data flow through the backbone's own blocks",
    ("controlnet", "t2i-adapter", "ip-adapter"): "a copy of the encoder, or one of the condition; diffusion backbones",
    ("periodic-lora", "relora"): "it changes W, which others share",
    ("mixlora",): "an expert inside the feed-forward's nonlinearity, not beside it",
    ("lily",): "its experts' weights are a mean over all tokens of a batch, so that a row depends on who else is in it",
    ("shadow",): "a second network whose hidden states ride beside the backbone's, and whole layers that read both",
    ("ipa",): "a second model that multiplies the output's probabilities",
    ("x-lora", "xlora"): "its gates read the last layer of a first pass of the bare backbone, a second pass for every "
    "token; output-gated-loras and meteora weigh trained LoRAs by what the layer itself gives or reads",
    ("aprompt",): "trained queries are rows of attention that belong to no token",
    ("infoprompt", "ptp"): "its loss is of hidden states or of moved inputs, and a job's loss is of its tokens",
    ("autolora", "s3pet", "s3delta"): "two losses on two data sets in turn; `polygraft search` chooses sizes instead",
    ("laplace-lora",): "a posterior over trained weights, and no graft",
}
# Names that promised more than there is, with what took their place and what it lacks to be the paper's.
_RENAMED: Mapping[str, tuple[str, str]] = {
    "adamix": (
        "averaged-adapters",
        "AdaMix also runs every sample a second time through other experts and draws the two predictions together",
    ),
    "far": (
        "moved-rows",
        "FAR primes the model for a share of the training before it chooses its nodes, and regroups them in memory",
    ),
    "fish-dip": (
        "moving-mask",
        "Fish-Dip finds its mask on the training samples of the largest loss, here it is found on every batch",
    ),
    "hyperformer": (
        "hypernet-adapter",
        "HyperFormer makes adapters of several tasks by one network from the tasks' embeddings; a job has one task",
    ),
    "moelora": (
        "job-gated-experts",
        "MOELoRA trains experts over several tasks with a gate for each; a job has one task",
    ),
    "mole": (
        "output-gated-loras",
        "MoLE normalises what its gate reads, flattens it over the whole sequence and balances the gate by a loss",
    ),
    "xprompt": ("pruned-prompt", "XPrompt rewinds the prompt after it is pruned and trains what is left once more"),
}
# What is here by another way than as a method of a union.
_ELSEWHERE: Mapping[tuple[str, ...], str] = {
    ("s4",): "it is a union over groups of layers, sized by a budget; `polygraft methods --s4 PARAMETERS` prints it",
    ("lorahub", "adaptersoup", "adapter-soup"): "it trains nothing: `polygraft grafts soup NAME MEMBERS...` makes the "
    "mean of trained grafts (AdapterSoup), with --examples FILE their weighted sum (LoRAHub)",
}
# A name that two methods of the literature have, by the one that is here: which it is.
NAMED_TWICE: Mapping[str, str] = {
    "cpt": "context-aware prompt tuning (arXiv 2410.17222), and not the survey's continual prompt tuning",
    "spt": "sensitivity-aware tuning (arXiv 2303.08566), and not selective prompt tuning, gated prompts by layer",
}
REFUSED: Mapping[str, str] = {
    **{name: reason for names, reason in (*_REASONS.items(), *_ELSEWHERE.items()) for name in names},
    **{old: f"{why}; what is here is called {new!r}" for old, (new, why) in _RENAMED.items()},
}


def table() -> list[str]:
    """The lines of a page."""
    rows = [(names, reason) for names, reason in (*_REASONS.items(), *_ELSEWHERE.items())]
    rows += [((old,), f"{why}; what is here is [{new}](methods/{new}.md)") for old, (new, why) in _RENAMED.items()]
    said = [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for names, reason in rows]
    return ["| name | reason |", "|---|---|", *said]
