"""Images as rows: what a vision transformer's own `embeddings` makes of them, before its forward and not in it, so that
images with any number of virtual tokens lie side by side in one flat batch as sequences of tokens do."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Patches(nn.Module):
    """Stands where the class has its `embeddings`, and lets pass what `rows` has made.

    `bare` are the rows [n, hidden] of an image without content: the class token, and every place alone.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._inner = inner
        self.patch_embeddings = inner.get_submodule("patch_embeddings")  # the class looks up its dtype
        bare = inner.get_parameter("position_embeddings")[0].detach().clone()
        bare[:1] += inner.get_parameter("cls_token")[0].detach()
        self.bare = bare

    @staticmethod
    def of(base: nn.Module) -> Patches:
        """That of a model without its head, which gets it in place of its own."""
        patches = Patches(base.get_submodule("embeddings"))
        base.embeddings = patches
        return patches

    @torch.no_grad()
    def rows(self, pixels: Tensor) -> Tensor:
        """[b, n, hidden] of images [b, channels, height, width]."""
        return self._inner(pixels.to(self.bare.dtype))  # type: ignore[no-any-return]

    def forward(self, rows: Tensor, **_: object) -> Tensor:
        return rows
