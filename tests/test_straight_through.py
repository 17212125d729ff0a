"""The straight-through estimator: forward the code, backward the identity."""
import torch

from vqkd import straight_through


def test_straight_through_passes_the_gradient_unchanged():
    h, v = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 8)
    g = torch.randn(2, 9, 8)
    straight_through(h, v).backward(g)
    torch.testing.assert_close(h.grad, g)


def test_straight_through_shows_the_decoder_the_code():
    h, v = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    torch.testing.assert_close(straight_through(h, v), v)


def test_straight_through_gives_the_code_no_gradient():
    h, v = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    straight_through(h, v).sum().backward()
    assert v.grad is None
