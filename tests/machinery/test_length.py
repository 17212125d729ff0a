"""Runs of any length on any number of images: what shrinks, what stays, what is refused."""
import json

import pytest

import finetune
import pretrain
import segment
import vqkd
from conftest import stage
from support import data
from support.files import UserError, read_file
from support.run import Run
from test_run import Small

STAGES = dict(vqkd=vqkd, pretrain=pretrain, finetune=finetune, segment=segment)
PRESETS = [(name, preset) for name, module in STAGES.items() for preset in module.MODELS]


def arguments(name, *flags):
    scratch = ["--init", "scratch"] if name in ("finetune", "segment") else []
    args = STAGES[name].parse_args([*map(str, flags), *scratch])
    if name == "finetune":
        finetune.complete(args)
    args.micro_batch = args.micro_batch or args.batch_size
    return args


def lengths(args, images):
    """-> (steps, warm-up steps) and the flags that count steps, after the batch is fitted."""
    args.batch_size = data.fitting_batch(args, images, 1)
    steps, warmup, _ = data.resolve_steps(args, images)
    counts = {name: data.shortened(args, name, steps) for name in data.COUNT_STEPS
              if hasattr(args, name)}
    return steps, warmup, counts


# --- how long -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, images, expected", [
    ("vqkd", 12_000, (750, 188, dict(continuous_steps=250, restart_dead_codes=20))),
    ("pretrain", 12_000, (1125, 375, {})), ("finetune", 12_000, (200, 20, {})),
    ("segment", 200, (600, 60, {}))])
def test_at_the_recipes_length_everything_is_as_in_the_recipe(name, images, expected):
    args = arguments(name)
    assert lengths(args, images) == expected
    assert not list(data.what_shrank(args, images, args.batch_size))


@pytest.mark.parametrize("name, preset", PRESETS)
def test_a_run_of_any_length_on_any_number_of_images_has_a_step_after_every_warm_up(name, preset):
    for flags in ([], ["--epochs", 1], ["--steps", 1], ["--steps", 2], ["--steps", 37]):
        for images in (1, 2, 3, 9, 31, 100, 5000):
            steps, warmup, counts = lengths(arguments(name, "--model", preset, *flags), images)
            assert 0 <= warmup < steps
            assert 0 <= counts.get("continuous_steps", 0) < steps
            assert "--steps" not in flags or steps == flags[1]


def test_a_short_run_has_the_recipes_share_of_every_warm_up_and_one_line_says_so():
    args = arguments("vqkd", "--steps", 75)
    counts = dict(continuous_steps=25, restart_dead_codes=2)
    assert lengths(args, 12_000) == (75, 19, counts)         # a tenth of everything
    assert list(data.what_shrank(args, 12_000, 32)) == [
        "75 steps are fewer than the recipe's 750: warm-up 19 steps, --continuous-steps 25, "
        "--restart-dead-codes 2"]
    args = arguments("pretrain", "--model", "base", "--epochs", 30)      # of 300, 10 to warm up
    assert lengths(args, 20_480) == (300, 10, {})
    args = arguments("pretrain", "--model", "base", "--epochs", 800)     # longer: as in the recipe
    assert lengths(args, 20_480) == (8000, 100, {})


def test_what_was_typed_is_kept_or_refused_even_if_the_recipe_has_the_same_number():
    args = arguments("vqkd", "--steps", 300, "--continuous-steps", 250, "--restart-dead-codes", 20,
                     "--warmup-epochs", 0.5)
    counts = dict(continuous_steps=250, restart_dead_codes=20)
    assert lengths(args, 12_000) == (300, 188, counts)
    args = arguments("vqkd", "--steps", 20, "--continuous-steps", 250)
    with pytest.raises(UserError, match="--continuous-steps 250 leaves none of 20 steps"):
        vqkd.first_quantized_step(args, 20)


@pytest.mark.parametrize("name, flags, says", [
    ("pretrain", ["--warmup-epochs", 1, "--steps", 20], "--warmup-epochs .* 375 steps .* of 20"),
    ("finetune", ["--warmup-epochs", 2, "--epochs", 1], "--warmup-epochs .* 186 steps .* of 93"),
    ("segment", ["--warmup-steps", 50, "--steps", 50], "--warmup-steps .* 50 steps .* of 50")])
def test_a_typed_warm_up_that_fills_the_run_is_refused(name, flags, says):
    with pytest.raises(UserError, match=f"{says}: lower it, or leave it out"):
        lengths(arguments(name, *flags), 12_000)


# --- how many images ------------------------------------------------------------------------------
@pytest.mark.parametrize("images, processes, micro, expected", [
    (512, 1, 128, 512), (511, 1, 128, 504), (300, 2, 128, 296), (9, 1, 128, 8), (9, 2, 128, 8),
    (3, 2, 128, 2), (1, 1, 128, 1)])
def test_fewer_images_than_the_recipes_batch_are_a_smaller_batch(
        images, processes, micro, expected):
    args = arguments("vqkd", "--model", "base", "--micro-batch", micro)
    assert data.fitting_batch(args, images, processes) == expected
    part, _ = data.split_batch(expected, micro, processes)
    assert part % 2 == 0 or expected == processes


def test_a_typed_batch_that_is_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="9 training images .* batch of 10: lower --batch-size"):
        data.fitting_batch(arguments("vqkd", "--batch-size", 10), 9, 1)
    with pytest.raises(UserError, match="1 training images .* batch of"):
        data.fitting_batch(arguments("vqkd"), 1, 2)


def test_a_run_on_few_images_says_so_and_goes_on_by_the_same_command(tmp_path, capsys):
    flags = ["--out", tmp_path, "--limit", 10, "--workers", 0, "--device", "cpu", "--amp", "no"]

    def begin():
        run = Run("vqkd", arguments("vqkd", *flags))
        model = Small()
        optimizer = vqkd.adamw(vqkd.param_groups(model.named_parameters(), 0.0), (0.9, 0.99),
                               run.device)
        run.start(data.open_data("shapes", "train", limit=10), model=model, optimizer=optimizer)
        return run
    run = begin()
    assert "10 training images are fewer than the recipe's batch of 32: batches of 10" in (
        capsys.readouterr().out)
    assert len(next(run.batches)[0]) == 10
    run.save()
    assert begin().step == 1                 # not refused for another --batch-size
    assert read_file(tmp_path / "vqkd.resume.pt")["args"]["batch_size"] == 32
    first = json.loads((tmp_path / "vqkd.jsonl").read_text().splitlines()[0])
    assert first["args"]["batch_size"] == 10
    assert "typed" not in first["args"]


# --- whole commands -------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_one_step_of_every_stage_makes_a_file_that_the_next_stage_takes(preset, tmp_path):
    flags = f"--model {preset} --steps 1 --workers 0 --device cpu --amp no --limit 12".split()
    small = [] if preset == "tiny" else "--data shapes --image-size 32".split()
    teacher = [] if preset == "tiny" else ["--teacher", "hog"]
    flags += ["--out", tmp_path]
    stage("vqkd.py", *flags, *small, *teacher)
    stage("pretrain.py", *flags, *small)
    stage("finetune.py", *flags, *small)
    stage("linprobe.py", *flags, *small)
    done = stage("segment.py", *flags, *small)
    assert '"summary": 1' in done.stdout
    assert {f.name for f in tmp_path.glob("*.pt")} == {
        f"{name}.pt" for name in ("vqkd", "pretrain", "finetune", "linprobe", "segment")}
