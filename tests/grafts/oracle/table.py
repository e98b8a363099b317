"""The methods as rows: how we write them, and the independent model that says what they mean.

`METHODS` are the first eight, `ALL` those of the `family_*.py` files beside this one, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from math import sqrt
from pathlib import Path

from peft import IA3Config, LoraConfig, PrefixTuningConfig

from polygraft.launch.demo.oracle.naive import bitfit, ia3_after, ia3_before, lora, parallel, serial
from tests.grafts.oracle.row import LINEAR, Row

METHODS: Mapping[str, Row] = {
    "lora": Row("lora(r=8, alpha=16)", lambda: LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR)),
    "rslora": Row(
        "rslora(r=4, alpha=6, at=attn.[qv]|ffn.down)@1",
        lambda: LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "down_proj"],
            layers_to_transform=[1],
            use_rslora=True,
        ),
    ),
    "dora": Row("dora(r=4, alpha=8)", lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, use_dora=True)),
    "ia3": Row(
        "ia3",
        lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "prefix": Row("prefix(5)", lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "bitfit": Row("bitfit", hooks=lambda: {0: bitfit()}),
    "serial": Row("serial(8)", hooks=lambda: {0: serial()}),
    "parallel": Row("parallel(16)", hooks=lambda: {0: parallel(4.0)}),
}

# Unions, and the methods above that hooks can express too: two oracles that must agree.
MORE: Mapping[str, Row] = {
    "mix and match": Row(
        "prefix(3) + parallel(8, scale=2) + lora(r=2, alpha=4, at=attn.*)",
        hooks=lambda: {1: parallel(2.0), 2: lora(2.0)},
    ),
    "scale and shift of one output": Row(
        "bitfit(at=attn.*) + ia3 + lora(r=2, alpha=1)",  # written in another order than they apply in
        hooks=lambda: {2: ia3_before(), 3: lora(0.5), 1: ia3_after(), 0: bitfit()},
    ),
    "both adapters": Row(
        "serial(4) + parallel(4)@0 + rslora(r=4, alpha=2, at=q_proj)@1",
        hooks=lambda: {0: serial(), 1: parallel(4.0), 2: lora(2 / sqrt(4))},  # the serial one taps the bare output
    ),
    "input of a fused projection": Row(
        "ia3(at=attn.o, feedforward=attn.q|ffn.up)", hooks=lambda: {0: ia3_after(), 1: ia3_before()}
    ),
    "prefix by the cache": Row("prefix(4)"),
}


_FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("family_*.py"))
ALL: Mapping[str, Row] = METHODS | {
    name: row for family in _FAMILIES for name, row in import_module(f"{__package__}.{family}").ROWS.items()
}
