"""Which channels meet in a block of one of several stages."""

from functools import cache

import torch
from torch import Tensor


@cache
@torch.inference_mode(False)  # kept for steps of training, though an evaluation may ask first
def butterfly(width: int, block: int, stage: int) -> Tensor:
    """Place in stage `stage` of every channel: in chunks of block * 2^stage, even half blocks before the odd ones."""
    channels = torch.arange(width)
    if stage == 0:
        return channels
    halves = channels.view(-1, 2 << stage, block // 2)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).reshape(-1)
