"""What all stages rest on: schedules, batches, ranges, files that survive a crash, logs, seeds, parameter groups."""
import argparse
import itertools
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from support import data, engine, files
from conftest import ROOT
from support.engine import UserError
from model import ViT

ALONE = engine.Process(0, 1, torch.device("cpu"))


def arguments(**given):
    return argparse.Namespace(**(dict(model="tiny", data="shapes", image_size=48, fresh=False, amp="no", amp_auto=False) | given))


# ------------------------------------------------------------------------------------------------ numbers of the run
def test_the_schedule_starts_at_zero_peaks_twice_and_never_reaches_the_final_rate():
    rates = [engine.cosine_schedule(step, 1.0, 0.1, total=12, warmup=5) for step in range(12)]
    assert rates[:6] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 6 / 7))) and rates[-1] > 0.1
    assert engine.cosine_schedule(0, 1.0, 0.0, 10) == 1.0    # no warm-up
    assert engine.cosine_schedule(0, 1.0, 0.0, 10, warmup=1, start=0.2) == 0.2


@pytest.mark.parametrize("batch, micro, world, expected", [
    (64, None, 1, (64, 1)), (64, 16, 1, (16, 4)), (64, 16, 2, (16, 2)), (64, 64, 2, (32, 1)),
    (12, 5, 1, (4, 3)),                                      # parts are equal and no larger than asked for
    (7, 3, 1, (1, 7))])
def test_a_batch_is_split_into_equal_micro_batches(batch, micro, world, expected):
    assert data.split_batch(batch, micro, world) == expected


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match="--batch-size 9 .* 2 processes"):
        data.split_batch(9, None, 2)


def test_steps_and_warm_up_follow_from_the_epochs_or_keep_their_proportion():
    args = argparse.Namespace(batch_size=10, steps=None, epochs=4, warmup_epochs=1)
    assert data.resolve_steps(args, 25) == (8, 2, 2)       # 5 images too few for a third batch
    args.warmup_epochs = 1.5
    assert data.resolve_steps(args, 25) == (8, 3, 2)
    args.warmup_epochs = 1
    args.steps = 20
    assert data.resolve_steps(args, 25) == (20, 5, 2)      # a quarter of the steps, as in the recipe
    args.steps, args.warmup_epochs = 1, 4
    assert data.resolve_steps(args, 25) == (1, 0, 2)       # the warm-up leaves at least one step
    with pytest.raises(UserError, match="9 training images .* lower --batch-size"):
        data.resolve_steps(args, 9)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_number_outside_its_range_is_refused_by_the_name_of_its_flag(value):
    with pytest.raises(UserError, match="--drop-path must lie in"):
        engine.check_ranges(argparse.Namespace(drop_path=value), [("drop_path", 0, 1)])


@pytest.mark.parametrize("value", [0, 1, 0.5, None])
def test_the_ends_of_a_range_and_a_flag_not_given_pass(value):
    engine.check_ranges(argparse.Namespace(drop_path=value), [("drop_path", 0, 1)])


def test_a_typed_flag_wins_over_the_recipe_and_the_recipe_over_what_stages_share():
    parser = argparse.ArgumentParser()
    engine.add_run_args(parser)
    recipes = {"tiny": dict(batch_size=64, epochs=5, log_every=7)}
    args = engine.with_recipe(parser.parse_args(["--epochs", "2"]), recipes)
    assert (args.epochs, args.batch_size, args.log_every, args.save_every) == (2, 64, 7, 200)
    for flags, words in ((["--model", "huge"], "huge.*tiny"), (["--steps", "0"], "--steps"), (["--workers", "-1"], "--workers")):
        with pytest.raises(UserError, match=words):
            engine.with_recipe(parser.parse_args(flags), recipes)


def test_images_arrive_as_floats_between_0_and_1():
    torch.testing.assert_close(data.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8), "cpu"), torch.tensor([0, 0.2, 1]))
    floats = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(data.to_float(floats, "cpu"), floats)           # the range is declared by the type, never guessed


def test_the_same_seeds_give_the_same_draws_from_all_three_generators():
    def draws(*numbers):
        engine.seed_all(*numbers)
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()
    first = draws(0, 1, 2)
    assert draws(0, 1, 2) == first
    for other in ((0, 2, 1), (0, 12), (1, 1, 2)):
        assert all(a != b for a, b in zip(draws(*other), first))


