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
    model = VQKD(16, 8, 32, 1, 2, decoder_depth=1, codes=12, code_dim=4, teacher_dims=(5,))
    model.quantize.embedding.weight.copy_(l2(torch.randn(12, 4)))
    seen = []

    def keep(layer, grad_in, grad_out):
        seen.append(grad_in[0])                              # what reaches the map of codes

    model.decoder.patch_embed.register_full_backward_hook(keep)
    o, h, v, z = model(torch.rand(2, 3, 16, 16))
    h.retain_grad()
    o.sum().backward()
    torch.testing.assert_close(h.grad, seen[0].flatten(2).transpose(1, 2))   # ... reaches h
    for p in model.encode_task_layer.parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0
