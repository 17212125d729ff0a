"""linprobe.py: a probe measures the features and nothing else."""
import os

import pytest
import torch

from support import data, engine
import linprobe
from conftest import ROOT, log_lines, stage
from linprobe import accuracy, gains, head_logits, hold_out, knn, readout, score_heads, summarise, train_heads
from model import ViT, imagenet_normalize

SHORT = "--source random --limit 200 --steps 20 --batch-size 64 --workers 0 --device cpu --amp no".split()
SETTINGS = [(1e-2, 0.0), (5e-2, 1e-4)]


def clusters(n=400, layers=2, width=6, classes=5, seed=0):
    """Features (n, layers, 2 * width) around one centre per class, far apart; labels (n,)."""
    g = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(classes, layers, 2 * width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=g)
    return centres[labels] + 0.3 * torch.randn(n, layers, 2 * width, generator=g), labels


def tiny_vit(**options):
    torch.manual_seed(0)
    return ViT(16, 8, 32, 3, 2, positions="shared", pool=None, **options).eval()


# ------------------------------------------------------------------------------------------------------- read-outs
def test_readouts_take_the_tokens_they_name():
    tokens = torch.randn(2, 5, 3)
    torch.testing.assert_close(readout(tokens, "cls"), tokens[:, 0])
    torch.testing.assert_close(readout(tokens, "mean"), (tokens[:, 1] + tokens[:, 2] + tokens[:, 3] + tokens[:, 4]) / 4)
    torch.testing.assert_close(readout(tokens, "both"), torch.cat([readout(tokens, "cls"), readout(tokens, "mean")], 1))


def test_summary_holds_every_raw_block_and_last_the_final_norm():
    model, x = tiny_vit(), torch.randn(2, 3, 16, 16)
    model.norm.weight.data.fill_(2.0)                        # so that the norm shows
    features = summarise(model, x)
    assert features.shape == (2, 3 + 1, 2 * 32)
    for layer, tokens in enumerate(model.features(x)):
        torch.testing.assert_close(features[:, layer], readout(tokens, "both"))
    torch.testing.assert_close(features[:, 3], readout(model(x), "both"))
    torch.testing.assert_close(summarise(model, x, blocks=1), features[:, 2:])


def test_each_head_sees_its_read_out_and_no_other_channel():
    features, labels = clusters()
    mean, gain = gains(features, linprobe.READOUTS)
    weight, _ = train_heads(features, labels, mean, gain, 5, SETTINGS, steps=5, batch_size=64)
    cls, patches = (w.abs().amax(dim=(0, 1, 3, 4)) for w in (weight[..., :6], weight[..., 6:]))      # per head
    assert cls[:2].min() > 0 and patches[:2].max() == 0      # heads 0, 1: [CLS], without and with norm
    assert cls[2:4].max() == 0 and patches[2:4].min() > 0    # heads 2, 3: patch mean
    assert cls[4:].min() > 0 and patches[4:].min() > 0       # heads 4, 5: both


def test_probing_leaves_the_network_as_it_was():
    source = linprobe.load_source("random", linprobe.parse_args(["--source", "random"]), torch.device("cpu"))
    before = {k: v.clone() for k, v in source.model.state_dict().items()}
    features = source.encode(torch.rand(12, 3, 48, 48))
    assert not features.requires_grad and not source.model.training
    assert not any(p.requires_grad for p in source.model.parameters())
    mean, gain = gains(features, source.readouts)
    train_heads(features, torch.arange(12) % 3, mean, gain, 3, SETTINGS, steps=2, batch_size=12)
    assert all(torch.equal(before[k], v) for k, v in source.model.state_dict().items())
    assert all(p.grad is None for p in source.model.parameters())


def test_features_do_not_depend_on_the_batch_an_image_sits_in():
    model, x = tiny_vit(drop_path=0.5), torch.randn(6, 3, 16, 16)
    torch.testing.assert_close(summarise(model, x)[4:5], summarise(model, x[4:5]), rtol=1e-4, atol=1e-6)


