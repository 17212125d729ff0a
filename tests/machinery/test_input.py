"""Mistyped flags: every number has its range, contradictions are one sentence."""
import argparse
from unittest import mock

import pytest
from pictures import sentence

import finetune
import linprobe
import pretrain
import segment
import vqkd
from extras import visualize
from results import ablate, factors
from support import data
from support.codebook import require_grid, require_tokenizer
from support.files import UserError

# What reads the flags of a command, and other flags that it needs to get as far as the ranges.
CALLS = {
    "vqkd": (vqkd.parse_args, []),
    "pretrain": (pretrain.parse_args, []),
    "finetune": (finetune.parse_args, ["--init", "scratch"]),
    "linprobe": (linprobe.parse_args, []),
    "segment": (segment.parse_args, ["--init", "scratch"]),
    "visualize": (visualize.parse_args, []),
    "ablate": (ablate.main, ["--list"]),
    "factors": (factors.main, ["/nowhere"])}


# --- numbers --------------------------------------------------------------------------------------
class FoundParser(Exception):
    """Carries a command's parser out of it, before it reads any flag."""


def parser_of(call, flags):
    def caught(parser, *arguments, **options):
        raise FoundParser(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", caught):
        with pytest.raises(FoundParser) as found:
            call(flags)
    return found.value.args[0]


def numeric_flags():
    """(command, its flag, type, how many numbers) of every numeric flag that the parsers know."""
    for name, (call, flags) in CALLS.items():
        for action in parser_of(call, flags)._actions:
            kind = getattr(action.type, "kind", action.type)             # whole(...), number(...)
            count = action.nargs if isinstance(action.nargs, int) else 1
            if kind in (int, float):
                yield name, action.option_strings[0], kind, count


@pytest.mark.parametrize("command, flag, kind, count", list(numeric_flags()))
def test_a_number_out_of_all_reason_is_refused_by_the_name_of_its_flag(command, flag, kind, count):
    call, others = CALLS[command]
    values = {int: ["-1", "0", str(10**15)], float: ["-1", "0", "1e30", "nan", "inf", "-inf"]}
    for value in values[kind]:
        # -1 after a space would be taken for a flag.
        typed = [f"{flag}={value}"] if count == 1 else [flag, *[value] * count]
        try:
            call([*others, *typed])
        except UserError as error:
            assert flag in str(error) and "\n" not in str(error)
        else:
            assert value == "0", f"{flag} {value} was taken"


def test_the_parsers_have_the_numeric_flags_that_this_file_is_about():
    found = {(command, flag) for command, flag, _, _ in numeric_flags()}
    assert len(found) > 100 and {command for command, _ in found} == set(CALLS)
    assert {("vqkd", "--codes"), ("pretrain", "--mask-patches"), ("linprobe", "--rates"),
            ("ablate", "--seeds"), ("segment", "--jitter"), ("finetune", "--mixup"),
            ("factors", "--images")} <= found


def test_few_hidden_patches_need_no_smallest_block_and_a_micro_batch_is_only_a_ceiling():
    args = pretrain.parse_args(["--mask-patches", "1", "--batch-size", "4", "--micro-batch", "64"])
    assert args.mask_min_block == 1
    assert int(pretrain.sample_block_mask(6, 6, 1, 1).sum()) == 1
    assert data.split_batch(args.batch_size, args.micro_batch, 2) == (2, 1)


# --- contradictions -------------------------------------------------------------------------------
@pytest.mark.parametrize("call, flags, words", [
    (vqkd.parse_args, "--image-size 1000000", r"--image-size must lie in \[8, 1024\]"),
    # 224 x 224 patches of one pixel: attention over 50,176 of them
    (pretrain.parse_args, "--patch-size 1 --image-size 224", "--image-size must lie in"),
    (finetune.main, "--init scratch --patch-size 49", r"--patch-size must lie in \[1, 48\]"),
    (linprobe.parse_args, "--source random --image-size 50",
     "--image-size 50 is not a multiple of --patch-size 8"),
    (segment.parse_args, "--init scratch --image-size 50",
     "--image-size 50 is not a multiple of --patch-size 8"),
    (vqkd.parse_args, "--steps 10 --epochs 2", "--steps 10 and --epochs 2"),
    (linprobe.parse_args, "--steps 10 --epochs 2", "--steps 10 and --epochs 2"),
    (segment.parse_args, "--init scratch --steps 10 --epochs 2", "--steps 10 and --epochs 2"),
    (vqkd.parse_args, "--cache-teacher x --crop-scale 0.5",
     "--cache-teacher .* leave out --crop-scale"),
    (pretrain.parse_args, "--no-aggregation --separate-head", "--separate-head: --no-aggregation"),
    (pretrain.parse_args, "--no-aggregation --head-depth 1", "--head-depth: --no-aggregation"),
    (pretrain.parse_args, "--no-aggregation --early-layer 2", "--early-layer: --no-aggregation"),
    (pretrain.parse_args, "--head-depth 0 --separate-head", "--separate-head: .*--head-depth 0"),
    (pretrain.parse_args, "--mask-patches 5 --mask-min-block 6",
     r"--mask-min-block must lie in \[1, 5\]"),
    (pretrain.parse_args, "--early-layer 7", r"--early-layer must lie in \[1, 6\]"),
    (linprobe.parse_args, "--source tokenizer --checkpoint x.pt",
     "--source tokenizer does not read --checkpoint"),
    (segment.parse_args, "--init scratch --multi-scale", "--multi-scale belongs to --eval"),
    (finetune.parse_args, "--init scratch --intermediate", "leave out --init scratch"),
    (finetune.parse_args, "--init scratch --checkpoint x.pt", "leave out --checkpoint x.pt")])
def test_flags_that_contradict_each_other_are_one_sentence(call, flags, words):
    with pytest.raises(UserError, match=words) as caught:
        call(flags.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model, made_by", [
    ("small", "small"), ("base", "base"), ("large", "base")])
