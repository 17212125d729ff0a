"""Eq. (1): z_i = argmin_j || l2(h_i) - l2(v_j) ||."""
import torch

from vqkd import VQKD, Codebook, l2, nearest_code


def small_tokenizer():
    """2 x 2 patches, 30 codes of 4 numbers."""
    return VQKD(16, 8, 32, 2, 2, decoder_depth=1, codes=30, code_dim=4, teacher_dims=(5,))


def test_nearest_code_is_the_argmin_of_the_distance_on_the_unit_sphere():
    h, v = torch.randn(3, 7, 8), torch.randn(20, 8)
    distance = (l2(h)[..., None, :] - l2(v)).norm(dim=-1)    # (3, 7, 20), Eq. (1) as printed
    assert torch.equal(nearest_code(h, v), distance.argmin(dim=-1))


def test_every_code_is_its_own_nearest_code():
    v = torch.randn(50, 16)
    assert torch.equal(nearest_code(v, v), torch.arange(50))


def test_lengths_play_no_part():
    h, v = torch.randn(2, 9, 8), torch.randn(12, 8)
    stretched = nearest_code(h * torch.rand(2, 9, 1) * 100, v * (0.1 + torch.rand(12, 1)))
    assert torch.equal(nearest_code(h, v), stretched)


def test_more_vectors_than_fit_in_one_part_are_looked_up_in_their_order():
    h, v = torch.randn(3, 3001, 4), torch.randn(6, 4)
    z = nearest_code(h, v)
    assert z.shape == (3, 3001)
    assert torch.equal(z, (l2(h) @ l2(v).T).argmax(dim=-1))


def test_looking_up_leaves_codebook_and_counters_alone():
    book = Codebook(10, 4)
    book.embedding.weight.copy_(l2(torch.randn(10, 4)))
    before = {k: t.clone() for k, t in book.state_dict().items()}
    book(l2(torch.randn(2, 5, 4)))
    assert all(torch.equal(t, before[k]) for k, t in book.state_dict().items())


def test_the_quantizer_computes_in_float32_under_autocast():
    h, v = l2(torch.randn(4000, 32)), l2(torch.randn(512, 32))
    exact = h.double() @ v.double().T
    with torch.autocast("cpu", torch.bfloat16):
        z = nearest_code(h, v)
        assert (h @ v.T).dtype == torch.bfloat16             # any other product
    lost = exact.max(dim=1).values - exact.gather(1, z[:, None])[:, 0]
    assert lost.max() < 1e-6                                 # bfloat16 picks codes 0.003 worse


def test_the_tokens_of_an_image_are_the_codes_nearest_to_the_vectors_of_its_patches():
    model, images = small_tokenizer().eval(), torch.rand(3, 3, 16, 16)
    model.quantize.embedding.weight.copy_(l2(torch.randn(30, 4)))
    tokens = model.encoder(2 * images - 1)                   # its own pixels: [-1, 1]
    h = l2(model.encode_task_layer(tokens)[:, 1:])           # [CLS] gets no code
    distance = (h[..., None, :] - model.quantize.embedding.weight).norm(dim=-1)
    assert model.encode(images).shape == (3, 4)
    assert torch.equal(model.encode(images), distance.argmin(dim=-1))

    _, h_seen, v, z = model(images)
    torch.testing.assert_close(h_seen, h)                    # on the unit sphere, as its code is
    assert torch.equal(z, model.encode(images))
    assert torch.equal(v, l2(model.quantize.embedding.weight)[z])


def test_the_tokenizer_has_absolute_positions_and_no_layer_scale():
    names = set(small_tokenizer().state_dict())
    assert {"encoder.pos_embed", "decoder.pos_embed"} <= names
    assert not any("gamma" in name or "relative_position" in name for name in names)
