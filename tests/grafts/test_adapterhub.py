"""AdapterHub's folders, against the forward passes of its library written down as hooks on transformers' models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import adapterhub
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.formats.read import read
from polygraft.grafts.runtime.attention import WholeSequences
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.route import Rows, Span
from polygraft.grafts.runtime.stacks import Resident
from polygraft.launch.demo.oracle.plain import plain_model
from tests.grafts.oracle.row import relative

IDS = torch.tensor([5, 17, 300, 42, 8, 511, 0, 99])
NAME = "task"
BOTTLENECK: dict[str, object] = {
    "adapter_residual_before_ln": False,
    "architecture": None,
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights": "bert",
    "inv_adapter": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_layer": False,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "use_gating": False,
}
SEQ = BOTTLENECK
DOUBLE = BOTTLENECK | {"original_ln_before": False, "mh_adapter": True, "non_linearity": "swish"}
PARALLEL = BOTTLENECK | {"original_ln_before": False, "is_parallel": True, "scaling": 4.0, "reduction_factor": 8}
PREFIX = {"architecture": "prefix_tuning", "flat": False, "prefix_length": 3, "bottleneck_size": 6, "dropout": 0.0}
PREFIX |= {"non_linearity": "tanh", "use_gating": False, "leave_out": [], "shared_gating": True}
LLAMA = ("model.layers.{}.attention_adapters", "model.layers.{}.output_adapters")
GPT2 = ("transformer.h.{}.attention_adapters", "transformer.h.{}.output_adapters")
BERT = ("bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output")
Hook = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def written(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    save_file(dict(tensors), folder / adapterhub.WEIGHTS)
    described = {"config": config, "hidden_size": 64, "model_type": "llama", "name": NAME, "version": "adapters.1.2.0"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def bottlenecks(
    places: tuple[str, ...], size: int | Mapping[int, int], layers: tuple[int, ...] = (0, 1)
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    found: dict[str, Tensor] = {}
    for layer in layers:
        for place in places:
            r, stem = size if isinstance(size, int) else size[layer], f"{place.format(layer)}.adapters.{NAME}."
            shapes = {"adapter_down.0.weight": (r, 64), "adapter_down.0.bias": (r,)}
            shapes |= {"adapter_up.weight": (64, r), "adapter_up.bias": (64,)}
            found |= {stem + end: 0.3 * torch.randn(s, generator=generator) for end, s in shapes.items()}
    return found


def up(x: Tensor, p: Mapping[str, Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """The library's Adapter without its residual connection."""
    down = act(F.linear(x, p["adapter_down.0.weight"], p["adapter_down.0.bias"]))
    return F.linear(down, p["adapter_up.weight"], p["adapter_up.bias"])


def theirs(folder: Path, tensors: Mapping[str, Tensor], hooks: Mapping[str, tuple[str, str, Hook]]) -> Tensor:
    """Logits with y <- hook(y, x, parts) after modules: of a place its module's path, and that whose input is x."""
    model = plain_model(folder, torch.float32)
    for place, (module, source, hook) in hooks.items():
        for layer in (0, 1):
            stem = f"{place.format(layer)}.adapters.{NAME}."
            parts = {key.removeprefix(stem): value for key, value in tensors.items() if key.startswith(stem)}
            if parts:
                attach(model, module.format(layer), source.format(layer), hook, parts)
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS[None]).logits[0]
    return found


