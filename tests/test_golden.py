"""Number for number like the authors' code: every golden file, for whatever its own `config` says.

"rel" is max|a - b| / max|b| over one tensor. Forward 2e-5, gradients 1e-4, scalar losses 5e-6
absolute, integers exact.
"""
import pytest
import torch
import torch.nn.functional as F

import pretrain
import vqkd
from extras.panels import attention_maps
from model import ViT
from support.optim import cosine_schedule, param_groups
from support.weights import build, load_backbone
from support.weights import read as load


def close(a, b, rel=2e-5):
    assert a.shape == b.shape
    worst = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12)
    assert worst <= rel, f"relative difference {worst:.2e}"


def gradients_close(module, grads):
    ours = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        close(ours[name], grad, rel=1e-4)


def without_index(state):
    """The official files hold the index buffers, which are derived; ours are not saved."""
    return {k: v for k, v in state.items() if not k.endswith("relative_position_index")}


def positions(c):
    return "absolute" if c["use_abs_pos_emb"] else "per_block"


# --- case 1: ViT ----------------------------------------------------------------------------------
def test_classifier_and_all_its_gradients_equal_the_authors(golden):
    g = golden("encoder_forward")
    c = g["config"]
    model = ViT(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"],
                in_channels=c["in_chans"], mlp_ratio=c["mlp_ratio"], positions=positions(c),
                layer_scale=c["init_values"], pool="mean" if c["use_mean_pooling"] else "cls",
                num_classes=c["num_classes"])
    model.load_state_dict(without_index(g["state_dict"]))
    read, *_ = load_backbone(dict(model=g["state_dict"], arch=dict(heads=c["num_heads"])),
                             pool=None, num_classes=None)    # its sizes come from the tensors
    assert torch.equal(read(g["images"]), model(g["images"]))
    for name, index in g["state_dict"].items():
        if name.endswith("relative_position_index"):
            assert torch.equal(model.relative_position_index, index)
    close(model.patch_embed(g["images"]), g["patch_embed"])
    outputs = model.features(g["images"])
    for ours, theirs in zip(outputs, g["block_outputs"], strict=True):
        close(ours, theirs)
    norm = model.fc_norm if c["use_mean_pooling"] else model.norm
    close(norm(outputs[-1]), g["all_tokens"])
    close(norm(outputs[-1])[:, 1:], g["patch_tokens"])
    close(model.pooled(g["images"]), g["pooled"])
    logits = model(g["images"])
    close(logits, g["logits"])
    loss = F.cross_entropy(logits, g["labels"])
    assert abs(loss.item() - g["loss"]) <= 5e-6
    loss.backward()
    gradients_close(model, g["grads"])


# --- case 2: MIM ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mim_forward", "mim_forward_separate_head"])
def test_both_heads_of_masked_image_modelling_equal_the_authors(golden, name):
    g = golden(name)
    c = g["config"]
    model = pretrain.BEiT(
        c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"], c["vocab_size"],
        layer_scale=c["init_values"], early_layer=c["early_layers"], head_depth=c["head_layers"],
        shared_head=bool(c["shared_lm_head"]), mlp_ratio=c["mlp_ratio"], in_channels=c["in_chans"],
        positions="shared" if c["use_shared_rel_pos_bias"] else "absolute")
    model.load_state_dict(without_index(g["state_dict"]))
    images = g["images"]
    mask = g["bool_masked_pos"]
    arch = dict(heads=c["num_heads"], early_layer=c["early_layers"])
    read = build(pretrain.BEiT, load(dict(model=g["state_dict"], arch=arch)))
    assert torch.equal(read(images, mask)[1], model(images, mask)[1])
    last, s = model.streams(images, mask)
    close(model.norm(last), g["features_1"])
    close((model.cls_pt_norm or model.norm)(s), g["features_2"])
    logits, logits_cls = model(images, mask)
    close(logits, g["logits_1"])
    close(logits_cls, g["logits_2"])
    assert torch.equal(g["token_ids"][mask], g["labels"])
    loss, (loss_mim, loss_cls) = pretrain.mim_loss(logits, logits_cls, g["token_ids"][mask])
    for ours, theirs in ((loss, "loss"), (loss_mim, "loss_1"), (loss_cls, "loss_2")):
        assert abs(ours.item() - g[theirs]) <= 5e-6
    loss.backward()
    gradients_close(model, g["grads"])
    close(attention_maps(model, images), g["last_selfattention_unmasked"])


