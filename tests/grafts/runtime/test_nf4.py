"""QLoRA: grafts on a backbone in NF4 compute what PEFT computes on bitsandbytes' model, and what any method's oracle
computes on the weights that NF4 stands for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Params4bit  # type: ignore[attr-defined]
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import parse
from polygraft.grafts.init import initialise
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.linears.nf4 import Nf4
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.sites import Site
from polygraft.grafts.spec import SpecError
from polygraft.kernels.nf4.op import dequantise
from tests.grafts.oracle.row import LINEAR, Row, relative
from tests.grafts.oracle.table import ALL, METHODS
from tests.grafts.test_methods import batch, decoded, judged, ours
from tests.trainers.test_packed_equals_alone import assert_as_alone, jobs_of, pack_of, run

CHOSEN = [*METHODS, "pissa", "vera", "loha", "lpt"]
PACKED = {
    "qlora": "qlora(r=8, at=attn.[qv], dropout=0.2)",
    "dora": "dora(r=4, at=attn.v|ffn.down)",
    "loftq": "loftq(r=4, at=attn.*)",
    "pissa": "pissa(r=4, at=attn.v)",
    "ia3": "ia3",
}
SITES = (Site(0, "attn.k"), Site(1, "ffn.down"))


@pytest.fixture(scope="module")
def dense_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with each projection as bitsandbytes gives it back from NF4."""
    folder = tmp_path_factory.mktemp("dense")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEAR:
            module.weight.data = given_back(module.weight.data)
    model.save_pretrained(folder)
    return folder


def given_back(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    held = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")  # type: ignore[misc]
    return dequantize_4bit(held.data, held.quant_state)


@pytest.fixture(scope="module", params=CHOSEN)
def row(request: pytest.FixtureRequest) -> Row:
    return ALL[request.param]


@pytest.fixture(scope="module")
def fp64(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float64, quantise="nf4")


@pytest.fixture(scope="module")
def fp32(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, torch.float32, quantise="nf4")


def test_every_kind_of_method_has_its_oracles_logits_and_gradients(
    row: Row, fp64: Backbone, dense_folder: Path
) -> None:
    values, (prompts, slopes) = row.values(fp64.shape, seed=3), batch(fp64)
    expected, wanted = judged(row.oracle(dense_folder, values, torch.float64), prompts, slopes)
    company = [(row, values), (METHODS["lora"], METHODS["lora"].values(fp64.shape, seed=4))]
    found, gradients = ours(company, fp64, prompts, slopes)
    assert relative(found, expected) < 1e-9
    for tensor in (t.name for t in row.graft(fp64.shape).tensors if t.trained):
        assert relative(gradients[tensor], wanted[tensor]) < 1e-9, tensor


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_qlora_and_qdora_are_pefts_on_transformers_4_bit_model(method: str, fp32: Backbone, tiny_folder: Path) -> None:
    """Both in float32, forward and gradients, at weights that PEFT's model is given: 1e-5."""
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=asked, dtype=torch.float32, attn_implementation="eager", device_map="cpu"
    )
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, use_dora=method == "dora")
    model = get_peft_model(plain, config).train()  # nothing drops; in eval mode bitsandbytes multiplies in bf16 on CPU
    row = Row(f"{method}(r=4, alpha=8)")
    values, (prompts, slopes) = row.values(fp32.shape, seed=3), batch(fp32)
    values = {name: value.float() for name, value in values.items()}
    places = {}
    for name, value in values.items():
        _, layer, *site, part = name.split(".")
        module = model.base_model.model.model.layers[int(layer)].get_submodule(_path(".".join(site)))
        parameter = {
            "A": lambda m: m.lora_A["default"].weight,
            "B": lambda m: m.lora_B["default"].weight,
            "m": lambda m: m.lora_magnitude_vector["default"].weight,
        }[part](module)
        parameter.data = (value.T if part == "B" else value).contiguous()
        places[name] = parameter
    logits = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in prompts])
    (logits * torch.cat(slopes)).sum().backward()
    found, gradients = ours([(row, values)], fp32, prompts, slopes)
    assert relative(found, logits) < 1e-5
    for name, parameter in places.items():
        theirs = parameter.grad.T if name.endswith(".B") else parameter.grad
        assert relative(gradients[name], theirs) < 1e-4, name


def _path(site: str) -> str:
    from polygraft.launch.demo.oracle.plain import MODULES

    return MODULES[site]