def test_a_missing_tokenizer_is_one_sentence_with_the_command_that_makes_it(
        tmp_path, model, made_by):
    args = pretrain.parse_args(["--model", model, "--tokenizer", str(tmp_path / "none.pt")])
    text = sentence(require_tokenizer, args)
    assert f"there is no tokenizer {tmp_path}/none.pt: make it with python vqkd.py " in text
    assert f"--model {made_by}, or give --tokenizer FILE" in text


def test_a_tokenizer_with_other_patches_than_the_backbone_is_one_sentence():
    args = pretrain.parse_args(["--image-size", "96", "--tokenizer", "t.pt"])
    require_grid((12, 12), args)
    text = sentence(require_grid, (6, 6), args)
    assert "the tokenizer t.pt has (6, 6) patches, the backbone (12, 12)" in text
    assert "python vqkd.py --image-size 96 --patch-size 8" in text


@pytest.mark.parametrize("main, flags", [
    (vqkd.main, []), (finetune.main, ["--init", "scratch"]), (segment.main, ["--init", "scratch"])])
def test_a_limit_below_one_batch_is_one_sentence(tmp_path, main, flags):
    few = ["--workers", "0", "--amp", "no", "--device", "cpu", "--batch-size", "8",
           "--micro-batch", "8", "--limit", "5", "--out", str(tmp_path)]
    text = sentence(main, [*few, *flags])
    assert "5 training images do not fill one batch of 8: lower --batch-size" in text


@pytest.mark.parametrize("flags", [
    ["--steps", "1.5"], ["--lr", "fast"], ["--on-bad-image", "ask"], ["--stepz", "1"]])
def test_a_flag_that_argparse_does_not_understand_is_one_sentence(flags):
    assert flags[0] in sentence(vqkd.parse_args, flags)      # launch exits with code 2
