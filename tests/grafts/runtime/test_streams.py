"""A job that is resumed draws the masks and noise that it would have drawn: numbers stay, whatever is renamed."""

from __future__ import annotations

from polygraft.grafts.runtime.keys import BranchKey, NoisyKey
from polygraft.grafts.runtime.streams import STREAMS, stream
from polygraft.grafts.sites import Site

# Of layer 3's attn.q, without a bias and with one.
BRANCHES = {
    ("input", "identity"): (1792739718, -462542929),
    ("input", "relu"): (-1124039363, 122767372),
    ("input", "gelu"): (-624483696, 1414191908),
    ("input", "silu"): (212212540, 167605928),
    ("input", "tanh"): (-833455002, -1702890119),
    ("output", "identity"): (-2029186342, 2013598157),
    ("output", "relu"): (-1487849792, -198496357),
    ("output", "gelu"): (-1063874195, -1489978189),
    ("output", "silu"): (385329345, -91811521),
    ("output", "tanh"): (-737947749, 1761972974),
}
NOISE = {"input": -1619434173, "output": -1329502363}


def test_every_stream_has_the_number_it_always_had() -> None:
    site = Site(3, "attn.q")
    branches = {BranchKey(*key, bias): numbers[bias] for key, numbers in BRANCHES.items() for bias in (False, True)}  # type: ignore[arg-type]
    noise = {NoisyKey(tap): number for tap, number in NOISE.items()}  # type: ignore[arg-type]
    assert {key: stream(site, key) for key in STREAMS} == branches | noise
    assert stream(Site(0, "ffn.down"), BranchKey("input", "identity")) == 414417839