def test_backbone_and_tokenizer_get_the_pixels_they_were_trained_on(tmp_path):
    args = linprobe.parse_args(["--source", "random", "--out", str(tmp_path)])
    images = torch.rand(2, 3, 48, 48)
    random = linprobe.load_source("random", args, torch.device("cpu"))
    torch.testing.assert_close(random.encode(images), summarise(random.model, imagenet_normalize(images)))
    arch = dict(image_size=48, patch_size=8, width=32, depth=2, heads=2, positions="absolute", layer_scale=0,
                pool="mean")
    encoder = ViT(**arch)
    engine.write_file(tmp_path / "vqkd.pt", dict(kind="vqkd", arch=arch, model={
        f"encoder.{k}": v for k, v in encoder.state_dict().items()} | {"quantize.embedding.weight": torch.zeros(4, 2)}))
    tokenizer = linprobe.load_source("tokenizer", args, torch.device("cpu"))
    torch.testing.assert_close(tokenizer.encode(images), summarise(encoder.eval(), images * 2 - 1))
    assert tokenizer.paper == "mean" and random.paper == "cls"


# ----------------------------------------------------------------------------------------------------------- heads
def test_separable_classes_are_told_apart_by_every_head():
    features, labels = clusters()
    mean, gain = gains(features, linprobe.READOUTS)
    heads = train_heads(features, labels, mean, gain, 5, SETTINGS, steps=300, batch_size=128)
    top1, top5 = score_heads(*clusters(seed=1), *heads)
    assert top1.shape == (2, len(SETTINGS), 6) and top1.min() > 99.99 and top5.min() > 99.99


def test_labels_that_have_nothing_to_do_with_the_images_give_chance():
    features, _ = clusters(2000)
    labels = torch.randint(5, (2000,), generator=torch.Generator().manual_seed(3))
    mean, gain = gains(features[:1000], linprobe.READOUTS)
    heads = train_heads(features[:1000], labels[:1000], mean, gain, 5, SETTINGS, steps=50, batch_size=250)
    top1, _ = score_heads(features[1000:], labels[1000:], *heads)
    assert (top1 - 20).abs().max() < 6                       # four to five standard errors of 1000 guesses


def test_heads_trained_together_equal_a_head_trained_alone():
    features, labels = clusters(classes=3)
    mean, gain = gains(features, linprobe.READOUTS)
    weight, bias = train_heads(features, labels, mean, gain, 3, SETTINGS, steps=20, batch_size=100, seed=5)
    for layer, s, h in ((0, 0, 1), (1, 1, 4)):
        alone_w, alone_b = train_heads(features[:, layer:layer + 1], labels, mean[layer:layer + 1],
                                       gain[layer:layer + 1, h:h + 1], 3, SETTINGS[s:s + 1], 20, 100, seed=5)
        torch.testing.assert_close(alone_w[0, 0, 0], weight[layer, s, h], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone_b[0, 0, 0], bias[layer, s, h], rtol=1e-4, atol=1e-5)