def attach(model: nn.Module, module: str, source: str, hook: Hook, parts: Mapping[str, Tensor]) -> None:
    seen: list[Tensor] = []
    model.get_submodule(source).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),
        with_kwargs=True,
    )

    def after(_: nn.Module, __: object, y: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        x = seen.pop()
        return (hook(y[0], x, parts), *y[1:]) if isinstance(y, tuple) else hook(y, x, parts)

    model.get_submodule(module).register_forward_hook(after)


def read_on(folder: Path, backbone: Backbone) -> tuple[BoundGraft, Mapping[str, Tensor]]:
    return read(folder, BackboneFiles(backbone.folder), backbone.fingerprint)


def ours(backbone: Backbone, graft: BoundGraft, values: Mapping[str, Tensor]) -> Tensor:
    rows = Rows(IDS, torch.arange(len(IDS)) + graft.prefix_length, (Span(0, len(IDS), 0),))
    stacks = backbone.stacks([Resident("g", graft, values)])
    with torch.inference_mode():
        return backbone.logits(backbone.forward(rows, stacks, WholeSequences(((0, len(IDS)),), backbone.shape)))


def serial(act: Callable[[Tensor], Tensor]) -> Hook:
    return lambda y, x, p: y + up(y, p, act)


def test_a_bottleneck_after_every_layer_reads_the_residual_stream(tiny_folder: Path, tmp_path: Path) -> None:
    """seq_bn: the feed-forward's output h and the stream r give h + W(h + r) + r."""
    tensors = bottlenecks(LLAMA[1:], 4)
    backbone = Backbone.load(tiny_folder, torch.float32)
    graft, values = read_on(written(tmp_path, SEQ, tensors), backbone)
    expected = theirs(tiny_folder, tensors, {LLAMA[1]: ("model.layers.{}", "model.layers.{}", serial(F.relu))})
    assert relative(ours(backbone, graft, values), expected) < 1e-5


@pytest.mark.parametrize("scaling", [1.0, 2.5, "learned", "channel"])
@pytest.mark.parametrize(
    ("arch", "places", "modules"),
    [
        ("llama", LLAMA, ("model.layers.{}.self_attn", "model.layers.{}.mlp")),
        ("gpt2", GPT2, ("transformer.h.{}.attn", "transformer.h.{}.mlp")),
        ("bert", BERT, ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense")),
    ],
)
def test_two_bottlenecks_a_layer_read_the_sublayers_outputs(
    arch: str,
    places: tuple[str, str],
    modules: tuple[str, str],
    scaling: float | str,
    tiny_folders: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    """double_seq_bn: h + s W(h), before the residual sum."""
    tensors = bottlenecks(places, 4)
    if isinstance(scaling, str):
        for place in places:
            for layer in (0, 1):
                size = 1 if scaling == "learned" else 64
                tensors[f"{place.format(layer)}.adapters.{NAME}.scaling"] = 1 + torch.arange(size) / size

    def hook(y: Tensor, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return y + (scaling if isinstance(scaling, float) else p["scaling"]) * up(y, p, F.silu)

    backbone = Backbone.load(tiny_folders[arch], torch.float32)
    graft, values = read_on(written(tmp_path, DOUBLE | {"scaling": scaling}, tensors), backbone)
    hooks = {place: (module, module, hook) for place, module in zip(places, modules, strict=True)}
    assert relative(ours(backbone, graft, values), theirs(backbone.folder, tensors, hooks)) < 1e-5


def test_a_parallel_bottleneck_of_bert_reads_the_feed_forwards_input(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    tensors = bottlenecks(BERT[1:], 8)
    backbone = Backbone.load(tiny_folders["bert"], torch.float32)
    graft, values = read_on(written(tmp_path, PARALLEL, tensors), backbone)

    def hook(y: Tensor, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return y + 4.0 * up(x, p, F.relu)

    layer = "bert.encoder.layer.{}"
    expected = theirs(
        backbone.folder, tensors, {BERT[1]: (f"{layer}.output.dense", f"{layer}.intermediate.dense", hook)}
    )
    assert relative(ours(backbone, graft, values), expected) < 1e-5


def test_layers_may_differ_in_size_or_have_none(tiny_folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    place = {LLAMA[1]: ("model.layers.{}", "model.layers.{}", serial(F.relu))}
    for number, (change, tensors) in enumerate(
        [
            ({"reduction_factor": {"0": 32, "default": 8}}, bottlenecks(LLAMA[1:], {0: 2, 1: 8})),
            ({"leave_out": [0]}, bottlenecks(LLAMA[1:], 4, layers=(1,))),
        ]
    ):
        (folder := tmp_path / str(number)).mkdir()
        found = ours(backbone, *read_on(written(folder, SEQ | change, tensors), backbone))  # type: ignore[operator]
        assert relative(found, theirs(tiny_folder, tensors, place)) < 1e-5


@pytest.mark.parametrize("left_out", [[], [0]])
@pytest.mark.parametrize("flat", [True, False])
def test_a_prefix_has_no_positions_and_the_prompt_starts_at_the_first(
    flat: bool, left_out: list[int], tiny_folder: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(5)
    layers = [layer for layer in (0, 1) if layer not in left_out]
    stem, width = f"model.prefix_tuning.prefix_tunings.{NAME}.self_prefix.", 2 * len(layers) * 32
    shapes = {"wte.weight": (3, 64), "control_trans.0.weight": (6, 64), "control_trans.0.bias": (6,)}
    shapes |= {"control_trans.2.weight": (width, 6), "control_trans.2.bias": (width,)}
    p = {end: 0.5 * torch.randn(size, generator=generator) for end, size in shapes.items()}
    hidden = torch.tanh(F.linear(p["wte.weight"], p["control_trans.0.weight"], p["control_trans.0.bias"]))
    rows = F.linear(hidden, p["control_trans.2.weight"], p["control_trans.2.bias"])
    tensors = {stem + "control_trans": rows.flatten()} if flat else {stem + end: value for end, value in p.items()}
    backbone = Backbone.load(tiny_folder, torch.float32)
    found = read_on(written(tmp_path, PREFIX | {"flat": flat, "leave_out": left_out}, tensors), backbone)
    assert relative(ours(backbone, *found), prefixed(tiny_folder, rows, layers)) < 1e-5


def prefixed(folder: Path, rows: Tensor, layers: list[int]) -> Tensor:
    """Keys and values in the cache of some layers, behind which the prompt has the positions from 0."""
    model = plain_model(folder, torch.float32)
    states = rows.view(1, 3, 2 * len(layers), 2, 16).permute(2, 0, 3, 1, 4)
    cache = DynamicCache()
    mask = torch.full((1, 1, len(IDS), 3 + len(IDS)), float("-inf")).triu(4)
    for layer in (0, 1):
        if layer in layers:
            cache.update(states[2 * layers.index(layer)], states[2 * layers.index(layer) + 1], layer)
        else:
            cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), layer)
            hidden = mask.clone()
            hidden[..., :3] = float("-inf")
            model.get_submodule(f"model.layers.{layer}.self_attn").register_forward_pre_hook(
                lambda _, args, kwargs, hidden=hidden: (args, kwargs | {"attention_mask": hidden}), with_kwargs=True
            )
    with torch.no_grad():
        found: Tensor = model(
            input_ids=IDS[None], past_key_values=cache, attention_mask=mask, position_ids=torch.arange(len(IDS))[None]
        ).logits[0]
    return found


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (SEQ | {"mh_adapter": True}, "original_ln_before: true with mh_adapter reads"),
        (PARALLEL, "is_parallel: true"),
        (SEQ | {"phm_layer": True}, "phm_layer: True is not read"),
        (SEQ | {"inv_adapter": "nice"}, "inv_adapter: 'nice'"),
        (SEQ | {"use_gating": True}, "use_gating"),
        (SEQ | {"ln_before": True}, "ln_before"),
        (SEQ | {"original_ln_after": False}, "original_ln_after: False"),
        (SEQ | {"residual_before_ln": False}, "original_ln_before"),
        (SEQ | {"non_linearity": "leakyrelu"}, "non_linearity: 'leakyrelu'"),
        (SEQ | {"architecture": "lora"}, "architecture: 'lora' is not read"),
        (SEQ | {"leave_out": [1]}, r"layers.1.* are missing or unknown"),
        (SEQ | {"output_adapter": False}, "are missing or unknown"),
        (PREFIX, "are not the"),
        (PREFIX | {"use_gating": True}, "use_gating"),
    ],
)
def test_what_is_another_function_is_refused(
    config: Mapping[str, object], wrong: str, tiny_folder: Path, tmp_path: Path
) -> None:
    written(tmp_path, config, bottlenecks(LLAMA[1:], 4))
    with pytest.raises(FormatError, match=wrong):
        read_on(tmp_path, Backbone.load(tiny_folder, torch.float32))


def other_shapes(value: Tensor) -> list[Tensor]:
    return [value.sum(), value[:1].clone(), value[None], torch.cat([value, value]), value[..., None]]


@pytest.mark.parametrize("config", [SEQ | {"scaling": "learned"}, PREFIX], ids=["bottlenecks", "prefix"])
def test_a_tensor_of_any_other_shape_is_an_error_that_names_it(
    config: Mapping[str, object], tiny_folder: Path, tmp_path: Path
) -> None:
    backbone, tensors = Backbone.load(tiny_folder, torch.float32), bottlenecks(LLAMA[1:], 4)
    tensors |= {f"{LLAMA[1].format(layer)}.adapters.{NAME}.scaling": torch.ones(1) for layer in (0, 1)}
    if config is PREFIX:
        stem = f"model.prefix_tuning.prefix_tunings.{NAME}.self_prefix."
        shapes = {"wte.weight": (3, 64), "control_trans.0.weight": (6, 64), "control_trans.0.bias": (6,)}
        shapes |= {"control_trans.2.weight": (128, 6), "control_trans.2.bias": (128,)}
        tensors = {stem + end: torch.ones(size) for end, size in shapes.items()}
    read_on(written(tmp_path, config, tensors), backbone)
    for key, value in tensors.items():
        for odd in other_shapes(value):
            if odd.shape != value.shape:
                written(tmp_path, config, tensors | {key: odd.contiguous()})
                with pytest.raises(FormatError, match=r"shape \(.*\) is not \("):
                    read_on(tmp_path, backbone)


def test_prefixes_of_a_model_with_learned_positions_are_refused(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    written(tmp_path, PREFIX, {f"prefix_tuning.prefix_tunings.{NAME}.self_prefix.control_trans": torch.ones(8)})
    with pytest.raises(FormatError, match="prefix_tuning on gpt2: its prompt would start at another position"):
        read_on(tmp_path, Backbone.load(tiny_folders["gpt2"], torch.float32))


def test_pickled_weights_are_refused_and_a_missing_tensor_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    tensors = bottlenecks(LLAMA[1:], 4)
    written(
        tmp_path,
        SEQ,
        {
            key: value
            for key, value in tensors.items()
            if not key.endswith("layers.0.output_adapters.adapters.task.adapter_up.bias")
        },
    )
    with pytest.raises(FormatError, match=r"layers.0.output_adapters.adapters.task.adapter_up.bias is missing"):
        read_on(tmp_path, backbone)
    (tmp_path / adapterhub.WEIGHTS).rename(tmp_path / "pytorch_adapter.bin")
    with pytest.raises(FormatError, match=r"pytorch_adapter.bin can run code when loaded: convert it to safetensors"):
        read_on(tmp_path, backbone)
