"""The straight-through estimator: forward the code, backward the identity."""
import torch

from vqkd import VQKD, l2, straight_through


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


def test_the_decoder_teaches_the_encoder_through_the_codes():
    model, images, seen = VQKD(16, 8, 32, 1, 2, 1, 12, 4, (5,)), torch.rand(2, 3, 16, 16), []
    model.quantize.embedding.weight.copy_(l2(torch.randn(12, 4)))
    model.decoder.patch_embed.register_full_backward_hook(lambda layer, grad_in, grad_out: seen.append(grad_in[0]))
    o, h, v, z = model(images)
    h.retain_grad()
    o.sum().backward()
    torch.testing.assert_close(h.grad, seen[0].flatten(2).transpose(1, 2))   # what reaches the code, reaches h
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encode_task_layer.parameters())