def test_a_head_equals_a_torch_linear_layer_behind_batch_norm_without_affine():
    features, labels = clusters(64, layers=1, classes=3)
    mean, gain = gains(features, ["both"])
    weight, bias = train_heads(features, labels, mean, gain, 3, [(1e-2, 1e-2)], steps=7, batch_size=64)
    norm, linear = torch.nn.BatchNorm1d(12, eps=1e-12, affine=False), torch.nn.Linear(12, 3)
    torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW([dict(params=[linear.weight], weight_decay=1e-2),
                                   dict(params=[linear.bias], weight_decay=0.0)], lr=1e-2)
    for step in range(7):                                    # the whole data set is one batch
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = engine.cosine_schedule(step, 1e-2, 0.0, 7)
        torch.nn.functional.cross_entropy(linear(norm(features[:, 0])), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = head_logits(features, weight, bias)[:, 0, 0, 1]
    torch.testing.assert_close(ours, linear(norm(features[:, 0])), rtol=1e-3, atol=1e-4)


def test_biases_are_not_decayed_and_weights_are():
    features, labels = clusters(64, layers=1, classes=3)
    mean, gain = gains(features, ["both"])
    features, decays = features * 0 + mean + 1e-3, [(1e-2, 0.0), (1e-2, 30.0)]          # weights matter little here
    weight, bias = train_heads(features, labels * 0, mean, gain, 3, decays, steps=20, batch_size=64)
    bias = bias + torch.einsum("lf,lshcf->lshc", mean, weight)                          # as AdamW sees it
    torch.testing.assert_close(bias[:, 0], bias[:, 1], rtol=1e-2, atol=0)
    assert (weight[:, 1].abs().amax() < 0.9 * weight[:, 0].abs().amax())


def test_norm_statistics_come_from_the_images_given_and_scale_as_stated():
    features = clusters()[0] * torch.linspace(0.3, 10, 12) + 3
    mean, gain = gains(features, linprobe.READOUTS, chunk=37)
    x = (features - mean)[:, :, None] * gain                                 # (n, L, H, F)
    torch.testing.assert_close(x.mean(0), torch.zeros_like(x[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(x[:, :, 5].var(0, unbiased=False), torch.ones(2, 12), rtol=1e-3, atol=0)  # batchnorm
    assert len(gain[0, 4].unique()) == 1                                     # both, none: one number for all channels
    torch.testing.assert_close(x[:, :, 0].var(0, unbiased=False)[:, :6].mean(1), torch.ones(2), rtol=1e-3, atol=0)


def test_scores_do_not_depend_on_the_other_images():
    features, labels = clusters()
    mean, gain = gains(features, linprobe.READOUTS)
    heads = train_heads(features, labels, mean, gain, 5, SETTINGS, steps=3, batch_size=100)
    torch.testing.assert_close(head_logits(features, *heads)[:7], head_logits(features[:7], *heads))
    torch.testing.assert_close(score_heads(features, labels, *heads, chunk=33), score_heads(features, labels, *heads))


def test_accuracy_counts_in_percent_and_more_guesses_never_hurt():
    logits = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3]])
    labels = torch.tensor([0, 1, 3, 0])
    assert [accuracy(logits, labels, k).item() for k in (1, 2, 3, 4, 5)] == [50, 75, 75, 100, 100]
    many = torch.randn(50, 2, 3, 20)
    top1, top5 = accuracy(many, torch.arange(50) % 20, 1), accuracy(many, torch.arange(50) % 20, 5)
    assert top1.shape == (2, 3) and (top5 >= top1).all()


def test_held_out_images_are_a_tenth_and_take_no_part_in_fitting():
    fit, held = hold_out(105, seed=1)
    assert len(held) == 10 and sorted(torch.cat([fit, held]).tolist()) == list(range(105))
    assert torch.equal(held, hold_out(105, seed=1)[1]) and not torch.equal(held, hold_out(105, seed=2)[1])


def test_each_head_gets_the_setting_that_is_best_on_held_out_images():
    settings = [(0.1, 0), (0.2, 1), (0.3, 2)]
    source = linprobe.Source("x", None, None, ["1", "norm"], linprobe.READOUTS, "cls", settings, 48)
    held_out = torch.rand(2, 3, 6)                           # (L, S, H)
    table = linprobe.choose(held_out, source)
    assert [row["held_out"] for row in table] == held_out.amax(dim=1).flatten().tolist()
    for row in table:
        layer, s, h = row["at"]
        assert held_out[layer, s, h] == row["held_out"] and (row["rate"], row["weight_decay"]) == settings[s]
    assert [(row["block"], row["readout"]) for row in table if row["paper"]] == [("norm", "cls")] * 2


# ------------------------------------------------------------------------------------------------------------ k-NN
def test_knn_finds_the_nearest_by_angle():
    bank, labels = torch.eye(4), torch.tensor([2, 0, 3, 1])
    queries = 7 * torch.eye(4) + 0.5                          # longer than the bank: length plays no part
    assert torch.equal(knn(bank, labels, queries, k=1, classes=4).argmax(1), labels)


def test_knn_neighbours_vote_with_the_weight_of_their_cosine():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    scores = knn(bank, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]]), k=3, classes=2)
    torch.testing.assert_close(scores, torch.tensor([[1 / 0.07, 0.6 / 0.07]]).exp() * torch.tensor([1.0, 2.0]))
    assert scores.argmax() == 0                              # one close neighbour outweighs two distant ones


