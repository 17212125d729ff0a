"""The operation counts, the plain versions that stand beside ours, the plan's arithmetic, the script itself."""
import json
from types import SimpleNamespace

import pytest
import torch

from extras import bench
import vqkd
from conftest import stage
from support.engine import UserError
from model import Attention, ViT
from pretrain import BEiT, hidden_patches

ARGS = SimpleNamespace(batch_size=2, compile=False, checkpoint_activations=False)


def parts_of(step):
    parts = []
    step("no", parts.append)
    return parts


@pytest.mark.parametrize("name", ["pretrain", "finetune", "linprobe"])
def test_operations_by_formula_are_those_that_torch_counts(name):
    """Exactly. Under plain(), because torch's counter passes over the fused attention of a CPU."""
    c = bench.sizes("tiny")
    step = getattr(bench, f"{name}_step")(c, ARGS, torch.device("cpu"))
    with bench.plain():
        counted = bench.counted(lambda: step("no", lambda part: None))
    assert counted == ARGS.batch_size * sum(bench.operations(name, c).values())


def test_the_tokenizers_operations_are_those_that_torch_counts():
    c = bench.sizes("tiny")
    network = bench.tokenizer_of(c, torch.device("cpu"))
    with bench.plain():
        def step():
            o, h, v, z = network(torch.rand(2, 3, c.S, c.S))
            vqkd.vqkd_loss(o, torch.randn_like(o), h, v)[0].backward()
        counted = bench.counted(step)
    ours = bench.operations("vqkd", c)
    assert counted == 2 * (ours["forward"] + ours["backward"])


def test_a_block_of_base_costs_24_T_D2_and_4_T2_D():
    assert bench.block_operations(197, 768) == 24 * 197 * 768**2 + 4 * 197**2 * 768 == 2_907_909_120


def test_what_is_timed_is_named_after_the_parts_of_the_training_loop():
    c = bench.sizes("tiny")
    step = bench.pretrain_step(c, ARGS, torch.device("cpu"))
    assert parts_of(step) == ["data", "tokenizer", "forward", "backward", "optimiser"]
    assert set(bench.operations("pretrain", c)) < set(parts_of(step))


@pytest.mark.parametrize("shared", [None, torch.randn(4, 10, 10)])
def test_plain_attention_equals_ours_in_value_and_gradient(shared):
    layer = Attention(32, 4)
    torch.nn.init.normal_(layer.q_bias)
    results = []
    for attend in (layer.forward, lambda *a: bench.plain_attention(layer, *a)):
        x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        bias = None if shared is None else shared.clone().requires_grad_()
        y = attend(x, None, bias)
        inputs = [x, layer.q_bias] + ([] if bias is None else [bias])
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codes", [7, 64, 192, 8192])
def test_the_plain_quantizer_equals_ours(codes):
    h, book = vqkd.l2(torch.randn(300, 32)), torch.randn(codes, 32)
    z = vqkd.nearest_code(h, book)
    assert torch.equal(z, bench.plain_nearest_code(h, book)) and torch.equal(z, (h @ vqkd.l2(book).T).argmax(dim=-1))
    for ours, plain in zip(vqkd.code_sums(h, z, codes), bench.plain_code_sums(h, z, codes)):
        torch.testing.assert_close(ours, plain)


def test_plain_lasts_as_long_as_its_block():
    before = Attention.forward, vqkd.nearest_code
    with pytest.raises(KeyError), bench.plain():
        assert Attention.forward is bench.plain_attention and vqkd.code_sums is bench.plain_code_sums
        raise KeyError
    assert (Attention.forward, vqkd.nearest_code) == before


def test_hidden_patches_known_beforehand_change_nothing():
    model, mask = BEiT(32, 8, 32, 2, 4, 64, early_layer=1, head_depth=1), torch.rand(3, 16).argsort(dim=1) < 6
    x, z = torch.randn(3, 3, 32, 32), torch.randint(0, 64, (3, 16))
    hidden = hidden_patches(mask)
    assert torch.equal(z.gather(1, hidden).flatten(), z[mask])
    for a, b in zip(model(x, mask), model(x, mask, hidden)):
        assert torch.equal(a, b)


def test_every_image_of_a_batch_must_hide_equally_many_patches():
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        hidden_patches(torch.tensor([[True, True, False], [True, False, False]]))


def test_checkpointed_activations_change_no_gradient():
    model, x = ViT(32, 8, 32, 3, 4, positions="shared", drop_path=0.5), torch.randn(4, 3, 32, 32)
    gradients = []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(3)
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_checkpointed_activations_repeat_attention_but_no_linear_layer():
    model, x = ViT(32, 8, 32, 3, 4, positions="shared"), torch.randn(4, 3, 32, 32)
    counts, T = [], 1 + 16
    for model.checkpoint_activations in (False, True):
        counts.append(bench.counted(lambda: model(x).square().sum().backward()))
    assert counts[1] - counts[0] == 4 * 3 * 4 * T**2 * 32    # 4 images, 3 blocks: q k^T and weights v, 2 T^2 D each


def test_memory_held_is_that_of_the_tensors_that_exist_at_one_time():
    x = torch.ones(1000)                                     # made outside
    with bench.Held() as held:
        y = x + 1                                            # 4000 bytes
        z = y[:500] * 2                                      # a view is none, 2000 more
        y.add_(1)
        del y, z
        z = x.double()                                       # 8000
    assert held.peak == 8000 and held.now == 8000


def test_the_plan_on_an_example_worked_by_hand():
    # 36 G operations an image; 10 GPUs at half of 72 T a second do 360 T = 10,000 images a second.
    # 36 million images take 3600 s: one hour on 10 GPUs, ten GPU-hours.
    assert bench.hours(36e9, 36_000_000, 0.5, 72e12, 10) == pytest.approx((10, 1, 10_000))


def test_the_plan_prints_what_the_loader_must_deliver(tmp_path, capsys):
    bench.main("--plan --gpus 4 --share 0.5 --peak-tflops 100 --out".split() + [str(tmp_path / "plan.jsonl")])
    assert "pre-training, 1600 epochs" in capsys.readouterr().out
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "plan.jsonl").read_text().splitlines())}
    short, long = (rows[f"base pre-training, {epochs} epochs"] for epochs in (300, 1600))
    assert long["gpu_hours"] == pytest.approx(short["gpu_hours"] * 16 / 3)
    assert short["images_per_s"] == pytest.approx(200e12 / short["operations"])
    assert short["bytes_per_s"] == pytest.approx(short["images_per_s"] * 3 * 224 * 224)


@pytest.mark.parametrize("flags, words", [
    (["--model", "huge"], "--model huge"), (["--share", "1.5"], "--share"), (["--plain", "--no-plain"], "--no-plain"),
    (["--stage", "vqkd", "--model", "large"], "tokenizer")])
def test_impossible_requests_are_sentences(flags, words):
    with pytest.raises(UserError, match=words):
        bench.main(flags)


@pytest.mark.slow
def test_the_script_measures_tiny(tmp_path):
    done = stage("extras.bench", "--model", "tiny", "--batch-size", 2, "--repeats", 1, "--out", tmp_path / "b.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["pretrain no", "pretrain bf16", "pretrain plain", "timm BEiT no",
                                             "timm BEiT bf16", "timm ViT no", "timm ViT bf16"]
    assert all(0 < row["share"] and row["images_per_s"] > 0 for row in rows) and "images/s" in done.stdout
    assert all(row["operations"] == row["operations_torch"] for row in rows[:3])
