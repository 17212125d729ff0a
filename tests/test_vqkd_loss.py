"""Eq. (2): the cosine to the teacher and the two stop-gradient terms."""
import torch

from vqkd import VQKD, l2, vqkd_loss


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


def test_the_cosine_is_that_of_each_patch_averaged():
    o, t, h = torch.randn(2, 3, 4), torch.randn(2, 3, 4), l2(torch.randn(2, 3, 8))
    by_hand = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(o.flatten(0, 1), t.flatten(0, 1))]
    assert abs(vqkd_loss(o, t, h, h)[1]["cosine"].item() - sum(by_hand) / 6) < 1e-6


def test_the_decoder_sees_a_map_of_codes_and_its_patches_name_the_teachers_features():
    model = VQKD((16, 24), 8, 32, 1, 2, 2, 12, 4, (5,)).eval()                # 2 x 3 patches, codes of 4 numbers
    v, seen = l2(torch.randn(2, 6, 4)), []
    model.decoder.patch_embed.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    o = model.decode(v)
    for i in range(6):                                       # code i lies in row i // 3, column i % 3
        assert torch.equal(seen[0][:, :, i // 3, i % 3], v[:, i])
    tokens = model.decoder(seen[0])                          # (B, 1 + N, D), [CLS] first, after the final norm
    torch.testing.assert_close(o, model.decode_task_layer(tokens)[:, 1:])