# ----------------------------------------------------------------------------------------------------- whole probes
@pytest.fixture
def shapes(monkeypatch):
    """The real data set with a dial: permuting the labels of the validation images."""
    real, dial = data.open_data, dict(permute=False)

    def open_data(name, split, *args, **kwargs):
        dataset = real(name, split, *args, **kwargs)
        if split == "val" and dial["permute"]:
            dataset.labels = dataset.labels.flip(0)
        return dataset
    monkeypatch.setattr(data, "open_data", open_data)
    return dial


def test_nothing_is_chosen_by_the_validation_labels(shapes, tmp_path, capsys):
    a = linprobe.main([*SHORT, "--out", str(tmp_path / "a")])
    shapes["permute"] = True
    b = linprobe.main([*SHORT, "--out", str(tmp_path / "b")])
    for key in ("block", "readout", "norm", "rate", "held_out", "paper_reading"):
        assert a[key] == b[key], key
    heads = [engine.read_file(tmp_path / x / "linprobe_random.pt")["model"]["weight"] for x in "ab"]
    assert torch.equal(*heads)
    tables = [[r for r in log_lines(tmp_path / x / "linprobe_random.jsonl") if "held_out" in r] for x in "ab"]
    assert [r["rate"] for r in tables[0]] == [r["rate"] for r in tables[1]]
    assert [r["top1"] for r in tables[0]] != [r["top1"] for r in tables[1]]  # only what is measured has changed


def test_the_handed_over_head_gives_the_reported_accuracy(tmp_path, capsys):
    summary = linprobe.main([*SHORT, "--out", str(tmp_path)])
    file = engine.read_file(tmp_path / "linprobe_random.pt")
    source = linprobe.load_source("random", linprobe.parse_args(["--source", "random"]), torch.device("cpu"))
    val = data.open_data("shapes", "val", limit=200)
    features = source.encode(data.to_float(val.images, "cpu"))[:, source.layers.index(file["block"])]
    half = features.shape[1] // 2
    x = dict(cls=features[:, :half], mean=features[:, half:], both=features)[file["readout"]]
    logits = x @ file["model"]["weight"].T + file["model"]["bias"]
    assert abs(accuracy(logits, val.labels).item() - summary["top1"]) < 1.01     # an image or two may round otherwise
    assert summary["top5"] >= summary["top1"] and summary["paper_top5"] >= summary["paper_top1"]


def test_a_probe_of_an_earlier_network_is_set_aside_and_further_views_are_features_too(tmp_path, capsys):
    out, files = tmp_path / "run", {}
    for rate in ("0.1", "0.2"):                              # the second would be refused if it were the same network's
        torch.manual_seed(int(rate[-1]))
        arch = dict(image_size=48, patch_size=8, width=32, depth=2, heads=2, positions="shared", layer_scale=0.1)
        state = {**ViT(**arch, pool=None).state_dict(), "mask_token": torch.zeros(1, 1, 32)}
        engine.write_file(out / "pretrain.pt", dict(kind="pretrain", arch=arch, model=state))
        files[rate] = linprobe.main([*"--limit 50 --steps 2 --workers 0 --device cpu --augment 2 --rates".split(), rate,
                                     "--out", str(out)])
        os.utime(out / "linprobe.pt", (1, 1))
    assert (tmp_path / "run.1" / "linprobe.pt").exists() and (out / "linprobe.pt").exists()
    assert files["0.2"]["rate"] == 0.2
    assert files["0.1"]["paper_reading"] == "norm mean"      # no blocks of patch aggregation in the file
    assert "0.00 GiB" in capsys.readouterr().out


