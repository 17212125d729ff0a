"""The operation counts, the plain versions beside ours, the plan's arithmetic, the command."""
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

import model
import vqkd
from conftest import stage
from extras import bench, loaders, operations, plain, plan, steps
from model import Attention, ViT
from pretrain import BEiT, hidden_patches
from support import transforms
from support.files import UserError
from support.images import open_photo
from support.process import Process

ARGS = SimpleNamespace(batch_size=2, compile=False, checkpoint_activations=False)
CPU = torch.device("cpu")


def parts_of(step):
    parts = []
    step(Process(), parts.append)
    return parts


@pytest.mark.parametrize("name", ["pretrain", "finetune", "linprobe"])
def test_operations_by_formula_are_those_that_torch_counts(name):
    """Exactly. In the plain version, because torch does not count the fused attention of a CPU."""
    counted = bench.operations_by_torch(name, SimpleNamespace(model="tiny", **vars(ARGS)), CPU)
    assert counted == sum(operations.operations(name, operations.sizes("tiny")).values())


def test_the_tokenizers_operations_are_those_that_torch_counts():
    c = operations.sizes("tiny")
    network = steps.random_tokenizer(c, CPU)
    with plain.plain():
        def step():
            o, h, v, z = network(torch.rand(2, 3, c.S, c.S))
            vqkd.vqkd_loss(o, torch.randn_like(o), h, v)[0].backward()
        counted = operations.counted(step)
    ours = operations.operations("vqkd", c)
    assert counted == 2 * (ours["forward"] + ours["backward"])


def test_a_block_of_base_costs_24_T_D2_and_4_T2_D():
    operations_of_base = 24 * 197 * 768**2 + 4 * 197**2 * 768
    assert operations.block_operations(197, 768) == operations_of_base == 2_907_909_120


def test_what_is_timed_is_named_after_the_parts_of_the_training_loop():
    c = operations.sizes("tiny")
    parts = parts_of(steps.pretrain_step(c, ARGS, CPU))
    assert parts == ["data", "tokenizer", "forward", "backward", "optimiser"]
    assert set(operations.operations("pretrain", c)) < set(parts)