def test_biases_norms_and_positions_do_not_decay_and_deep_layers_learn_fastest():
    model = nn.Module()
    model.cls_token, model.mask_token = nn.Parameter(torch.zeros(1, 1, 2)), nn.Parameter(torch.zeros(1, 1, 2))
    model.fc, model.norm = nn.Linear(2, 2), nn.LayerNorm(2)
    model.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    groups = engine.param_groups(model.named_parameters(), 0.05)
    assert {n: g["weight_decay"] for g in groups for n in g["names"]} == {
        "cls_token": 0, "mask_token": 0.05, "fc.weight": 0.05, "fc.bias": 0, "norm.weight": 0, "norm.bias": 0}
    groups = engine.param_groups(model.named_parameters(), 0.05, layer_id=lambda name: 0 if "token" in name else 2,
                                 layer_decay=0.5, depth=1)
    assert {n: g["lr_scale"] for g in groups for n in g["names"]} == {
        "cls_token": 0.25, "mask_token": 0.25, "fc.weight": 1, "fc.bias": 1, "norm.weight": 1, "norm.bias": 1}
    optimizer = engine.adamw(groups, (0.9, 0.98), torch.device("cpu"))
    engine.set_lr(optimizer, 0.4)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.1, 0.4])


# -------------------------------------------------------------------------------------------------------------- files
def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.pt"
    engine.write_file(path, dict(kind="vqkd", x=torch.ones(3)))
    def disk_full(contents, f):
        f.write(b"half a fi")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(UserError, match="could not write .*No space left"):
        engine.write_file(path, dict(kind="vqkd", x=torch.zeros(3)))
    assert torch.equal(engine.read_file(path, kind="vqkd")["x"], torch.ones(3))
    assert [f.name for f in path.parent.iterdir()] == ["a.pt"]


class Hostile:
    def __reduce__(self):
        return (open, ("/tmp/beit2_was_here", "w"))


@pytest.mark.parametrize("make, words", [
    (lambda p: None, "there is no file .*; make it so"),
    (lambda p: p.write_bytes(b""), "a.pt"),
    (lambda p: p.write_text("hello, this is no checkpoint"), "a.pt"),
    (lambda p: (torch.save(dict(x=torch.ones(999)), p), p.write_bytes(p.read_bytes()[:2000])), "truncated"),
    (lambda p: torch.save(dict(x=Hostile()), p), "objects other than tensors"),
    (lambda p: torch.save([1, 2], p), "holds a list"),
    (lambda p: torch.save(dict(kind="pretrain"), p), "'pretrain' file where a 'vqkd' file"),
    (lambda p: torch.save(dict(x=1), p), "'foreign' file where")])
def test_what_is_no_checkpoint_of_this_kind_is_refused_with_a_sentence(make, words, tmp_path):
    make(tmp_path / "a.pt")
    with pytest.raises(UserError, match=words) as caught:
        engine.read_file(tmp_path / "a.pt", kind="vqkd", remedy="make it so")
    assert "\n" not in str(caught.value)


def test_the_namespace_of_a_released_checkpoint_is_allowed(tmp_path):
    torch.save(dict(model=dict(w=torch.ones(2)), args=argparse.Namespace(lr=0.1)), tmp_path / "a.pt")
    assert engine.read_file(tmp_path / "a.pt")["args"].lr == 0.1


def test_only_arguments_that_change_the_result_count_as_differences():
    old, new = dict(lr=0.1, fresh=True, workers=1, seed=0), dict(lr=0.2, fresh=False, workers=4, seed=0)
    assert engine.differences(old, new) == ["--lr 0.1 -> 0.2"]
    assert engine.differences(old, old | dict(fresh=False)) == []


def test_fresh_moves_the_folder_of_a_tokenizer_but_only_the_files_of_a_later_stage(tmp_path):
    out = tmp_path / "tiny"
    def fill(*names):
        out.mkdir(exist_ok=True)
        for name in names:
            (out / name).write_text("")
    def names(folder):
        return sorted(f.name for f in folder.iterdir())
    fill("vqkd.pt", "pretrain.pt", "pretrain.jsonl")
    files.set_aside("pretrain", out)
    assert names(out) == ["vqkd.pt"] and names(tmp_path / "tiny.1") == ["pretrain.jsonl", "pretrain.pt"]
    files.set_aside("vqkd", out)
    assert not out.exists() and names(tmp_path / "tiny.2") == ["vqkd.pt"]
    files.set_aside("vqkd", out)                            # nothing there: nothing happens
    assert not (tmp_path / "tiny.3").exists()


