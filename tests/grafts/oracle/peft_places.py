"""Where PEFT's models keep tensors, for the rows of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peft import PeftModel
from torch import Tensor, nn

from polygraft.launch.demo.oracle.plain import MODULES, SHARED, Place, split

Find = Callable[[PeftModel, str, Tensor], Place]


def layer_of(model: PeftModel, name: str) -> nn.Module:
    """PEFT's module at the site of one of our tensors."""
    _, layer, site, _ = split(name)
    return model.get_submodule(f"base_model.model.model.layers.{layer}.{MODULES[site]}")


def parts(
    own: Mapping[str, str],
    shared: Mapping[str, str] | None = None,
    transposed: Mapping[str, tuple[int, int]] | None = None,
) -> Find:
    """A site's own parts lie in dictionaries of PEFT's layer by these names, shared ones in those of its model; two
    dimensions of the `transposed` ones are the other way round than ours."""

    def find(model: PeftModel, name: str, value: Tensor) -> Place:
        _, _, site, part = split(name)
        if site == SHARED:
            assert shared is not None
            kept = getattr(model.base_model, shared[part])["default"]
        else:
            kept = getattr(layer_of(model, name), own[part])["default"]
        kept = kept.weight if isinstance(kept, nn.Linear) else kept
        turned = (transposed or {}).get(part)
        return Place(kept, lambda t: t.transpose(*turned) if turned else t)

    return find
