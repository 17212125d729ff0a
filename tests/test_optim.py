"""Learning rates and parameter groups, which every stage shares."""
import math

import pytest
import torch
from torch import nn

from support.optim import adamw, cosine_schedule, param_groups, set_lr


def test_the_schedule_starts_at_zero_peaks_twice_and_never_reaches_the_final_rate():
    rates = [cosine_schedule(step, 1.0, 0.1, total=12, warmup=5) for step in range(12)]
    assert rates[:6] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 6 / 7)))
    assert rates[-1] > 0.1


def test_a_schedule_without_warm_up_starts_at_the_peak():
    assert cosine_schedule(0, 1.0, 0.0, 10) == 1.0


def test_a_warm_up_of_one_step_has_rate_zero():
    assert [cosine_schedule(step, 1.0, 0.0, 10, warmup=1) for step in (0, 1)] == [0.0, 1.0]


def small_model():
    model = nn.Module()
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
    model.mask_token = nn.Parameter(torch.zeros(1, 1, 2))
    model.fc = nn.Linear(2, 2)
    model.norm = nn.LayerNorm(2)
    model.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    return model


def test_biases_norms_and_positions_do_not_decay_but_the_mask_token_does():
    groups = param_groups(small_model().named_parameters(), 0.05)
    assert {name: group["weight_decay"] for group in groups for name in group["names"]} == {
        "cls_token": 0, "mask_token": 0.05, "fc.weight": 0.05, "fc.bias": 0,
        "norm.weight": 0, "norm.bias": 0}


def test_deep_layers_learn_fastest():
    groups = param_groups(small_model().named_parameters(), 0.05, layer_decay=0.5, depth=1,
                          layer_id=lambda name: 0 if "token" in name else 2)
    assert {name: group["lr_scale"] for group in groups for name in group["names"]} == {
        "cls_token": 0.25, "mask_token": 0.25, "fc.weight": 1, "fc.bias": 1,
        "norm.weight": 1, "norm.bias": 1}
    optimizer = adamw(groups, (0.9, 0.98), torch.device("cpu"))
    set_lr(optimizer, 0.4)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.1, 0.4])


def test_the_optimiser_is_adamw_with_eps_1e_8():
    groups = [dict(params=[nn.Parameter(torch.ones(2))], lr_scale=1.0)]
    optimizer = adamw(groups, (0.9, 0.98), torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["eps"] == 1e-8