def test_a_damaged_resume_file_gives_way_to_the_one_before(tmp_path, capsys):
    args = arguments(out=tmp_path)
    for step in (2, 4):
        engine.save_resume("vqkd", args, engine.describe_run("vqkd", args) | dict(step=step))
    assert engine.start_or_resume("vqkd", args, ALONE)["step"] == 4
    (tmp_path / "vqkd.resume.pt").write_bytes(b"half")
    assert engine.start_or_resume("vqkd", args, ALONE)["step"] == 2 and "the one before" in capsys.readouterr().err
    engine.finish("vqkd", args, engine.describe_run("vqkd", args))
    assert [f.name for f in tmp_path.iterdir()] == ["vqkd.pt"]
    with pytest.raises(UserError, match="--image-size 48 -> 96.*--fresh"):
        engine.start_or_resume("vqkd", arguments(out=tmp_path, image_size=96), ALONE)
    with pytest.raises(SystemExit) as done:
        engine.start_or_resume("vqkd", args, ALONE)
    assert done.value.code == 0 and "already done" in capsys.readouterr().out


def test_a_measured_precision_stays_that_of_the_run_that_goes_on(tmp_path):
    engine.save_resume("vqkd", arguments(out=tmp_path), engine.describe_run("vqkd", arguments(amp="bf16", amp_auto=True)))
    args = arguments(out=tmp_path, amp="no", amp_auto=True)
    engine.start_or_resume("vqkd", args, ALONE)
    assert args.amp == "bf16"


def test_a_resumed_log_holds_no_step_twice(tmp_path):
    path = tmp_path / "vqkd.jsonl"
    log = engine.Log(path, arguments(), ALONE, images=5)
    for step in range(4):
        log(step=step, loss=1 / 3)
    with open(path, "a") as f:
        f.write('{"step": 4, "lo')                           # the run was killed while it wrote
    engine.Log(path, arguments(), ALONE, start_step=2)(step=2, loss=0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 0, 1, 2]
    assert lines[0]["images"] == 5 and lines[0]["args"]["model"] == "tiny" and lines[1]["loss"] == 0.333333
    engine.Log(path, arguments(), ALONE)                     # a fresh start begins a fresh log
    assert len(path.read_text().splitlines()) == 1
    engine.Log(path, arguments(), ALONE, append=True)(loss=1)            # a measurement adds to those before it
    assert len(path.read_text().splitlines()) == 3
    engine.Log(tmp_path / "other.jsonl", arguments(), engine.Process(1, 2, None))(step=0)
    assert not (tmp_path / "other.jsonl").exists()           # only rank 0 writes


# ------------------------------------------------------------------------------------------------------ how a run ends
@pytest.mark.parametrize("error, code, says", [
    (UserError("--lr is wrong"), 2, "error: --lr is wrong\n"),
    (UserError("Caught UserError in worker 0.\nTraceback ...\nweights.UserError: a.jpg is broken"), 2, "error: a.jpg is broken\n")])
