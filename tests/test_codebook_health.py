"""Codebook health: how a collapse looks, when it is noticed, what helps; and the loop around it."""
import math
import types

import pytest
import torch

import vqkd
from conftest import log_lines, stage
from support import codebook, data, teachers, transforms
from support.codebook import codebook_usage, resize_codebook, restart_dead_codes
from support.files import write_file
from support.process import Process
from support.run import contents


# --- usage ----------------------------------------------------------------------------------------
def test_perplexity_counts_the_codes_in_use():
    usage = codebook_usage(torch.tensor([5.0, 5.0, 5.0, 5.0, 0.0, 0.0]))
    assert usage["perplexity"] == pytest.approx(4)
    assert usage["entropy"] == pytest.approx(math.log(4))
    assert usage["codes_used"] == 4 and usage["dead_codes"] == 2
    assert usage["top10_share"] == pytest.approx(100)
    collapsed = torch.tensor([97.0, 1.0, 1.0, 1.0])          # though all codes are used
    assert codebook_usage(collapsed)["perplexity"] < 1.3


def test_ten_most_used_codes_of_twenty_equal_ones_hold_half():
    assert codebook_usage(torch.full((20,), 7.0))["top10_share"] == pytest.approx(50)


# --- noticing a collapse --------------------------------------------------------------------------
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
    # Below 20 % of the best, and once, not at every step.
    assert watch([56, 40, 25, 16, 9, 4, 2, 2, 2]) == [4]


def test_a_healthy_dip_is_no_collapse():
    # The first steps after the k-means start look like this.
    assert watch([59, 49, 17, 35, 42, 53, 55, 58]) == []


def test_codes_that_never_came_to_life_are_noticed_without_a_best_to_fall_from():
    assert watch([3, 3, 3]) == [0]


def test_a_second_collapse_after_a_recovery_is_a_second_warning():
    assert watch([60, 10, 20, 10, 50, 10]) == [1, 5]         # 20 is no recovery


def test_a_small_batch_on_a_large_codebook_is_no_collapse():
    health, counts = vqkd.CodebookHealth(types.SimpleNamespace()), torch.zeros(8192)
    counts[:150] = 1.0                                       # more codes than vectors are unused
    health.notice_collapse(counts, Process())
    assert not health.warned and health.best == pytest.approx(150)


NAIVE = ("--continuous-steps 0 --restart-dead-codes 0 --decay 0.99 --warmup-epochs 0 --lr 3e-3 "
         "--batch-size 64").split()


@pytest.mark.slow
def test_naive_settings_are_warned_of_at_a_perplexity_over_a_tenth_of_the_codes(tmp_path):
    flags = [*NAIVE, "--steps", 12, "--limit", 640, "--workers", 0, "--log-every", 1,
             "--out", tmp_path]
    done = stage("vqkd.py", *flags)
    lines = log_lines(tmp_path / "vqkd.jsonl")
    warning = next(x for x in lines if "warning" in x)
    seen = {x["step"]: x["perplexity"] for x in lines
            if x.get("split") != "val" and "perplexity" in x}
    assert "collapsing" in done.stderr and "--lr" in done.stderr
    assert sum("warning" in x for x in lines) == 1
    assert seen[warning["step"]] > 6.4 and seen[11] < 6.4


def test_a_resumed_run_is_not_warned_again_of_the_same_fall(tmp_path, monkeypatch):
    flags = [*NAIVE, "--steps", "9", "--limit", "320", "--workers", "0", "--save-every", "4",
             "--out", str(tmp_path), "--device", "cpu"]      # a GPU looks at every tenth step
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
    flags = [*NAIVE, "--steps", 12, "--limit", 640, "--workers", 0, "--out", tmp_path,
             "--stop-on-collapse"]
    done = stage("vqkd.py", *flags, check=False)
    assert done.returncode == 2 and "the codebook is collapsing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "vqkd.pt").exists()


