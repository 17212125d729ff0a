"""Run: steps and batches, what ends a run, resume files, what a dry run says."""
import argparse
import json
import math
import os

import pytest
import torch
from torch import nn

from support import data
from support.args import fill_in, run_parser
from support.files import UserError, write_file
from support.optim import adamw, param_groups
from support.process import Process
from support.run import Run, contents, differences, dry_run, find_resume_file

RECIPE = {"batch_size": (8,), "micro_batch": (8,), "epochs": (2,), "warmup_epochs": (1,)}


class Small(nn.Linear):
    """Stands in for a network: Run needs its weights and the sizes that it states."""

    def __init__(self):
        super().__init__(2, 1)

    def arch(self):
        return dict(width=2)


def arguments(out, *flags):
    args = run_parser("a stage").parse_args(
        ["--out", str(out), "--limit", "16", "--workers", "0", "--device", "cpu", "--amp", "no",
         *map(str, flags)])
    fill_in(args, ["tiny"], RECIPE)
    return args


def begin(out, *flags, **options):
    """-> Run with a small network, as far as its loop."""
    run = Run("vqkd", arguments(out, *flags))
    model = Small()
    optimizer = adamw(param_groups(model.named_parameters(), 0.0), (0.9, 0.99), run.device)
    run.start(data.open_data("shapes", "train", limit=16), model=model, optimizer=optimizer,
              **options)
    return run


# --- numbers of a run -----------------------------------------------------------------------------
@pytest.mark.parametrize("batch, micro, world, expected", [
    (64, None, 1, (64, 1)), (64, 16, 1, (16, 4)), (64, 16, 2, (16, 2)), (64, 64, 2, (32, 1)),
    (12, 5, 1, (4, 3)),                      # parts are equal and no larger than asked for
    (7, 3, 1, (1, 7))])
def test_a_batch_is_split_into_equal_micro_batches(batch, micro, world, expected):
    assert data.split_batch(batch, micro, world) == expected


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match="--batch-size 9 .* 2 processes"):
        data.split_batch(9, None, 2)


@pytest.mark.parametrize("steps, warmup_epochs, expected", [
    (None, 1, (8, 2, 2)),                    # 25 images: 5 are too few for a third batch of 10
    (None, 1.5, (8, 3, 2)),
    (20, 1, (20, 5, 2)),                     # a quarter of the steps, as in the recipe
    (1, 4, (1, 0, 2))])                      # the warm-up leaves at least one step
def test_steps_and_warm_up_follow_from_the_epochs_or_keep_their_proportion(
        steps, warmup_epochs, expected):
    args = argparse.Namespace(batch_size=10, steps=steps, epochs=4, warmup_epochs=warmup_epochs)
    assert data.resolve_steps(args, 25) == expected


def test_fewer_images_than_a_batch_are_refused():
    args = argparse.Namespace(batch_size=10, steps=None, epochs=4, warmup_epochs=1)
    with pytest.raises(UserError, match="9 training images .* lower --batch-size"):
        data.resolve_steps(args, 9)


def test_images_arrive_as_floats_between_0_and_1():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(data.to_float(pixels, "cpu"), torch.tensor([0, 0.2, 1]))
    floats = torch.tensor([0.0, 0.3, 1.0])   # the type declares the range; nothing is guessed
    assert torch.equal(data.to_float(floats, "cpu"), floats)


def test_a_run_logs_its_first_and_last_step_and_evaluates_after_every_epoch(tmp_path):
    run = begin(tmp_path, "--epochs", 3, "--log-every", 4)
    seen = [(step, run.log_due, run.evaluation_due) for step in run.steps()]
    assert seen == [(0, True, False), (1, False, True), (2, False, False), (3, False, True),
                    (4, True, False), (5, True, True)]


