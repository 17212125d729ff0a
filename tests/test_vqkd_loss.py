"""Eq. (2): the cosine to the teacher and the two stop-gradient terms."""
import torch

from vqkd import VQKD, l2, vqkd_loss


def test_a_perfect_decoder_on_perfect_codes_costs_nothing():
    t, h = torch.randn(2, 9, 24), l2(torch.randn(2, 9, 8))
    loss, parts = vqkd_loss(3 * t, t, h, h)                  # the cosine does not see lengths
    assert loss.abs() < 1e-6 and abs(parts["cosine"] - 1) < 1e-6 and parts["commit"] == 0


def test_opposite_features_cost_two():
    t, h = torch.randn(2, 9, 24), l2(torch.randn(2, 9, 8))
    assert abs(vqkd_loss(-t, t, h, h)[0] - 2) < 1e-6


def test_commitment_pulls_the_vector_to_the_code_and_not_the_code_to_the_vector():
    o = t = torch.randn(1, 5, 6)
    h = l2(torch.randn(1, 5, 8)).requires_grad_()
    v = l2(torch.randn(1, 5, 8)).requires_grad_()
    vqkd_loss(o, t, h, v)[0].backward()
    assert v.grad is None                                    # sg[l2(v)] in the trained term
    expected = 2 * (h - v).detach() / h.numel()              # d/dh of the mean squared difference
    torch.testing.assert_close(h.grad, expected)


def test_the_decoder_learns_from_the_cosine_of_its_patches():
    o, t = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    h, v = l2(torch.randn(2, 5, 8)), l2(torch.randn(2, 5, 8))
    vqkd_loss(o, t, h, v)[0].backward()
    by_hand = o.detach().clone().requires_grad_()
    cosine = (by_hand * t).sum(-1) / (by_hand.norm(dim=-1) * t.norm(dim=-1))
    (1 - cosine.mean()).backward()
    torch.testing.assert_close(o.grad, by_hand.grad)


def test_what_is_only_logged_keeps_no_graph():
    o, h = torch.randn(2, 5, 6, requires_grad=True), l2(torch.randn(2, 5, 8)).requires_grad_()
    loss, parts = vqkd_loss(o, torch.randn(2, 5, 6), h, l2(torch.randn(2, 5, 8)))
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_the_loss_of_bfloat16_features_is_computed_in_float32():
    o, t = torch.randn(2, 5, 6).bfloat16(), torch.randn(2, 5, 6).bfloat16()
    h = l2(torch.randn(2, 5, 8))
    loss, parts = vqkd_loss(o, t, h, h)
    assert loss.dtype == parts["cosine"].dtype == torch.float32
    torch.testing.assert_close(loss, vqkd_loss(o.float(), t.float(), h, h)[0])


def test_both_stop_gradient_terms_have_the_same_value():
    h, v = l2(torch.randn(2, 9, 8)), l2(torch.randn(2, 9, 8))
    _, parts = vqkd_loss(torch.randn(2, 9, 4), torch.randn(2, 9, 4), h, v)
    assert parts["commit"] == parts["codebook"]
    equation_2 = (h - v).square().sum(-1).mean()             # a sum over D, ours is the mean
    torch.testing.assert_close(parts["commit"] * 8, equation_2)


def test_beta_weighs_the_commitment_alone():
    o, t = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    h, v = l2(torch.randn(2, 9, 8)), l2(torch.randn(2, 9, 8))
    loss_0, parts = vqkd_loss(o, t, h, v, beta=0)
    loss_3, _ = vqkd_loss(o, t, h, v, beta=3)
    torch.testing.assert_close(loss_3 - loss_0, 3 * parts["commit"])


def test_the_cosine_is_that_of_each_patch_averaged():
    o, t, h = torch.randn(2, 3, 4), torch.randn(2, 3, 4), l2(torch.randn(2, 3, 8))
    by_hand = [(a @ b / (a.norm() * b.norm())).item()
               for a, b in zip(o.flatten(0, 1), t.flatten(0, 1), strict=True)]
    assert abs(vqkd_loss(o, t, h, h)[1]["cosine"].item() - sum(by_hand) / 6) < 1e-6


def test_the_loss_of_two_teachers_is_the_mean_of_their_cosines():
    o, t, h = torch.randn(2, 4, 7), torch.randn(2, 4, 7), l2(torch.randn(2, 4, 3))
    loss, parts = vqkd_loss(o, t, h, h, widths={"clip": 5, "dino": 2})
    clip, dino = (vqkd_loss(o[..., s], t[..., s], h, h)[1]["cosine"]
                  for s in (slice(0, 5), slice(5, 7)))
    torch.testing.assert_close(parts["cosine_clip"], clip)
    torch.testing.assert_close(parts["cosine_dino"], dino)
    torch.testing.assert_close(parts["cosine"], (clip + dino) / 2)
    torch.testing.assert_close(loss, 1 - (clip + dino) / 2)


def test_each_teacher_has_a_decoder_head_of_its_own():
    model = VQKD(16, 8, 32, 1, 2, decoder_depth=1, codes=12, code_dim=4, teacher_dims=(5, 7))
    model.decode(l2(torch.randn(2, 4, 4)))[..., 5:].sum().backward()
    assert model.more_decode_task_layers[0][2].weight.grad.abs().sum() > 0
    assert model.decode_task_layer[2].weight.grad.abs().sum() == 0


def test_the_decoder_sees_a_map_of_codes_and_its_patches_name_the_teachers_features():
    model = VQKD((16, 24), 8, 32, 1, 2, decoder_depth=2, codes=12, code_dim=4, teacher_dims=(5,))
    model.eval()
    v, seen = l2(torch.randn(2, 6, 4)), []                   # 2 x 3 patches, codes of 4 numbers
    model.decoder.patch_embed.register_forward_pre_hook(lambda layer, x: seen.append(x[0]))
    o = model.decode(v)
    for i in range(6):                                       # code i: row i // 3, column i % 3
        assert torch.equal(seen[0][:, :, i // 3, i % 3], v[:, i])
    tokens = model.decoder(seen[0])                          # (B, 1 + N, D), [CLS] first
    torch.testing.assert_close(o, model.decode_task_layer(tokens)[:, 1:])
