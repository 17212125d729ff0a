"""Eq. (2): the cosine to the teacher and the two stop-gradient terms."""
import torch

from vqkd import l2, vqkd_loss


def test_a_perfect_decoder_on_perfect_codes_costs_nothing():
    t, h = torch.randn(2, 9, 24), l2(torch.randn(2, 9, 8))
    loss, parts = vqkd_loss(3 * t, t, h, h)                          # the cosine does not see lengths
    assert loss.abs() < 1e-6 and abs(parts["cosine"] - 1) < 1e-6 and parts["commit"] == 0


def test_opposite_features_cost_two():
    t, h = torch.randn(2, 9, 24), l2(torch.randn(2, 9, 8))
    assert abs(vqkd_loss(-t, t, h, h)[0] - 2) < 1e-6


def test_commitment_pulls_the_vector_to_the_code_and_not_the_code_to_the_vector():
    o = t = torch.randn(1, 5, 6)
    h, v = l2(torch.randn(1, 5, 8)).requires_grad_(), l2(torch.randn(1, 5, 8)).requires_grad_()
    vqkd_loss(o, t, h, v)[0].backward()
    assert v.grad is None                                            # sg[l2(v)] in the term that is trained
    torch.testing.assert_close(h.grad, 2 * (h - v).detach() / h.numel())       # d/dh of the mean squared difference


def test_both_stop_gradient_terms_have_the_same_value():
    h, v = l2(torch.randn(2, 9, 8)), l2(torch.randn(2, 9, 8))
    _, parts = vqkd_loss(torch.randn(2, 9, 4), torch.randn(2, 9, 4), h, v)
    assert parts["commit"] == parts["codebook"]
    torch.testing.assert_close(parts["commit"] * 8, (h - v).square().sum(-1).mean())     # D times Eq. (2)'s


def test_beta_weighs_the_commitment_alone():
    args = torch.randn(2, 9, 4), torch.randn(2, 9, 4), l2(torch.randn(2, 9, 8)), l2(torch.randn(2, 9, 8))
    loss_0, parts = vqkd_loss(*args, beta=0)
    loss_3, _ = vqkd_loss(*args, beta=3)
    torch.testing.assert_close(loss_3 - loss_0, 3 * parts["commit"])