def test_decoding_from_the_cache_gives_the_oracles_logits(fp32: Backbone, dense_folder: Path) -> None:
    row, ids = METHODS["dora"], batch(fp32)[0][1]
    values = {name: value.float() for name, value in row.values(fp32.shape, seed=5).items()}
    others = {name: value.float() for name, value in METHODS["ia3"].values(fp32.shape, seed=6).items()}
    residents = [
        Resident("own", row.graft(fp32.shape), values),
        Resident("other", METHODS["ia3"].graft(fp32.shape), others),
    ]
    oracle = row.oracle(dense_folder, {k: v.double() for k, v in values.items()}, torch.float32)
    assert relative(decoded(fp32, residents, ids, (9, 6, 1, 1, 1, 1, 1)), oracle.logits(ids)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("texts", [PACKED], ids=["all"])
@pytest.mark.equality("packed")
def test_packed_training_on_nf4_leaves_the_bits_of_training_alone(
    texts: dict[str, str], dtype: torch.dtype, tiny_folder: Path, one_thread: None
) -> None:
    backbone = Backbone.load(tiny_folder, dtype, training=True, quantise="nf4")
    jobs = jobs_of(20, texts)
    assert_as_alone(run(pack_of(backbone, jobs)), jobs, backbone)


def test_a_graft_of_a_quantised_backbone_is_refused_on_the_plain_one(
    fp32: Backbone, tiny_folder: Path, tmp_path: Path
) -> None:
    plain, graft = Backbone.load(tiny_folder, torch.float32), BoundGraft(parse("lora(r=4)"), fp32.shape)
    assert plain.fingerprint != fp32.fingerprint
    values = initialise(graft, fp32, seed=0, samples=())
    grown = native.save(tmp_path, graft, values, backbone=fp32.fingerprint)
    assert grown != native.save(tmp_path, graft, values, backbone=plain.fingerprint)
    with pytest.raises(FormatError, match="grown on backbone"):
        native.load(tmp_path / grown, shape=fp32.shape, backbone=plain.fingerprint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_kernels_codes_and_scales_stand_for_bitsandbytes_weights(dtype: torch.dtype) -> None:
    held = Nf4.of(torch.randn(96, 192, generator=torch.Generator().manual_seed(2)).to(dtype))
    found = dequantise(held.codes.view(96, -1), held.absmax().view(96, -1), dtype)
    assert held.state.nested and torch.equal(found, held.dense())


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # either default will do
def test_on_a_gpu_the_products_read_the_codes_and_add_the_branches() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.grafts.runtime.interpreted_nf4"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 9 and not [result for result in results if result["failure"]]


def test_a_weight_takes_half_a_byte_and_little_for_its_scales() -> None:
    held = Nf4.of(torch.randn(512, 512))
    inner = held.state.state2
    size = held.codes.nbytes + held.state.absmax.nbytes + inner.absmax.nbytes
    assert size < 0.52 * 512 * 512


def test_loftq_starts_from_the_best_low_rank_of_what_nf4_took(fp32: Backbone, tiny_folder: Path) -> None:
    """Li et al. 2023, algorithm 1 with T = 1, against numpy on bitsandbytes' own round trip."""
    plain = Backbone.load(tiny_folder, torch.float32)
    values = initialise(BoundGraft(parse("loftq(r=4, alpha=12)"), fp32.shape), fp32, seed=0, samples=())
    for site in SITES:
        lost = (plain.weight(site) - given_back(plain.weight(site))).double().numpy()
        U, S, Vh = np.linalg.svd(lost, full_matrices=False)
        found = 3.0 * values[f"0.{site}.B"].T @ values[f"0.{site}.A"]
        assert relative(found, torch.from_numpy((U[:, :4] * S[:4]) @ Vh[:4])) < 1e-4


def test_loftq_on_a_backbone_that_is_not_quantised_is_refused(tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32)
    with pytest.raises(SpecError, match="this one is not"):
        initialise(BoundGraft(parse("loftq"), backbone.shape), backbone, seed=0, samples=())


@pytest.mark.parametrize("iterations", [2, 5])
def test_a_backbone_of_several_iterations_and_its_graft_are_algorithm_1(iterations: int, tiny_folder: Path) -> None:
    """Li et al. 2023, algorithm 1: Q_t = q(W - A B^T), then A, B = SVD(W - Q_t), by bitsandbytes and PEFT's own SVD."""
    plain = Backbone.load(tiny_folder, torch.float32)
    backbone = Backbone.load(tiny_folder, torch.float32, quantise=f"loftq-4-{iterations}")
    graft = BoundGraft(parse(f"loftq(r=4, alpha=12, iterations={iterations})"), backbone.shape)
    values = initialise(graft, backbone, seed=0, samples=())
    for site in SITES:
        W = plain.weight(site)
        low = torch.zeros_like(W)
        errors = []
        for _ in range(iterations):
            Q = given_back(W - low)
            found = _low_rank_decomposition(W - Q, reduced_rank=4)
            low = found["L"] @ found["R"]
            errors.append(float((W - Q - low).norm()))
        assert relative(backbone.weight(site), Q) < 1e-6
        assert relative(3.0 * values[f"0.{site}.B"].T @ values[f"0.{site}.A"], low) < 1e-4
        assert errors[-1] < errors[0]


@pytest.mark.parametrize(
    ("text", "quantise", "message"),
    [
        ("loftq(r=4, iterations=5)", "nf4", "iterations: 5 of rank 4; .* by 1 iteration .* --quantise loftq-4-5"),
        ("loftq(r=4)", "loftq-4-2", "iterations: 1 of rank 4; .* by 2 iterations of rank 4"),
        ("loftq(r=8, iterations=2)", "loftq-4-2", "iterations: 2 of rank 8; .* by 2 iterations of rank 4"),
    ],
)
def test_loftq_of_another_backbones_iterations_is_refused_with_both(
    text: str, quantise: str, message: str, tiny_folder: Path
) -> None:
    backbone = Backbone.load(tiny_folder, torch.float32, quantise=quantise)
    with pytest.raises(SpecError, match=message):
        initialise(BoundGraft(parse(text), backbone.shape), backbone, seed=0, samples=())


@pytest.mark.parametrize(
    ("text", "message"), [("loftq(iterations=0)", "iterations: 0"), ("loftq(bits=2)", "bits: 2; .* have 4")]
)
def test_what_no_backbone_gives_loftq_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse(text)
