"""Flags: ranges, recipes, names that have moved."""
import argparse
import math
from pathlib import Path

import pytest

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


def test_a_flag_that_moved_answers_with_the_new_command():
    p = run_parser("a stage", moved={"--encode": "type this instead"})
    for flags in (["--encode", "x"], ["--encode=x"]):
        with pytest.raises(UserError, match="--encode has moved: type this instead"):
            p.parse_args(flags)


def test_a_stage_refuses_run_flags_that_it_does_not_honour():
    p = run_parser("a stage", without=("compile", "save_every"))
    for name in ("--compile", "--save-every"):
        with pytest.raises(UserError, match=f"unrecognized arguments: {name}"):
            p.parse_args([name])
    assert not hasattr(p.parse_args([]), "save_every")