def test_the_script_probes_logs_and_says_when_it_is_done(tmp_path):
    flags = ["--source", "random", "--limit", 40, "--steps", 3, "--workers", 0, "--device", "cpu", "--out", tmp_path]
    stage("linprobe.py", *flags)
    lines = log_lines(tmp_path / "linprobe_random.jsonl")
    assert "args" in lines[0] and lines[-1]["summary"] == 1 and lines[-1]["source"] == "random"
    assert {"top1", "top5", "knn", "block", "readout", "norm", "rate", "paper_top1"} <= lines[-1].keys()
    rows = [r for r in lines if "held_out" in r and "summary" not in r]
    assert len(rows) == 7 * 3 * 2                            # 6 blocks and the norm, 3 read-outs, 2 norms
    assert [(r["block"], r["readout"]) for r in rows if r["paper"]] == [("norm", "cls")] * 2
    assert "already done" in stage("linprobe.py", *flags).stdout
    assert len(log_lines(tmp_path / "linprobe_random.jsonl")) == len(lines)


EXTRACT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import linprobe
from support import data, engine
process = engine.init_distributed("cpu")
args = linprobe.parse_args(["--source", "random", "--workers", "0", "--micro-batch", "8", "--amp", "no"])
items = [(0, i) for i in range(29)]                          # 29 images: the shares differ in size
source = linprobe.load_source("random", args, process.device)
shapes = data.open_data("shapes", "train", transforms.EvalTransform(48), limit=40)
features, labels = linprobe.extract(source, shapes, items, args, process)
if process.rank == 0:
    torch.save((features, labels), sys.argv[2])
engine.run(lambda: linprobe.main([*"--source random --limit 40 --steps 2 --workers 0 --device cpu --out".split(),
                                  sys.argv[2] + ".run"]))
"""


@pytest.mark.slow
def test_two_processes_gather_what_one_computes_in_the_same_order(tmp_path):
    script = tmp_path / "extract.py"
    script.write_text(EXTRACT)
    for n in (1, 2):
        stage(script, ROOT, tmp_path / f"{n}.pt", processes=n)
    (one, labels), (two, labels_two) = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert one.shape == (29, 7, 256) and torch.equal(labels, labels_two)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    a, b = (log_lines(tmp_path / f"{n}.pt.run" / "linprobe_random.jsonl") for n in (1, 2))
    assert len(a) == len(b) and a[-1].keys() == b[-1].keys()                     # rank 0 alone trained and logged


@pytest.mark.parametrize("flags, words", [
    (["--source", "pretrain"], "python pretrain.py"),
    (["--source", "all"], "python pretrain.py"),
    (["--source", "tokenizer"], "python vqkd.py"),
    (["--source", "random", "--limit", "5"], "--limit"),
    (["--source", "random", "--rates", "-1"], "--rates"),
    (["--source", "random", "--model", "huge"], "huge"),
    (["--source", "random", "--data", "no/such/folder"], "no/such/folder"),
])
def test_mistakes_are_one_sentence_with_a_remedy(flags, words, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        engine.run(lambda: linprobe.main([*flags, "--device", "cpu", "--workers", "0", "--out", str(tmp_path)]))
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2 and words in message and message.count("\n") == 0
    assert not list(tmp_path.glob("*.pt"))