# --- what helps -----------------------------------------------------------------------------------
def test_dead_codes_restart_at_current_vectors_and_living_ones_stay():
    book = vqkd.Codebook(6, 4)
    book.embedding.weight.copy_(vqkd.l2(torch.randn(6, 4)))
    book.cluster_size.copy_(torch.tensor([5.0, 0.0, 3.0, 0.01, 1.0, 0.2]))
    before, h = book.embedding.weight.clone(), vqkd.l2(torch.randn(2, 10, 4))
    assert restart_dead_codes(book, h, Process()) == 2
    after = book.embedding.weight
    assert torch.equal(after[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
    for k in (1, 3):
        far = (h.flatten(0, 1) - after[k]).abs().amax(dim=1)
        assert far.min() < 1e-6 and book.cluster_size[k] == 1


def book_with_use(*use):
    book = vqkd.Codebook(len(use), 4)
    book.embedding.weight.copy_(vqkd.l2(torch.randn(len(use), 4)))
    book.cluster_size.copy_(torch.tensor(use))
    return book


def test_every_dead_code_gets_a_vector_of_its_own():
    for _ in range(20):
        book, h = book_with_use(0.0, 9.0, 0.0, 0.0), vqkd.l2(torch.randn(2, 2, 4))
        restart_dead_codes(book, h, Process())
        assert len(book.embedding.weight[[0, 2, 3]].unique(dim=0)) == 3


def test_a_restarted_code_counts_as_used_once_and_the_use_of_others_stays():
    book = book_with_use(5.0, 0.0, 3.0, 0.01)
    restart_dead_codes(book, vqkd.l2(torch.randn(2, 10, 4)), Process())
    torch.testing.assert_close(book.cluster_size, torch.tensor([5.0, 1.0, 3.0, 1.0]))
    assert restart_dead_codes(book, vqkd.l2(torch.randn(2, 10, 4)), Process()) == 0


def test_the_threshold_says_what_is_dead():
    book = book_with_use(5.0, 0.0, 3.0, 1.5)
    assert restart_dead_codes(book, vqkd.l2(torch.randn(1, 9, 4)), Process(), threshold=2.0) == 2


def test_with_fewer_vectors_than_dead_codes_only_so_many_restart():
    book = book_with_use(0.0, 0.0, 0.0, 0.0, 1.0)
    before, h = book.embedding.weight.clone(), vqkd.l2(torch.randn(1, 2, 4))
    assert restart_dead_codes(book, h, Process()) == 2
    assert (book.embedding.weight != before).any(dim=1).sum() == 2


def test_all_processes_receive_the_restarted_codes():
    book, sent = book_with_use(0.0, 1.0), []
    restart_dead_codes(book, vqkd.l2(torch.randn(1, 9, 4)),
                       types.SimpleNamespace(broadcast=lambda x: sent.append(x.clone())))
    assert len(sent) == 1 and torch.equal(sent[0], book.embedding.weight)


@pytest.mark.parametrize("every, due", [(0, []), (3, [0, 3, 6]), (5, [0, 5])])
def test_dead_codes_restart_every_so_many_steps_in_the_first_80_percent(every, due, monkeypatch):
    run = types.SimpleNamespace(device=torch.device("cpu"), total_steps=10)
    health = codebook.CodebookHealth(types.SimpleNamespace(restart_dead_codes=every, seed=0))
    restarted = []
    monkeypatch.setattr(codebook, "restart_dead_codes", lambda *_: restarted.append(run.step))
    for run.step in range(10):
        health.look_after(None, None, torch.ones(4), run)
    assert restarted == due


def test_a_shrunk_codebook_keeps_the_most_used_codes_in_their_order():
    table, use = vqkd.l2(torch.randn(5, 3)), torch.tensor([1.0, 9.0, 0.0, 4.0, 7.0])
    small, size = resize_codebook(table, use, 3)
    assert torch.equal(small, table[[1, 3, 4]]) and size.tolist() == [9, 4, 7]


@pytest.mark.parametrize("codes", [7, 10, 17])
def test_a_grown_codebook_keeps_all_codes_and_splits_the_most_used(codes):
    table, use = vqkd.l2(torch.randn(5, 16)), torch.tensor([1.0, 9.0, 0.0, 4.0, 7.0])
    large, size = resize_codebook(table, use, codes)
    assert large.shape == (codes, 16) and torch.equal(large[:5], table)
    torch.testing.assert_close(large.norm(dim=-1), torch.ones(codes))
    parents = vqkd.nearest_code(large[5:], table)
    assert parents[:2].tolist() == [1, 4]                    # the two most used are split first
    assert (large[5:] * table[parents]).sum(-1).min() > 0.99
    assert not torch.equal(large[5:], table[parents])
    torch.testing.assert_close(size.sum(), use.sum())        # parent and child share the use


def test_a_codebook_of_the_same_size_stays():
    table, use = torch.randn(5, 3), torch.rand(5)
    same, size = resize_codebook(table, use, 5)
    assert torch.equal(same, table) and torch.equal(size, use)


def test_init_with_another_number_of_codes_resizes_the_codebook(tmp_path):
    common = "--limit 64 --batch-size 16 --workers 0 --encoder-depth 1 --seed 3".split()
    frozen = "--steps 1 --lr 0 --decay 1 --restart-dead-codes 0".split()
    first = vqkd.parse_args([*common, "--codes", "16", "--out", str(tmp_path / "a")])
    model = vqkd.build(first, (144,))
    model.quantize.embedding.weight.copy_(vqkd.l2(torch.randn(16, 16)))
    model.quantize.cluster_size.copy_(torch.arange(16.0))
    write_file(tmp_path / "a" / "vqkd.pt", contents("vqkd", model, first))
    for codes in (8, 24):
        vqkd.main([*common, *frozen, "--codes", str(codes), "--out", str(tmp_path / str(codes)),
                   "--init", str(tmp_path / "a" / "vqkd.pt")])
        table = vqkd.load_tokenizer(tmp_path / str(codes) / "vqkd.pt").quantize.embedding.weight
        kept = model.quantize.embedding.weight
        if codes == 8:
            kept = kept[8:]                                  # the most used ones
        assert len(table) == codes
        torch.testing.assert_close(table[:len(kept)], kept)


# --- several teachers -----------------------------------------------------------------------------
@pytest.mark.slow
def test_two_teachers_train_log_apart_and_load_again(tmp_path):
    stage("vqkd.py", "--teacher", "hog+pixel", "--limit", 128, "--steps", 4,
          "--continuous-steps", 1, "--batch-size", 32, "--workers", 0, "--log-every", 1,
          "--out", tmp_path)
    lines = log_lines(tmp_path / "vqkd.jsonl")
    measured = [x for x in lines if "cosine" in x]
    assert len(measured) >= 5
    for x in measured:
        assert x["cosine"] == pytest.approx((x["cosine_hog"] + x["cosine_pixel"]) / 2, abs=1e-5)
    model = vqkd.load_tokenizer(tmp_path / "vqkd.pt")
    assert model.decode(vqkd.l2(torch.randn(1, 36, 16))).shape == (1, 36, 144 + 192)


@pytest.mark.slow
def test_a_cached_teacher_trains_and_the_next_run_reads_the_same_features(tmp_path):
    flags = ["--limit", 128, "--steps", 6, "--continuous-steps", 2, "--batch-size", 32,
             "--workers", 0, "--log-every", 1, "--amp", "no", "--cache-teacher", tmp_path / "cache"]
    stage("vqkd.py", *flags, "--out", tmp_path / "whole")
    made = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
    stage("vqkd.py", *flags, "--out", tmp_path / "again", "--workers", 1)
    assert len(made) >= 2                                    # and they are not made anew:
    assert made == {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
    a, b = (vqkd.load_tokenizer(tmp_path / name / "vqkd.pt").state_dict()
            for name in ("whole", "again"))
    assert all(torch.equal(a[k], b[k]) for k in a)


# --- the loop -------------------------------------------------------------------------------------
QUICK = ("--limit 16 --batch-size 8 --workers 0 --device cpu --amp no --log-every 1 "
         "--codes 16").split()


def test_recipe_is_the_papers_table():
    args = vqkd.parse_args(["--model", "base"])
    assert (args.codes, args.code_dim, args.encoder_depth, args.decoder_depth) == (8192, 32, 12, 3)
    assert (args.decay, args.beta, args.batch_size) == (0.99, 1.0, 512)
    assert (args.lr, args.min_lr, args.beta2, args.weight_decay) == (5e-5, 1e-5, 0.99, 1e-4)
    assert (args.epochs, args.warmup_epochs) == (100, 10)
    assert (args.teacher, args.crop_scale) == ("clip", 0.08)
    assert (args.continuous_steps, args.restart_dead_codes) == (0, 0)


def test_the_quantizer_joins_after_the_continuous_steps_and_beta_weighs_its_term(tmp_path):
    vqkd.main([*QUICK, *"--continuous-steps 2 --steps 4 --beta 3".split(), "--out", str(tmp_path)])
    lines = [x for x in log_lines(tmp_path / "vqkd.jsonl") if "lr" in x]
    for x in lines:
        assert ("perplexity" in x) == (x["step"] >= 2)
        assert (x["commit"] > 0) == (x["step"] >= 2)
        assert x["loss"] == pytest.approx(1 - x["cosine"] + 3 * x["commit"], abs=1e-5)


def test_an_evaluation_does_not_depend_on_how_its_images_are_batched(tmp_path):
    args = vqkd.parse_args([*QUICK, "--encoder-depth", "1", "--out", str(tmp_path)])
    model = vqkd.build(args, (144,))
    dataset = data.open_data("shapes", "val", transforms.EvalTransform(48), limit=10)
    teacher = teachers.build_teacher("hog", (6, 6), 8, "cpu")
    model.quantize.embedding.weight.copy_(vqkd.l2(torch.randn(16, 16)))
    results = []
    for args.micro_batch in (10, 4):                         # 4, 4 and 2 images
        results.append(vqkd.evaluate(model, teacher, dataset, vqkd.Run("vqkd", args)))
    assert results[0] == pytest.approx(results[1], abs=1e-5)
