"""Methods that are not here, by the names one would ask for them with, and why."""

from __future__ import annotations

from collections.abc import Mapping

_REASONS: Mapping[tuple[str, ...], str] = {
    ("lst", "side-tuning"): "a side network fed by every layer needs a ninth op, a ladder beside the backbone",
    ("galore", "full"): "a dense gradient and optimiser state for W, for each job",
    ("osf",): "it trains all of W, by a dense gradient kept in the complement of W's largest singular directions",
    ("coda", "meft"): "another data flow through the backbone's own blocks",
    ("controlnet", "t2i-adapter", "ip-adapter"): "a copy of the encoder, or one of the condition; diffusion backbones",
    ("periodic-lora", "relora"): "it changes W, which others share",
    ("mixlora",): "an expert inside the feed-forward's nonlinearity, not beside it",
    ("lily",): "its experts' weights are a mean over all tokens of a batch, so that a row depends on who else is in it",
    ("shadow",): "a second network whose hidden states ride beside the backbone's, and whole layers that read both",
    ("ipa",): "a second model that multiplies the output's probabilities",
    ("x-lora", "xlora"): "its gates read the last layer of a first pass of the bare backbone, a second pass for every "
    "token; mole and meteora weigh trained LoRAs by what the layer itself reads",
    ("aprompt",): "trained queries are rows of attention that belong to no token",
    ("infoprompt", "ptp"): "its loss is of hidden states or of moved inputs, and a job's loss is of its tokens",
    ("autolora", "s3pet", "s3delta"): "two losses on two data sets in turn; `polygraft search` chooses sizes instead",
    ("laplace-lora",): "a posterior over trained weights, and no graft",
}
REFUSED: Mapping[str, str] = {name: reason for names, reason in _REASONS.items() for name in names}


def table() -> list[str]:
    """The lines of a page."""
    rows = [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for names, reason in _REASONS.items()]
    return ["| method | reason |", "|---|---|", *rows]
