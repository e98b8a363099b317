"""A tensor that a backward makes again is told by the step that gave it, whatever else lies at its place in memory."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from polygraft.grafts.runtime.recompute import recomputed


class Given:
    """x = 2 a, a square, and how often it was made again."""

    def __init__(self) -> None:
        self.a, self.made = torch.randn(4, 4, requires_grad=True), 0
        self.x = self.a * 2

    def make(self) -> Tensor:
        self.made += 1
        return self.a.detach() * 2


def test_x_and_its_views_are_not_kept_and_give_the_same_gradients() -> None:
    given, W = Given(), torch.randn(4, 3, requires_grad=True)
    with recomputed(given.x, given.make):
        y = (given.x @ W).sum() + (given.x.view(2, 2, 4) @ W).square().sum() + given.x[None].flatten().square().sum()
    alive = weakref.ref(given.x)
    del given.x
    assert alive() is None and given.made == 0
    y.backward()
    found = given.a.grad, W.grad
    plain, V = given.a.detach().requires_grad_(), W.detach().requires_grad_()
    x = plain * 2
    ((x @ V).sum() + (x.view(2, 2, 4) @ V).square().sum() + x[None].flatten().square().sum()).backward()
    assert given.made > 0 and all(map(torch.equal, found, (plain.grad, V.grad)))  # type: ignore[arg-type]


def test_others_at_the_same_place_in_memory_are_kept() -> None:
    """Its transpose has its address and its size."""
    given, W = Given(), torch.randn(4, 4, requires_grad=True)
    with recomputed(given.x, given.make):
        (given.x.T @ W).sum().backward()
    assert given.made == 0
    assert W.grad is not None and torch.equal(W.grad, (given.x.T).T @ torch.ones(4, 4))


def test_without_a_gradient_to_wait_for_nothing_is_made_again() -> None:
    given, W = Given(), torch.randn(4, 4, requires_grad=True)
    with recomputed(given.a.detach(), given.make):
        (given.a.detach() @ W).sum().backward()
    with torch.no_grad(), recomputed(given.x, given.make):
        assert torch.equal(given.x @ W, given.make() @ W)
    assert given.made == 1  # by the line above
