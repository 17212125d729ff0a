"""Codebook health: what a collapse looks like, when it is noticed, what helps; and several teachers, one head each."""
import math

import pytest
import torch

from support import codebook, data, engine, teachers, transforms
from support.run import contents
import vqkd
from conftest import log_lines, stage


# ------------------------------------------------------------------------------------------------------- usage
def test_perplexity_counts_the_codes_in_use():
    usage = vqkd.codebook_usage(torch.tensor([5.0, 5.0, 5.0, 5.0, 0.0, 0.0]))
    assert usage["perplexity"] == pytest.approx(4) and usage["entropy"] == pytest.approx(math.log(4))
    assert usage["codes_used"] == 4 and usage["dead_codes"] == 2 and usage["top10_share"] == pytest.approx(100)
    assert vqkd.codebook_usage(torch.tensor([97.0, 1.0, 1.0, 1.0]))["perplexity"] < 1.3      # all used, yet collapsed


def test_ten_most_used_codes_of_twenty_equal_ones_hold_half():
    assert vqkd.codebook_usage(torch.full((20,), 7.0))["top10_share"] == pytest.approx(50)


# ------------------------------------------------------------------------------------------------- noticing a collapse
def watch(perplexities, codes=64):
    """Steps at which a run with these perplexities is warned."""
    warned, best, falling = [], 0.0, False
    for step, p in enumerate(perplexities):
        best = max(best, p)
        now = codebook.collapsing(p, best, codes, falling)
        warned += [step] if now and not falling else []
        falling = now
    return warned


def test_a_collapse_is_noticed_on_the_way_down():
    assert watch([56, 40, 25, 16, 9, 4, 2, 2, 2]) == [4]     # under 20 % of the best; and once, not at every step


def test_a_healthy_dip_is_no_collapse():
    assert watch([59, 49, 17, 35, 42, 53, 55, 58]) == []     # the first steps after the k-means start look like this


def test_codes_that_never_came_to_life_are_noticed_without_a_best_to_fall_from():
    assert watch([3, 3, 3]) == [0]


def test_a_second_collapse_after_a_recovery_is_a_second_warning():
    assert watch([60, 10, 20, 10, 50, 10]) == [1, 5]         # 20 is no recovery


def test_a_small_batch_on_a_large_codebook_is_no_collapse():
    health, counts = vqkd.CodebookWatch(8192), torch.zeros(8192)
    counts[:150] = 1.0                                       # 150 vectors cannot show more than 150 codes
    health.look(counts, engine.Process())
    assert not health.warned and health.best == pytest.approx(150)


NAIVE = "--continuous-steps 0 --restart-dead-codes 0 --decay 0.99 --warmup-epochs 0 --lr 3e-3 --batch-size 64".split()


@pytest.mark.slow
def test_naive_settings_are_warned_of_at_a_perplexity_over_a_tenth_of_the_codes(tmp_path):
    flags = [*NAIVE, "--steps", 12, "--limit", 640, "--workers", 0, "--log-every", 1, "--out", tmp_path]
    done = stage("vqkd.py", *flags)
    lines = log_lines(tmp_path / "vqkd.jsonl")
    warning = next(x for x in lines if "warning" in x)
    seen = {x["step"]: x["perplexity"] for x in lines if x.get("split") != "val" and "perplexity" in x}
    assert "collapsing" in done.stderr and "--lr" in done.stderr
    assert sum("warning" in x for x in lines) == 1 and seen[warning["step"]] > 6.4 and seen[11] < 6.4


