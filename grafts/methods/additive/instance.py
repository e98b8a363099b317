"""Prompts that are a function of the whole input: of x, the mean of the embeddings of a request's own tokens, in
training of those before the first that is learned."""

from __future__ import annotations

from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.ranges import Rows
from polygraft.grafts.spec import Slot, SpecError, Tokens


def smop(length: Rows = 5, k: int = 4, noise: float = 1.0) -> tuple[Slot, ...]:
    """A sparse mixture of prompts: p_c P_c, one of `k` short prompts, with p = softmax(L x), c = argmax p and x the
    mean of the embeddings of the request's own tokens (Choi et al. 2023, EMNLP).

    `noise` is the standard deviation of z in the scores L x (1 + z) of training, so that every prompt is tried.

    Deviations: None known. In training the input is what stands before the first learned token.

    Choose when: inputs are of several kinds and prompts must be short. It reads the whole prompt: no chunked prefill.
    """
    if k < 2:
        raise SpecError(f"peft: k: {k} leaves nothing to choose; give at least 2 prompts")
    return (Tokens(length=length, gate="highest", experts=k, noise=noise),)


def idpg(length: Rows = 5, hidden: int = 256) -> tuple[Slot, ...]:
    """A prompt made of the input: W2 relu(W1 x + b1) + b2 before the first layer, with x the mean of the input's
    embeddings (Wu et al. 2022, arXiv 2204.04497, the variant S-IDPG-DNN). It starts at W2 = 0 and b2 a sample's text.

    Deviations: The paper's x is a sentence encoding of a pretrained encoder, or as a variant the mean of GloVe vectors;
    ours is the mean of the backbone's own embeddings, which needs no second pass. The PHM layers and the prompts at
    deeper layers are left out.

    Choose when: one fixed prompt is too little for varied inputs. It reads the whole prompt: no chunked prefill.
    """
    if hidden < 1:
        raise SpecError(f"peft: hidden: {hidden} is not a size; give at least 1")
    return (Tokens(length=length, gate="relu", experts=hidden),)


METHODS = (
    Method("smop", "ACL Anthology 2023.emnlp-main.884", 3e-2, smop),
    Method("idpg", "arXiv 2204.04497", 3e-3, idpg),
)