def test_a_user_error_is_one_sentence_and_exit_code_2(error, code, says, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        engine.run(main)
    assert caught.value.code == code and capsys.readouterr().err == says


def watch(tmp_path, process=ALONE, names=lambda step: [f"image {step}", "b", "c", "d"]):
    args = arguments(out=tmp_path)
    return engine.Watch(args, process, engine.Log(tmp_path / "vqkd.jsonl", args, process), names)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_ends_the_run_with_the_first_such_step_and_its_images(tmp_path, loss):
    w = watch(tmp_path)
    w.note(torch.tensor(1.0), 3)
    assert w.look(3, now=False) == 0
    for step, value in ((4, 1.0), (5, loss), (6, 2.0), (7, loss)):           # 5: noticed late, as on a GPU
        w.note(torch.tensor(value), step)
    with pytest.raises(UserError, match="not finite at step 5: lower --lr, or check .*image 5, b, c; all of them are in"):
        w.look(7, now=True)
    assert json.loads((tmp_path / "vqkd.jsonl").read_text().splitlines()[-1])["images"] == ["image 5", "b", "c", "d"]


def test_a_gpu_is_waited_for_every_tenth_step_and_before_logging_or_saving_only(tmp_path):
    w = watch(tmp_path, engine.Process(0, 1, torch.device("cpu")))
    w.process = engine.Process(0, 1, torch.device("cuda"))   # the numbers are on the CPU here, the rule is the GPU's
    w.note(torch.tensor(math.nan), 11)
    assert w.look(11, now=False) == 0
    for step, now in ((11, True), (20, False)):
        with pytest.raises(UserError, match="not finite at step 11"):
            w.look(step, now)


def test_the_images_of_an_update_follow_from_its_step():
    dataset = data.open_data("shapes", "train", limit=40)
    loaded = list(data.TrainBatches(40, 8, 7, seed=3))
    for step in (0, 6):
        assert data.names_of(dataset, 8, step, seed=3) == [f"shapes train {i}" for _, i in loaded[step]]


def test_a_log_refuses_to_go_on_with_other_data_and_says_so_of_another_place(tmp_path, capsys):
    def start(step, **facts):
        return engine.Log(tmp_path / "vqkd.jsonl", arguments(), ALONE, step, **facts)
    start(0, images=5, steps=9)(step=0, loss=1.0)
    before = (tmp_path / "vqkd.jsonl").read_text()
    start(1, images=5, steps=9)
    assert (tmp_path / "vqkd.jsonl").read_text() == before and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="shapes is not what it was .*images 5 -> 6.*--fresh"):
        start(1, images=6, steps=9)
    lines = before.replace(f'"threads": {torch.get_num_threads()}', '"threads": 99')
    (tmp_path / "vqkd.jsonl").write_text(lines)
    start(1, images=5, steps=9)
    assert "in another place (threads 99 -> 1)" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path):
    log = engine.Log(tmp_path / "run" / "vqkd.jsonl", arguments(), ALONE)
    (tmp_path / "run").rename(tmp_path / "moved")            # while the run goes on
    with pytest.raises(UserError, match="cannot write .*vqkd.jsonl .No such file.*put the folder back"):
        log(step=1)
    with pytest.raises(UserError, match="cannot write .*choose another --out"):
        engine.Log("/proc/no/vqkd.jsonl", arguments(), ALONE)


# ------------------------------------------------------------------------------------------------------ the four loops
FLAGS = dict(            # unusual ones, so that a default would show
    vqkd="--lr 3e-2 --min-lr 1e-3 --beta2 0.9 --weight-decay 0.3 --continuous-steps 1 --codes 16 --warmup-epochs 2",
    pretrain="--lr 3e-3 --min-lr 1e-4 --beta2 0.9 --weight-decay 0.3 --drop-path 0.3 --warmup-epochs 2",
    finetune="--lr 3e-3 --min-lr 1e-4 --weight-decay 0.3 --layer-decay 0.5 --drop-path 0.3 --evaluations 3 "
             "--warmup-epochs 2 --mixup 0.5 --cutmix 0.25 --smoothing 0.2",
    segment="--lr 3e-3 --warmup-steps 4 --weight-decay 0.3 --layer-decay 0.5 --drop-path 0.3 --evaluations 3")


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """All four loops, one after the other, three epochs of two steps each. -> by stage what they told the optimiser
    (groups, betas, rates), how they mixed, and each batch (of the tokenizer?, training?, drop path, pixels from, to)."""
    import finetune, pretrain, segment, vqkd                 # noqa: E401
    out, told, real = tmp_path_factory.mktemp("loops"), {}, (engine.adamw, engine.set_lr, ViT.embed, finetune.mix)

    def adamw(groups, betas, device):
        told[stage].update(groups=groups, betas=betas)
        return real[0](groups, betas, device)

    def set_lr(optimizer, lr):
        told[stage]["rates"].append(lr)
        real[1](optimizer, lr)

    def embed(model, x, mask=None):
        if x.shape[1] == 3:                                  # not the tokenizer's decoder, which sees codes
            told[stage]["batches"].append((model.positions == "absolute", model.training, model.blocks[-1].drop_path,
                                           x.min().item(), x.max().item()))
        return real[2](model, x, mask)

    def mix(images, labels, classes, *how):
        told[stage]["mixed"] = how
        return real[3](images, labels, classes, *how)

    with pytest.MonkeyPatch.context() as patch:
        for place in (engine, vqkd, pretrain):
            patch.setattr(place, "adamw", adamw)
            patch.setattr(place, "set_lr", set_lr)
        patch.setattr(ViT, "embed", embed)
        patch.setattr(finetune, "mix", mix)
        for stage, module in dict(vqkd=vqkd, pretrain=pretrain, finetune=finetune, segment=segment).items():
            told[stage] = dict(rates=[], batches=[])
            module.main([*FLAGS[stage].split(), *"--limit 16 --batch-size 8 --workers 0 --amp no --device cpu".split(),
                         *("--epochs", "3") * (stage != "segment"), *("--steps", "6") * (stage == "segment"),
                         "--out", str(out)])
    return told