# --- case 3: VQ-KD --------------------------------------------------------------------------------
def vqkd_model(g, tmp_path):
    c = g["config"]
    model = vqkd.VQKD(c["img_size"], c["patch_size"], c["embed_dim"], c["enc_depth"],
                      c["num_heads"], c["dec_depth"], c["n_embed"], c["code_dim"],
                      (c["decoder_out_dim"],), mlp_ratio=c["mlp_ratio"])
    # Loaded as a released file would be. Nothing else tells its heads, as they have not 64 numbers.
    file = dict(model=g["state_dict"], arch=dict(heads=c["num_heads"]))
    torch.save(file, tmp_path / "released.pt")
    vqkd.continue_from(model, tmp_path / "released.pt")
    read = vqkd.load_tokenizer(tmp_path / "released.pt").state_dict()        # sizes from the file
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())
    return model


def as_map(x, grid):
    return x.transpose(1, 2).reshape(x.shape[0], -1, *grid)


def test_tokenizer_and_all_its_gradients_equal_the_authors(golden, tmp_path):
    g = golden("vqkd_encode_decode")
    model = vqkd_model(g, tmp_path)
    grid, beta = model.encoder.grid, g["config"]["beta"]
    close(g["images"] * 2 - 1, g["pre_processed"])
    close(as_map(model.project(g["images"]), grid), g["to_quantizer_features"])
    assert torch.equal(model.encode(g["images"]), g["token_ids"])
    o, h, v, z = model(g["images"])
    assert torch.equal(z, g["token_ids"])
    close(as_map(v, grid), g["quantized"])
    close(o, g["reconstruction"])
    loss, parts = vqkd.vqkd_loss(o, g["target"], h, v, beta)
    assert abs(beta * parts["commit"].item() - g["emb_loss"]) <= 5e-6
    assert abs(1 - parts["cosine"].item() - g["rec_loss"]) <= 5e-6
    assert abs(loss.item() - g["loss"]) <= 5e-6
    loss.backward()
    gradients_close(model, g["grads"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"quantize.embedding.weight"} <= set(g["params_without_grad"])


def test_one_training_step_moves_the_codebook_as_the_authors_do(golden, tmp_path):
    g = golden("vqkd_encode_decode")
    model, c = vqkd_model(g, tmp_path), g["config"]
    _, h, _, z = model(g["images"])
    model.quantize.update(*vqkd.code_sums(h, z, c["n_embed"]), c["decay"])
    close(model.quantize.embedding.weight, g["codebook_after_train_forward"])
    close(model.quantize.cluster_size, g["cluster_size_after_train_forward"])


# --- case 4: quantizer ----------------------------------------------------------------------------
def vectors(z):
    return z.permute(0, 2, 3, 1).flatten(1, 2)                # (B, D, h, w) -> (B, N, D)


def test_five_training_steps_of_the_quantizer_equal_the_authors(golden):
    g = golden("quantizer_train")
    c = g["config"]
    quantizer = vqkd.Codebook(c["n_embed"], c["dim"])
    quantizer.embedding.weight.copy_(g["codebook_init"])
    quantizer.cluster_size.copy_(g["state_before"]["cluster_size"])
    for step in g["steps"]:
        z = vectors(step["z"]).clone().requires_grad_()
        h = vqkd.l2(z)
        v, ids = quantizer(h)
        assert torch.equal(ids.flatten(), step["indices"])
        loss = c["beta"] * F.mse_loss(h, v.detach())
        assert abs(loss.item() - step["loss"]) <= 5e-6
        out = vqkd.straight_through(h, v)
        close(out, vectors(step["z_q"]))
        (loss + (out * vectors(step["z_q_weight"])).sum()).backward()
        close(z.grad, vectors(step["z_grad"]), rel=1e-4)
        quantizer.update(*vqkd.code_sums(h, ids, c["n_embed"]), c["decay"])
        close(quantizer.embedding.weight, step["codebook"])
        close(quantizer.cluster_size, step["cluster_size"])
    # A look-up in evaluation gives the same ids, and by design leaves every counter alone.
    before = quantizer.cluster_size.clone()
    v, ids = quantizer(vqkd.l2(vectors(g["eval_step"]["z"])))
    assert torch.equal(ids.flatten(), g["eval_step"]["indices"])
    close(v, vectors(g["eval_step"]["z_q"]))
    assert torch.equal(quantizer.cluster_size, before)


@pytest.mark.parametrize("iterations", [1, 10])
def test_spherical_kmeans_equals_the_authors(golden, iterations):
    k = golden("quantizer_train")["kmeans"]["cosine"]
    suffix = "_after_1"
    if iterations > 1:
        suffix = ""
        iterations = k["num_iters"]
    means, bins = vqkd.kmeans(k["samples"], k["init"], iterations)
    close(means, k["means" + suffix])
    assert torch.equal(bins.long(), k["bins" + suffix].long())


def test_kmeans_start_and_the_moving_average_of_the_same_step_equal_the_authors(golden):
    g = golden("quantizer_train")
    c, g = g["config"], g["kmeans_init_forward"]
    h = vqkd.l2(vectors(g["z"]))
    quantizer = vqkd.Codebook(c["n_embed"], c["dim"])
    flat = h.flatten(0, 1)
    quantizer.embedding.weight.copy_(vqkd.kmeans(flat, flat[g["init_rows"]])[0])
    v, ids = quantizer(h)
    assert torch.equal(ids.flatten(), g["indices"])
    assert abs(c["beta"] * F.mse_loss(h, v).item() - g["loss"]) <= 5e-6
    quantizer.update(*vqkd.code_sums(h, ids, c["n_embed"]), c["decay"])
    close(quantizer.embedding.weight, g["state_after"]["embedding.weight"])


# --- case 6: schedules ----------------------------------------------------------------------------
def test_every_step_of_the_cosine_schedule_equals_the_authors(golden):
    for c in golden("schedules")["cosine"]:
        total = c["epochs"] * c["niter_per_ep"]
        warmup = c["warmup_steps"]
        if warmup <= 0:
            warmup = c["warmup_epochs"] * c["niter_per_ep"]
        assert len(c["values"]) == total
        for step, value in enumerate(c["values"].tolist()):
            start = c["start_warmup_value"] if step < warmup else 0              # ours starts at 0
            ours = start + cosine_schedule(step, c["base_value"] - start, c["final_value"], total,
                                           warmup)
            assert abs(ours - value) <= 1e-12 * c["base_value"]


class Named:
    """Stands in for a parameter: param_groups looks at its shape only."""

    def __init__(self, shape, requires_grad=True):
        self.ndim, self.requires_grad = len(shape), requires_grad


@pytest.mark.parametrize("tag", ["pretrain", "pretrain_separate_head", "vqkd"])
def test_weight_decay_skips_the_parameters_the_authors_skip(golden, tag):
    g = golden("schedules")["param_groups"][tag]
    named = [(name, Named(shape, name not in g["frozen"])) for name, shape in g["shapes"].items()]
    groups = param_groups(named, g["weight_decay"])
    ours = {}
    for group in groups:
        for name in group["names"]:
            ours[name] = [group["lr_scale"], group["weight_decay"]]
    assert ours == {name: list(pair) for name, pair in g["per_param"].items()}
    theirs = {frozenset(group["params"]) for group in g["groups"]}
    assert {frozenset(group["names"]) for group in groups} == theirs


def test_drop_path_rates_of_blocks_and_head_equal_the_authors(golden):
    for c in golden("schedules")["drop_path"].values():
        model = pretrain.BEiT(16, 8, 24, c["depth"], 3, 10, drop_path=c["rate"],
                              early_layer=c["early_layers"], head_depth=c["head_layers"])
        for name in ("blocks", "cls_pt_layers"):
            rates = [block.drop_path for block in getattr(model, name)]
            assert rates == pytest.approx(list(c[name]), abs=1e-7)


# --- case 7: masking ------------------------------------------------------------------------------
def test_block_masks_are_distributed_as_the_authors(golden):
    import random
    import test_block_mask
    g = golden("masking")
    c, draws = g["config"], 6000
    assert c["min_aspect"] == 0.3
    random.seed(5)
    masks = torch.stack([pretrain.sample_block_mask(c["size"], c["size"], c["num"], c["min_num"])
                         for _ in range(draws)])
    assert (masks.flatten(1).sum(1) == c["num"]).all()
    frequency = masks.double().mean(0)
    error = (frequency * (1 - frequency) / draws).sqrt()
    z = (frequency - g["frequency"]) / (error ** 2 + g["frequency_se"] ** 2).sqrt()
    assert z.abs().max() <= 5 and z.square().mean().sqrt() <= 1.8
    for name, ours in test_block_mask.statistics(masks[:3000]).items():
        se = ours.std() / len(ours) ** 0.5
        error = (se ** 2 + g[f"{name}_se"] ** 2) ** 0.5
        assert abs(ours.mean() - g[f"{name}_mean"]) <= 4.5 * error, name
