"""Prompts that are a function of the whole input: of x, the mean of the embeddings of a request's own tokens.

SMoP has k short prompts, of which a router chooses one: p = softmax(L x), and p_c P_c with c = argmax p stands before
the input; in training the scores are L x (1 + z), z ~ N(0, 1), so that all prompts are tried (Choi et al. 2023, EMNLP).

IDPG makes the prompt by a network of two layers, W2 relu(W1 M(x) + b1) + b2, here before the first layer alone
(S-IDPG-DNN; Wu et al. 2022, arXiv 2204.04497). The paper's M(x) is a sentence's representation of a
pretrained encoder, and as a variant the mean of its GloVe vectors; ours is the mean of the backbone's own embeddings,
which needs no second pass.

In training the input are the tokens before the first that is learned, in serving the request's prompt.
"""

from __future__ import annotations

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.spec import Slot, SpecError, Tokens


def smop(length: int = 5, k: int = 4, noise: float = 1.0) -> tuple[Slot, ...]:
    """p_c P_c, one of `k` prompts, with p = softmax(L x), c = argmax p and x the mean of the input's embeddings (Choi
    et al. 2023, EMNLP); `noise` is the standard deviation of z in the scores L x (1 + z) of training."""
    if k < 2:
        raise SpecError(f"peft: k: {k} leaves nothing to choose; give at least 2 prompts")
    return (Tokens(length=length, gate="highest", experts=k, noise=noise),)


def idpg(length: int = 5, hidden: int = 256) -> tuple[Slot, ...]:
    """W2 relu(W1 x + b1) + b2 with x the mean of the input's embeddings, where the paper has an encoder's M(x) (Wu et
    al. 2022, arXiv 2204.04497); it starts at W2 = 0 and a sample's text b2."""
    if hidden < 1:
        raise SpecError(f"peft: hidden: {hidden} is not a size; give at least 1")
    return (Tokens(length=length, gate="relu", experts=hidden),)


METHODS = (
    Method("smop", "ACL Anthology 2023.emnlp-main.884", 3e-2, smop),
    Method("idpg", "arXiv 2204.04497", 3e-3, idpg),
)
