"""Ground truth of the sparse op: S made dense, one segment after the other in float32 (float64 stays float64)."""

import torch
from torch import Tensor

from polygraft.kernels.common.segments import Segments
from polygraft.kernels.sparse.order import SparseIndex


def sparse(x_TI: Tensor, y_TO: Tensor, v_NK: Tensor, index: SparseIndex, segments: Segments) -> Tensor:
    """y[s] += s.scale x[s] S^T with S of entries v at (row, column), or of rows v at row; autograd differentiates."""
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    out = y_TO.to(wide)
    for s in segments:
        place, values = index.places[s.first : s.last].unbind(1), v_NK[s.first : s.last].to(wide)
        values = values.squeeze(1) if len(place) == 2 else values
        S = torch.zeros(y_TO.shape[1], x_TI.shape[1], dtype=wide).index_put(place, values, accumulate=True)
        rows = out[s.start : s.stop] + s.scale * (x_TI[s.start : s.stop].to(wide) @ S.T)
        out = torch.cat([out[: s.start], rows, out[s.stop :]])
    return out.to(y_TO.dtype)