def test_every_loop_tells_the_optimiser_what_the_flags_say(loops):
    from segment import poly_schedule
    for stage, peak, final in (("vqkd", 3e-2 * 8 / 128, 1e-3), ("pretrain", 3e-3, 1e-4), ("finetune", 3e-3, 1e-4)):
        assert loops[stage]["rates"] == pytest.approx([
            engine.cosine_schedule(step, peak, final, total=6, warmup=4) for step in range(6)]), stage
    assert loops["segment"]["rates"] == pytest.approx([poly_schedule(step, 3e-3, 6, 4) for step in range(6)])
    for stage, told in loops.items():
        assert told["betas"] == (0.9, 0.9 if stage in ("vqkd", "pretrain") else 0.999), stage
        assert {group["weight_decay"] for group in told["groups"]} == {0.0, 0.3}, stage
        scales = {0.5 ** i for i in range(8)} if stage in ("finetune", "segment") else {1.0}     # tiny has six blocks
        assert {group["lr_scale"] for group in told["groups"]} == scales, stage
    assert loops["finetune"]["mixed"] == (0.5, 0.25, 0.2)


def test_every_loop_trains_in_training_mode_with_drop_path_and_evaluates_without(loops):
    for stage, told in loops.items():
        own = [(training, rate) for tokenizer, training, rate, *_ in told["batches"] if tokenizer == (stage == "vqkd")]
        assert [mode for mode, _ in itertools.groupby(training for training, _ in own)] == [True, False] * 3, stage
        assert sum(training for training, _ in own) == 6 + (stage == "vqkd"), stage      # and once for the first codes
        assert all(rate == pytest.approx(0 if stage == "vqkd" else 0.3) for _, rate in own), stage
    assert not any(training for tokenizer, training, *_ in loops["pretrain"]["batches"] if tokenizer)    # it is frozen


def test_every_network_gets_its_own_pixels_in_training_and_in_evaluation(loops):
    for stage, told in loops.items():
        for tokenizer, *_, low, high in told["batches"]:
            if tokenizer:
                assert -1 <= low < -0.5 and 0.5 < high <= 1, stage
            else:                                            # black is -2.1 to -1.8, white 2.2 to 2.6
                assert -2.2 < low < -0.9 and 1.02 < high < 2.7, stage


def test_bf16_products_are_bf16_and_others_float32():
    x, device = torch.ones(2, 2), torch.device("cpu")
    for amp, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        with engine.autocast(device, amp):
            assert (x @ x).dtype == dtype


def test_the_optimiser_is_adamw_with_eps_1e_8():
    groups = [dict(params=[nn.Parameter(torch.ones(2))], lr_scale=1.0)]
    optimizer = engine.adamw(groups, (0.9, 0.98), torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["eps"] == 1e-8


def test_no_command_imports_what_it_may_not_need():
    stages = ("vqkd, pretrain, finetune, linprobe, segment, extras.visualize, extras.convert, results.factors, "
              "results.ablate")
    slow = "torchvision open_clip timm scipy matplotlib torch._dynamo".split()           # as long as torch itself
    code = f"import sys, {stages}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_a_step_frees_is_not_fetched_from_the_kernel_again():
    code = """
import resource, torch
from support import engine
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)                                       # 64 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for keep in (False, True):
    engine.keep_freed_memory(keep), faults()
    print(min(faults() for _ in range(5)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert 4 * kept < returned