def test_a_clock_adds_up_the_seconds_of_each_part(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setitem(bench.CPU_CLOCKS, "wall", lambda: next(times))
    clock = bench.Clock("wall", CPU)
    for part in ("forward", "backward", "forward"):
        clock(part)
    assert clock.parts() == dict(forward=1 + 3, backward=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_clock_measures_the_work_and_not_its_launch():
    x = torch.randn(8192, 8192, device="cuda")
    x @ x
    clock = bench.Clock("wall", x.device)
    for _ in range(10):
        x @ x
    clock("products")
    assert clock.parts()["products"] > 10 * 2 * 8192**3 / 2e15       # no GPU does 2 P a second


@pytest.mark.parametrize("shared", [None, torch.randn(4, 10, 10)])
def test_plain_attention_equals_ours_in_value_and_gradient(shared):
    layer = Attention(32, 4)
    torch.nn.init.normal_(layer.q_bias)
    results = []
    for is_plain in (False, True):
        x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        bias = None if shared is None else shared.clone().requires_grad_()
        with plain.plain(is_plain):
            y = layer(x, None, bias)
        inputs = [x, layer.q_bias] + ([] if bias is None else [bias])
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_plain_last_block_computes_all_tokens_and_gives_those_that_are_read():
    network = ViT(32, 8, 32, 2, 4, positions="shared")
    x = torch.randn(3, 3, 32, 32)
    queries = torch.tensor([[0, 2, 5], [0, 1, 16], [0, 7, 8]])
    ours, = network.features(x, [-1], queries=queries)
    with plain.plain():
        theirs, = network.features(x, [-1], queries=queries)
    assert ours.shape == (3, 3, 32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codes", [7, 64, 192, 8192])
def test_the_plain_quantizer_equals_ours(codes):
    h, book = vqkd.l2(torch.randn(300, 32)), torch.randn(codes, 32)
    z = vqkd.nearest_code(h, book)
    assert torch.equal(z, plain.nearest_code(h, book))
    assert torch.equal(z, (h @ vqkd.l2(book).T).argmax(dim=-1))
    sums = zip(vqkd.code_sums(h, z, codes), plain.code_sums(h, z, codes), strict=True)
    for ours, theirs in sums:
        torch.testing.assert_close(ours, theirs)


def test_plain_lasts_as_long_as_its_block():
    before = model.attention, ViT.run, vqkd.nearest_code, vqkd.code_sums
    with pytest.raises(KeyError), plain.plain():
        assert model.attention is plain.attention and vqkd.code_sums is plain.code_sums
        raise KeyError
    assert (model.attention, ViT.run, vqkd.nearest_code, vqkd.code_sums) == before


def test_hidden_patches_known_beforehand_change_nothing():
    network = BEiT(32, 8, 32, 2, 4, 64, early_layer=1, head_depth=1)
    mask = torch.rand(3, 16).argsort(dim=1) < 6
    x, z = torch.randn(3, 3, 32, 32), torch.randint(0, 64, (3, 16))
    hidden = hidden_patches(mask)
    assert torch.equal(z.gather(1, hidden).flatten(), z[mask])
    for a, b in zip(network(x, mask), network(x, mask, hidden), strict=True):
        assert torch.equal(a, b)


def test_every_image_of_a_batch_must_hide_equally_many_patches():
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        hidden_patches(torch.tensor([[True, True, False], [True, False, False]]))


def test_checkpointed_activations_change_no_gradient():
    network = ViT(32, 8, 32, 3, 4, positions="shared", drop_path=0.5)
    x = torch.randn(4, 3, 32, 32)
    gradients = []
    for checkpointed in (False, True):
        network.checkpoint_activations = checkpointed
        torch.manual_seed(3)
        network(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})
        network.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_checkpointed_activations_repeat_attention_but_no_linear_layer():
    network = ViT(32, 8, 32, 3, 4, positions="shared")
    x = torch.randn(4, 3, 32, 32)
    counts = []
    for checkpointed in (False, True):
        network.checkpoint_activations = checkpointed
        counts.append(operations.counted(lambda: network(x).square().sum().backward()))
    T = 1 + 16
    # 4 images, 3 blocks: q k^T and weights v cost 2 T^2 D each.
    assert counts[1] - counts[0] == 4 * 3 * 4 * T**2 * 32


def test_memory_held_is_that_of_the_tensors_that_exist_at_one_time():
    x = torch.ones(1000)                                     # made outside
    with bench.Held() as held:
        y = x + 1                                            # 4000 bytes
        z = y[:500] * 2                                      # a view is none, 2000 more
        y.add_(1)
        del y, z
        z = x.double()                                       # 8000
    assert held.peak == held.now == z.nbytes == 8000


def test_loaders_are_timed_in_turn_on_the_same_pictures(capsys):
    told = []
    loaders.compare_loaders(1, time.perf_counter, lambda **facts: told.append(facts), [(60, 40, 2)])
    assert [row["name"] for row in told] == [
        "60 x 40, ours", "60 x 40, torchvision", "60 x 40, the authors' steps"]
    assert told[0]["ours_is_faster"] == 1
    for row in told[1:]:                     # one repeat: the ratio is that of the rates
        expected = told[0]["images_per_s"] / row["images_per_s"]
        assert row["ours_is_faster"] == pytest.approx(expected)
    assert "two views of 60 x 40" in capsys.readouterr().out


def test_the_other_loaders_show_what_ours_shows(tmp_path):
    loaders.write_pictures(tmp_path, 1)
    path = tmp_path / "000.jpg"
    ours = transforms.MIMTransform(*loaders.SIZES, scale=(1.0, 1.0), color_jitter=0)
    theirs = loaders.OnPillow(pil_to_tensor)
    theirs.colours = lambda image: image
    theirs.window.scale = (1.0, 1.0)
    torch.manual_seed(0)
    views = ours(open_photo(path))
    torch.manual_seed(0)
    for view, other in zip(views, theirs(path), strict=True):
        assert (view.int() - other.int()).abs().float().mean() < 0.5


def test_the_plan_on_an_example_worked_by_hand():
    # 36 G operations an image; 10 GPUs at half of 72 T a second do 360 T = 10,000 images a second.
    # 36 million images take 3600 s: one hour on 10 GPUs, ten GPU-hours.
    assert operations.hours(36e9, 36_000_000, 0.5, 72e12, 10) == pytest.approx((10, 1, 10_000))


def test_the_plan_takes_the_measured_share_of_a_step(monkeypatch):
    record = dict(stage="pretrain", model="base", share_of_datasheet=0.25, peak_mib=10240)
    monkeypatch.setattr(plan, "measured_steps", lambda: {("pretrain", "base"): record})
    monkeypatch.setattr(plan, "loader_rates", lambda: dict(pretrain=250.0))
    rows = {(row.model, row.what): row for row in plan.plan({"card": 100e12})}
    short, long = (rows["base", f"pre-training, {epochs} epochs"] for epochs in (300, 1600))
    assert short.measured and short.share == 0.25 and short.gib == 10
    assert long.hours["card", 1] == pytest.approx(short.hours["card", 1] * 16 / 3)
    assert short.hours["card", 1] == pytest.approx(8 * short.hours["card", 8])
    # A core delivers 250 images a second, so it feeds 250 x operations a second.
    ops = sum(operations.operations("pretrain", operations.sizes("base")).values())
    assert short.cores["card", 8] == pytest.approx(8 * 25e12 / (250 * ops))
    assert not rows["large", "pre-training, 300 epochs"].measured


def test_a_share_that_the_user_gives_counts_for_all_runs(capsys):
    bench.main(["--plan", "--share", "0.5", "--peak-tflops", "100"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 7
    assert all("| 50% (assumed) |" in line for line in lines)


@pytest.mark.parametrize("flags, words", [
    (["--model", "huge"], "--model huge"),
    (["--share", "1.5"], "--share"),
    (["--plain"], "--plain"),                # the plain version is there unless left out
    (["--stage", "vqkd", "--model", "large"], "tokenizer")])
def test_impossible_requests_are_sentences(flags, words):
    with pytest.raises(UserError, match=words):
        bench.main(flags)


@pytest.mark.slow
def test_the_command_measures_tiny(tmp_path):
    out = tmp_path / "b.jsonl"
    done = stage("extras.bench", "--model", "tiny", "--batch-size", 2, "--repeats", 1,
                 "--device", "cpu", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == [
        "pretrain no", "pretrain bf16", "pretrain plain", "timm BEiT no", "timm BEiT bf16",
        "timm ViT no", "timm ViT bf16"]
    assert all(0 < row["share"] and row["images_per_s"] > 0 for row in rows)
    assert "images/s" in done.stdout
    typed = "python -m extras.bench --model tiny --batch-size 2 --repeats 1 --device cpu"
    assert {row["command"] for row in rows} == {typed}
    assert all(row["operations"] == row["operations_torch"] for row in rows[:3])