def test_micro_batches_together_are_the_batch_and_gradients_their_mean(tmp_path):
    whole = begin(tmp_path / "whole", "--steps", 1)
    parts = begin(tmp_path / "parts", "--steps", 1, "--micro-batch", 2)
    gradients = []
    for run in (whole, parts):
        for _ in run.steps():
            batches = []
            for images, labels in run.micro_batches():
                batches.append(labels)
                features = torch.stack([labels.float(), images.float().mean(dim=(1, 2, 3))], 1)
                run.backward((run.model.weight * features).sum() / len(labels))
        gradients.append((torch.cat(batches), run.model.weight.grad))
    assert parts.accumulation == 4
    assert torch.equal(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


# --- what ends a run ------------------------------------------------------------------------------
def feed(run, losses, device="cpu"):
    """Run the loop on given losses.  -> what ended it"""
    run.device = torch.device(device)        # the numbers stay on the CPU; the rule is the device's
    with pytest.raises(UserError) as caught:
        for step in run.steps():
            run.backward(run.model.weight.sum() * 0 + losses[step])
            if run.log_due:
                run.log(loss=losses[step])
    return caught.value


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_ends_the_run_with_its_step_and_images(tmp_path, loss):
    run = begin(tmp_path, "--steps", 30, "--log-every", 100)
    error = feed(run, [1.0, 1.0, 1.0, loss] + 26 * [1.0])
    names = data.names_of(run.train_set, 8, 3, seed=0)
    assert "not finite at step 3: lower --lr, or check" in str(error)
    assert ", ".join(names[:3]) in str(error)
    last = json.loads((tmp_path / "vqkd.jsonl").read_text().splitlines()[-1])
    assert last["images"] == names
    assert not list(tmp_path.glob("*.pt"))
    assert run.step == 3


@pytest.mark.parametrize("log_every, noticed", [(100, 10), (5, 5)])
def test_a_gpu_is_waited_for_every_tenth_step_and_before_logging_only(
        tmp_path, log_every, noticed):
    run = begin(tmp_path, "--steps", 30, "--log-every", log_every)
    error = feed(run, [1.0, math.nan] + 28 * [1.0], device="cuda")
    assert "not finite at step 1:" in str(error)             # the first one, noticed late
    assert run.step == noticed


def test_no_bad_loss_gets_into_the_log(tmp_path):
    run = begin(tmp_path, "--steps", 3, "--log-every", 1)
    feed(run, [1.0, math.nan, 1.0])
    lines = [json.loads(x) for x in (tmp_path / "vqkd.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [0]


def test_the_images_of_an_update_follow_from_its_step():
    dataset = data.open_data("shapes", "train", limit=40)
    loaded = list(data.TrainBatches(40, 8, 7, seed=3))
    for step in (0, 6):
        expected = [f"shapes train {i}" for _, i in loaded[step]]
        assert data.names_of(dataset, 8, step, seed=3) == expected


# --- resume files ---------------------------------------------------------------------------------
def save(out, step):
    """What Run.save leaves after `step` updates."""
    args = arguments(out)
    path = out / "vqkd.resume.pt"
    write_file(path, contents("vqkd", Small(), args) | dict(step=step), previous=f"{path}.prev")


def resumed(out, *flags):
    return find_resume_file("vqkd", arguments(out, *flags), Process())


def test_only_arguments_that_change_the_result_count_as_differences():
    old = dict(lr=0.1, fresh=True, workers=1, seed=0)
    assert differences(old, dict(lr=0.2, fresh=False, workers=4, seed=0)) == ["--lr 0.1 -> 0.2"]
    assert differences(old, old | dict(fresh=False)) == []


def test_a_run_goes_on_in_the_precision_that_it_has(tmp_path):
    run = begin(tmp_path, "--amp", "bf16")
    run.save()
    assert begin(tmp_path, "--amp", "auto").amp == "bf16"
    with pytest.raises(UserError, match="--amp bf16 -> no"):
        begin(tmp_path, "--amp", "no")


def test_a_damaged_resume_file_gives_way_to_the_one_before(tmp_path, capsys):
    save(tmp_path, 2)
    save(tmp_path, 4)
    assert resumed(tmp_path)["step"] == 4
    (tmp_path / "vqkd.resume.pt").write_bytes(b"half")
    assert resumed(tmp_path)["step"] == 2
    assert "the one before" in capsys.readouterr().err


def test_a_finished_run_leaves_its_result_only_and_is_not_done_again(tmp_path, capsys):
    run = begin(tmp_path)
    run.save()
    run.finish(dict(loss=1.0))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["vqkd.jsonl", "vqkd.pt"]
    with pytest.raises(UserError, match="--batch-size 8 -> 4.*--fresh"):
        resumed(tmp_path, "--batch-size", 4)
    with pytest.raises(SystemExit) as done:
        resumed(tmp_path)
    assert done.value.code == 0
    assert "already done" in capsys.readouterr().out


def test_other_classes_than_those_of_the_run_are_refused(tmp_path):
    begin(tmp_path, about=dict(classes=["cat", "dog"])).save()
    begin(tmp_path, about=dict(classes=["cat", "dog"]))
    with pytest.raises(UserError, match="the classes of shapes are no longer those of the run"):
        begin(tmp_path, about=dict(classes=["cat", "cow"]))


def test_all_parts_are_saved_and_restored(tmp_path):
    class Counter:
        count = 0

        def state_dict(self):
            return dict(count=self.count)

        def load_state_dict(self, state):
            self.count = state["count"]

    counter = Counter()
    run = begin(tmp_path, counter=counter)
    counter.count = 7
    run.step = 1
    run.save()
    again = Counter()
    later = begin(tmp_path, counter=again)
    assert (later.step, again.count) == (2, 7)
    assert torch.equal(later.model.weight, run.model.weight)


def test_at_any_moment_of_writing_one_whole_resume_file_is_there(tmp_path, monkeypatch):
    """Writing stops with an error at each of its moments; what a resumed run reads is whole."""
    save(tmp_path, 1)
    save(tmp_path, 2)

    def die(*_, **__):
        raise KeyboardInterrupt
    for owner, name in ((torch, "save"), (os, "fsync")):     # in the file; before it is on the disk
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(owner, name, die)
            save(tmp_path, 3)
        assert resumed(tmp_path)["step"] == 2

    calls, rename = [], os.replace

    def second_dies(*names):                                 # between the two renames
        calls.append(names)
        if len(calls) == 2:
            die()
        rename(*names)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", second_dies)
        save(tmp_path, 4)
    assert not (tmp_path / "vqkd.resume.pt").exists()
    assert resumed(tmp_path)["step"] == 2


def test_where_no_resume_file_can_be_read_nothing_is_overwritten(tmp_path):
    for name in ("vqkd.resume.pt", "vqkd.resume.pt.prev"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match="no resume file in .* can be read .*--fresh to start"):
        resumed(tmp_path)
    assert (tmp_path / "vqkd.resume.pt").read_bytes() == b"damaged"


# --- without running ------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, says", [
    ([], "3,000 steps of 8 images = 2 epochs of 12,000"),
    (["--limit", 80], "20 steps of 8 images = 2 epochs of 80"),
    (["--steps", 7], "7 steps of 8 images"),
    (["--data", "datasets/imagenet"], "320,290 steps of 8 images = 2 epochs of 1,281,167"),
    (["--data", "nowhere"], "2 epochs of the images in nowhere, which is not there yet")])
def test_a_dry_run_says_how_many_steps_and_how_much_memory(tmp_path, capsys, flags, says):
    args = arguments(tmp_path, *flags)
    args.limit = args.limit if "--limit" in flags else None
    dry_run(args, Small(), "one line more")
    out = capsys.readouterr().out
    assert says in out
    assert "3 trainable parameters; one line more" in out
    assert "memory: weights 0.000 GiB" in out
    assert not list(tmp_path.iterdir())


def test_dry_run_counts_the_images_of_a_folder(tmp_path, capsys):
    for n in range(20):
        path = tmp_path / "train" / "cat" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    args = arguments(tmp_path / "out", "--data", tmp_path)
    args.limit = None
    dry_run(args, Small())
    assert "4 steps of 8 images = 2 epochs of 20" in capsys.readouterr().out
