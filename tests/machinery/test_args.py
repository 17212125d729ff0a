"""Flags: ranges, recipes, names that have moved."""
import argparse
import math
import os
import sys
from pathlib import Path

import pytest

import vqkd
from conftest import ROOT
from extras import features
from support.args import Parser, check_range, fill_in, number, run_parser, whole
from support.files import UserError

RECIPE = {"batch_size": (64, 2048), "epochs": (5, 300)}
MODELS = ("tiny", "base")


def parsed(*flags):
    args = run_parser("a stage").parse_args(flags)
    fill_in(args, MODELS, RECIPE)
    return args


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan", "inf"])
def test_a_number_outside_its_range_is_refused_by_the_name_of_its_flag(value):
    p = Parser("a stage")
    p.add_argument("--drop-path", type=number(0, 1))
    with pytest.raises(UserError, match=r"--drop-path: must lie in \[0, 1\]"):
        p.parse_args(["--drop-path", value])


@pytest.mark.parametrize("value", ["0", "1", "0.5"])
def test_the_ends_of_a_range_pass(value):
    p = Parser("a stage")
    p.add_argument("--drop-path", type=number(0, 1))
    assert p.parse_args(["--drop-path", value]).drop_path == float(value)


def test_a_range_that_depends_on_another_flag_is_checked_by_name():
    check_range(argparse.Namespace(early_layer=6), "early_layer", 1, 6)
    for wrong in (0, 7, math.nan):
        with pytest.raises(UserError, match=r"--early-layer must lie in \[1, 6\]"):
            check_range(argparse.Namespace(early_layer=wrong), "early_layer", 1, 6)


@pytest.mark.parametrize("text", ["1.5", "many", "-1", ""])
def test_a_whole_number_is_a_whole_number_in_its_range(text):
    p = Parser("a stage")
    p.add_argument("--codes", type=whole(0))
    with pytest.raises(UserError, match="--codes"):
        p.parse_args(["--codes", text])


def test_a_typed_flag_wins_over_the_recipe_and_the_recipe_over_what_stages_share():
    args = parsed("--epochs", "2")
    assert (args.epochs, args.batch_size, args.log_every, args.save_every) == (2, 64, 20, 200)
    assert (args.data, args.out, args.image_size) == ("shapes", Path("runs/tiny"), 48)
    args = parsed("--model", "base")
    assert (args.epochs, args.batch_size, args.data) == (300, 2048, "datasets/imagenet")


@pytest.mark.parametrize("flags, words", [
    (["--model", "huge"], "huge.*tiny"), (["--steps", "0"], "--steps"),
    (["--workers", "-1"], "--workers"), (["--steps", "3", "--epochs", "2"], "give one of them"),
    (["--image-size", "50"], "--image-size 50 is not a multiple of --patch-size 8"),
    (["--image-size", "4"], "--patch-size must lie in"),
    (["--image-size", "8000"], "--image-size must lie in")])
def test_flags_that_cannot_be_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        parsed(*flags)


def test_a_flag_has_to_be_written_out_in_full():
    with pytest.raises(UserError, match="unrecognized arguments: --epoch"):
        parsed("--epoch", "2")


@pytest.fixture
def commands(monkeypatch):
    """The commands that would be run. They end with exit code 5."""
    ran = []

    def run(words, env):
        ran.append((words, env))
        return argparse.Namespace(returncode=5)
    monkeypatch.setattr("subprocess.run", run)
    return ran


@pytest.mark.parametrize("flags, words", [
    ("--encode I --init F --out D", "F I --what tokens --out D/tokens.npz"),
    ("--encode=I", "runs/tiny/vqkd.pt I --what tokens --out runs/tiny/tokens.npz"),
    ("--encode I --model base --workers 2 --device cpu --batch-size 8 --on-bad-image skip",
     "runs/base/vqkd.pt I --what tokens --out runs/base/tokens.npz "
     "--batch-size 8 --workers 2 --device cpu --on-bad-image skip")])
def test_a_flag_that_became_a_command_runs_it_says_so_and_hands_its_exit_code_on(
        commands, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        vqkd.parse_args(flags.split())
    [(command, environment)] = commands
    assert command == [sys.executable, "-m", "extras.features", *words.split()]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert ended.value.code == 5
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"note: --encode is now `python -m extras.features {words}`"]
    features.parse_args(command[3:])         # which knows all of these words


def test_a_flag_that_became_a_command_is_no_argument_and_excuses_no_mistake(commands):
    assert not hasattr(vqkd.parse_args([]), "encode")
    with pytest.raises(UserError, match="unrecognized arguments: --encoder"):
        vqkd.parse_args(["--encode", "I", "--encoder"])
    assert not commands


def test_a_stage_refuses_run_flags_that_it_does_not_honour():
    p = run_parser("a stage", without=("compile", "save_every"))
    for name in ("--compile", "--save-every"):
        with pytest.raises(UserError, match=f"unrecognized arguments: {name}"):
            p.parse_args([name])
    assert not hasattr(p.parse_args([]), "save_every")
