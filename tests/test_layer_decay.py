"""Layer decay: each block learns at its own rate, the earlier the smaller."""
import pytest
import torch
from torch import nn

from finetune import layer_decay_groups, layer_of
from model import ViT
from support.optim import adamw, set_lr


def tiny_vit():
    return ViT(16, 8, 24, 2, 3, num_classes=5)


@pytest.mark.parametrize("name, layer", [
    ("cls_token", 0), ("pos_embed", 0), ("mask_token", 0), ("patch_embed.proj.weight", 0),
    ("blocks.0.attn.q_bias", 1), ("blocks.0.attn.relative_position_bias_table", 1),
    ("blocks.11.gamma_2", 12), ("fc_norm.weight", 13), ("norm.bias", 13), ("head.weight", 13),
    ("rel_pos_bias.relative_position_bias_table", 13)])
def test_the_layer_of_a_parameter_counts_from_the_embeddings(name, layer):
    assert layer_of(name, depth=12) == layer


def test_each_block_learns_slower_than_the_next_by_the_same_factor():
    model = tiny_vit()
    groups = layer_decay_groups(model, 0.05, 0.65)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert set(scale) == {name for name, _ in model.named_parameters()}
    assert scale["head.weight"] == 1 and scale["blocks.1.mlp.fc1.weight"] == 0.65
    assert scale["blocks.0.mlp.fc1.weight"] == pytest.approx(0.65 ** 2)
    assert scale["cls_token"] == scale["patch_embed.proj.weight"] == pytest.approx(0.65 ** 3)


def test_without_decay_all_layers_learn_at_one_rate():
    groups = layer_decay_groups(tiny_vit(), 0.05, 1.0)
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_layer_decay_and_weight_decay_are_separate_things():
    for group in layer_decay_groups(tiny_vit(), 0.05, 0.65):
        unweighted = {name.endswith(("bias", "gamma_1", "gamma_2", "norm.weight", "norm1.weight",
                                     "norm2.weight", "cls_token")) for name in group["names"]}
        assert unweighted == {group["weight_decay"] == 0.0}, group["names"]


def test_the_first_step_moves_each_layer_by_its_own_rate():
    """Adam's first step is the learning rate times the sign of the gradient."""
    model = tiny_vit()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(layer_decay_groups(model, 0.0, 0.5), (0.9, 0.999), torch.device("cpu"))
    set_lr(optimizer, 0.01)
    nn.functional.cross_entropy(model(torch.randn(2, 3, 16, 16)), torch.tensor([0, 1])).backward()
    optimizer.step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    layers = {"head.weight": 3, "blocks.1.mlp.fc2.bias": 2, "blocks.0.mlp.fc2.bias": 1,
              "patch_embed.proj.weight": 0}
    for name, layer in layers.items():
        assert moved[name] == pytest.approx(0.01 * 0.5 ** (3 - layer), rel=1e-2), name