def test_a_resumed_run_is_not_warned_again_of_the_same_fall(tmp_path, monkeypatch):
    flags = [*NAIVE, "--steps", "9", "--limit", "320", "--workers", "0", "--save-every", "4", "--out", str(tmp_path)]
    real = vqkd.Run.save

    def save_and_die(run):
        real(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(vqkd.Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        vqkd.main(flags)
    monkeypatch.setattr(vqkd.Run, "save", real)
    vqkd.main(flags)
    warned = [x["step"] for x in log_lines(tmp_path / "vqkd.jsonl") if "warning" in x]
    assert len(warned) == 1 and warned[0] < 4


def test_stop_on_collapse_ends_the_run_with_the_sentence(tmp_path):
    flags = [*NAIVE, "--steps", 12, "--limit", 640, "--workers", 0, "--out", tmp_path, "--stop-on-collapse"]
    done = stage("vqkd.py", *flags, check=False)
    assert done.returncode == 2 and "the codebook is collapsing" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "vqkd.pt").exists()


# --------------------------------------------------------------------------------------------------- what helps
def test_dead_codes_restart_at_current_vectors_and_living_ones_stay():
    codebook = vqkd.Codebook(6, 4)
    codebook.embedding.weight.copy_(vqkd.l2(torch.randn(6, 4)))
    codebook.cluster_size.copy_(torch.tensor([5.0, 0.0, 3.0, 0.01, 1.0, 0.2]))
    before, h = codebook.embedding.weight.clone(), vqkd.l2(torch.randn(2, 10, 4))
    assert vqkd.restart_dead_codes(codebook, h, engine.Process(0, 1, torch.device("cpu"))) == 2
    after = codebook.embedding.weight
    assert torch.equal(after[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
    for k in (1, 3):
        assert (h.flatten(0, 1) == after[k]).all(dim=1).any() and codebook.cluster_size[k] == 1


def test_a_shrunk_codebook_keeps_the_most_used_codes_in_their_order():
    table, use = vqkd.l2(torch.randn(5, 3)), torch.tensor([1.0, 9.0, 0.0, 4.0, 7.0])
    small, size = vqkd.resize_codebook(table, use, 3)
    assert torch.equal(small, table[[1, 3, 4]]) and size.tolist() == [9, 4, 7]


@pytest.mark.parametrize("codes", [7, 10, 17])
def test_a_grown_codebook_keeps_all_codes_and_splits_the_most_used(codes):
    table, use = vqkd.l2(torch.randn(5, 16)), torch.tensor([1.0, 9.0, 0.0, 4.0, 7.0])
    large, size = vqkd.resize_codebook(table, use, codes)
    assert large.shape == (codes, 16) and torch.equal(large[:5], table)
    torch.testing.assert_close(large.norm(dim=-1), torch.ones(codes))
    parents = vqkd.nearest_code(large[5:], table)
    assert parents[:2].tolist() == [1, 4]                    # the two most used are split first
    assert (large[5:] * table[parents]).sum(-1).min() > 0.99 and not torch.equal(large[5:], table[parents])
    torch.testing.assert_close(size.sum(), use.sum())        # parent and child share the use


def test_a_codebook_of_the_same_size_stays():
    table, use = torch.randn(5, 3), torch.rand(5)
    same, size = vqkd.resize_codebook(table, use, 5)
    assert torch.equal(same, table) and torch.equal(size, use)


def test_init_with_another_number_of_codes_resizes_the_codebook(tmp_path):
    common = ["--limit", "64", "--batch-size", "16", "--workers", "0", "--encoder-depth", "1", "--seed", "3"]
    first = vqkd.parse_args([*common, "--codes", "16", "--out", str(tmp_path / "a")])
    model = vqkd.build(first, (144,))
    model.quantize.embedding.weight.copy_(vqkd.l2(torch.randn(16, 16)))
    model.quantize.cluster_size.copy_(torch.arange(16.0))
    engine.write_file(tmp_path / "a" / "vqkd.pt", contents("vqkd", model, first))
    for codes in (8, 24):
        vqkd.main([*common, "--codes", str(codes), "--steps", "1", "--init", str(tmp_path / "a" / "vqkd.pt"),
                   "--lr", "0", "--decay", "1", "--restart-dead-codes", "0", "--out", str(tmp_path / str(codes))])
        table = vqkd.load_tokenizer(tmp_path / str(codes) / "vqkd.pt").quantize.embedding.weight
        kept = model.quantize.embedding.weight[8:] if codes == 8 else model.quantize.embedding.weight
        assert len(table) == codes
        torch.testing.assert_close(table[:len(kept)], kept)


# ------------------------------------------------------------------------------------------------- several teachers
def test_loss_of_two_teachers_is_the_mean_of_their_cosines():
    o, t, h = torch.randn(2, 4, 7), torch.randn(2, 4, 7), vqkd.l2(torch.randn(2, 4, 3))
    loss, parts = vqkd.vqkd_loss(o, t, h, h, teacher_dims={"clip": 5, "dino": 2})
    clip, dino = (vqkd.vqkd_loss(o[..., s], t[..., s], h, h)[1]["cosine"] for s in (slice(0, 5), slice(5, 7)))
    torch.testing.assert_close(parts["cosine_clip"], clip)
    torch.testing.assert_close(parts["cosine_dino"], dino)
    torch.testing.assert_close(loss, 1 - (clip + dino) / 2)


def test_each_teacher_has_a_decoder_head_of_its_own():
    model = vqkd.VQKD(16, 8, 32, 1, 2, 1, 12, 4, (5, 7))
    model.decode(vqkd.l2(torch.randn(2, 4, 4)))[..., 5:].sum().backward()
    assert model.more_decode_task_layers[0][2].weight.grad.abs().sum() > 0
    assert model.decode_task_layer[2].weight.grad.abs().sum() == 0


@pytest.mark.slow
def test_two_teachers_train_log_apart_and_load_again(tmp_path):
    stage("vqkd.py", "--teacher", "hog+pixel", "--limit", 128, "--steps", 4, "--continuous-steps", 1,
          "--batch-size", 32, "--workers", 0, "--log-every", 1, "--out", tmp_path)
    lines = log_lines(tmp_path / "vqkd.jsonl")
    measured = [x for x in lines if "cosine" in x]
    assert len(measured) >= 5
    for x in measured:
        assert x["cosine"] == pytest.approx((x["cosine_hog"] + x["cosine_pixel"]) / 2, abs=1e-5)
    model = vqkd.load_tokenizer(tmp_path / "vqkd.pt")
    assert model.decode(vqkd.l2(torch.randn(1, 36, 16))).shape == (1, 36, 144 + 192)


@pytest.mark.slow
def test_a_cached_teacher_trains_and_the_next_run_reads_the_same_features(tmp_path):
    flags = ["--limit", 128, "--steps", 6, "--continuous-steps", 2, "--batch-size", 32, "--workers", 0,
             "--log-every", 1, "--amp", "no", "--cache-teacher", tmp_path / "cache"]
    stage("vqkd.py", *flags, "--out", tmp_path / "whole")
    made = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
    stage("vqkd.py", *flags, "--out", tmp_path / "again", "--workers", 1)
    assert len(made) >= 2                                    # and they are not made anew:
    assert made == {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
    a, b = (vqkd.load_tokenizer(tmp_path / name / "vqkd.pt").state_dict() for name in ("whole", "again"))
    assert all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------------------- the loop
QUICK = "--limit 16 --batch-size 8 --workers 0 --device cpu --amp no --log-every 1 --codes 16".split()


def test_recipe_is_the_papers_table():
    args = vqkd.parse_args(["--model", "base"])
    assert (args.codes, args.code_dim, args.encoder_depth, args.decoder_depth, args.decay, args.beta) == (
        8192, 32, 12, 3, 0.99, 1.0)
    assert (args.lr, args.min_lr, args.beta2, args.weight_decay, args.batch_size, args.epochs, args.warmup_epochs) == (
        5e-5, 1e-5, 0.99, 1e-4, 512, 100, 10)
    assert (args.teacher, args.crop_scale, args.continuous_steps, args.restart_dead_codes) == ("clip", 0.08, 0, 0)


def test_the_quantizer_joins_after_the_continuous_steps_and_beta_weighs_its_term(tmp_path):
    vqkd.main([*QUICK, *"--continuous-steps 2 --steps 4 --beta 3".split(), "--out", str(tmp_path)])
    lines = [x for x in log_lines(tmp_path / "vqkd.jsonl") if "lr" in x]
    for x in lines:
        assert ("perplexity" in x) == (x["step"] >= 2) and (x["commit"] > 0) == (x["step"] >= 2)
        assert x["loss"] == pytest.approx(1 - x["cosine"] + 3 * x["commit"], abs=1e-5)


def test_an_evaluation_does_not_depend_on_how_its_images_are_batched(tmp_path):
    args = vqkd.parse_args([*QUICK, "--encoder-depth", "1", "--out", str(tmp_path)])
    model, dataset = vqkd.build(args, (144,)), data.open_data("shapes", "val", transforms.EvalTransform(48), limit=10)
    model.quantize.embedding.weight.copy_(vqkd.l2(torch.randn(16, 16)))
    results = []
    for args.micro_batch in (10, 4):                         # 4, 4 and 2 images
        results.append(vqkd.evaluate(model, teachers.build_teacher("hog", (6, 6), 8, "cpu"), dataset, vqkd.Run("vqkd", args)))
    assert results[0] == pytest.approx(results[1], abs=1e-5)
