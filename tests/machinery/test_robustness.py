"""Robustness: classes found by name, logits restricted to those of a data set, shifted shapes."""
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import log_lines, stage
from PIL import Image

from extras import robustness
from extras.robustness import restrict
from finetune import hits
from model import PRESETS, ViT, imagenet_normalize
from support import data, transforms
from support.files import UserError, read_file, write_file
from support.labels import columns_of, open_labelled, read_classes
from support.shapes import SHIFTS, TEXTURES, Shapes, draw_shapes, shift_shapes, unseen_textures

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]    # the order of the logits
RUN = ["--workers", "0", "--amp", "no", "--device", "cpu", "--micro-batch", "8"]


def fill(folder, classes, each=2):
    """Noise images in folder/CLASS/*."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            random = np.random.default_rng((number, i))
            pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def classifier(tmp_path):
    """A folder with a finetune.pt of random weights for seven classes; bare.pt names none."""
    torch.manual_seed(0)
    model = ViT(**PRESETS["tiny"], num_classes=len(NAMES))
    torch.nn.init.normal_(model.head.weight)
    model.head.bias.data[0] = 1000       # it says "ant" wherever that is among the answers
    for name, classes in (("finetune", NAMES), ("bare", None)):
        write_file(tmp_path / f"{name}.pt", dict(
            kind="finetune", model=model.state_dict(), classes=classes))
    return tmp_path


def run(folder, *flags, file="finetune.pt"):
    """-> the result of each data set, in the order given."""
    results = robustness.main([str(folder / file), *RUN, *map(str, flags)])
    return list(results.values())


# --- restricted logits ----------------------------------------------------------------------------
def test_restricting_the_logits_equals_picking_the_columns_by_hand():
    logits, columns = torch.randn(200, 40), torch.randperm(40)[:12]
    inside = torch.randint(12, (200,))                       # labels as numbers among the 12
    assert hits(restrict(logits, columns), columns[inside]) == hits(logits[:, columns], inside)


def test_restricted_accuracy_is_never_below_the_unrestricted_on_the_same_images():
    logits, columns = torch.randn(500, 40), torch.arange(8, 20)
    labels = columns[torch.randint(12, (500,))]
    free = torch.stack(hits(logits, labels))
    held = torch.stack(hits(restrict(logits, columns), labels))
    assert (held > free).all()           # a guess among 12 is right more often than among 40
    for few in (columns[:1], columns[:3]):       # also where fewer than five logits are left
        all_right = hits(restrict(logits, few), few[torch.zeros(500, dtype=torch.long)])[1]
        assert all_right == 500


def test_a_class_is_found_by_its_name_whatever_its_place_among_the_folders(classifier, tmp_path):
    fill(tmp_path / "some", ["gnu", "bee", "dog"], each=3)
    args = robustness.parse_args([str(classifier / "finetune.pt"), *RUN, "--data", "any"])
    folder = str(tmp_path / "some")
    few = open_labelled(folder, "val", transforms.EvalTransform(48), args, alone=True)
    assert few.classes == ["bee", "dog", "gnu"]
    assert columns_of(few, NAMES, "x").tolist() == [1, 3, 6]
    model = ViT(**PRESETS["tiny"], num_classes=7).eval()
    model.load_state_dict(read_file(classifier / "finetune.pt")["model"])
    images = torch.stack([few[i][0] for i in range(9)]) / 255
    logits = model(imagenet_normalize(images)).detach()
    truth = torch.tensor([1, 1, 1, 3, 3, 3, 6, 6, 6])
    result, = run(classifier, "--data", folder)
    assert result["top1"] == 0 < result["restricted_top1"]
    by_hand = torch.tensor([1, 3, 6])[logits[:, [1, 3, 6]].argmax(1)]
    share = (by_hand == truth).float().mean().item()
    assert result["restricted_top1"] == pytest.approx(100 * share)
    assert result["restricted_top5"] == 100 and result["images"] == 9


# --- folders and class lists ----------------------------------------------------------------------
def test_class_folders_below_val_and_directly_below_the_folder_count_the_same(classifier, tmp_path):
    fill(tmp_path / "flat", NAMES[2:5])
    fill(tmp_path / "split" / "val", NAMES[2:5])             # no train/ is needed to evaluate
    flat, split = run(classifier, "--data", tmp_path / "flat", tmp_path / "split")
    assert flat == split


def test_a_limit_takes_away_images_but_no_classes(classifier, tmp_path):
    fill(tmp_path / "some", NAMES[:4], each=5)
    run(classifier, "--data", tmp_path / "some", "--limit", 3)
    line = log_lines(classifier / "finetune_eval.jsonl")[1]
    assert line["images"] == 3 and line["classes"] == 4


def test_several_folders_in_one_call_give_one_table_and_a_line_each(classifier, tmp_path, capsys):
    one, two = (str(fill(tmp_path / name, NAMES[:n])) for name, n in (("one", 3), ("two", 7)))
    results = dict(zip((one, two), run(classifier, "--data", one, two), strict=True))
    lines = log_lines(classifier / "finetune_eval.jsonl")
    assert [line.get("data") for line in lines[1:3]] == [one, two] == list(results)
    assert lines[1]["restricted_top1"] >= lines[1]["top1"]
    assert lines[2]["restricted_top1"] == lines[2]["top1"]
    assert lines[3]["restricted_top1"] == {
        name: pytest.approx(results[name]["restricted_top1"], abs=1e-5) for name in (one, two)}
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed if line.startswith((one, two))]
    assert [row[:3] for row in rows] == [[one, "6", "3"], [two, "14", "7"]]
    assert {len(row) for row in rows} == {7}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_file_without_class_names_is_read_with_a_list_of_them(classifier, tmp_path, as_json):
    (tmp_path / "names").write_text(json.dumps(NAMES) if as_json else "\n".join(NAMES) + "\n")
    assert read_classes(tmp_path / "names") == NAMES
    fill(tmp_path / "some", ["gnu", "bee"])
    some = "--data", tmp_path / "some"
    with pytest.raises(UserError, match="knows 7 classes, .*some has 2: .*--classes FILE"):
        run(classifier, *some, file="bare.pt")
    named = run(classifier, *some, "--classes", tmp_path / "names", file="bare.pt")
    assert named == run(classifier, *some)


def test_a_second_measurement_is_added_to_the_first(classifier, tmp_path):
    for name in ("one", "two"):
        run(classifier, "--data", fill(tmp_path / name, NAMES[:2]))
    lines = log_lines(classifier / "finetune_eval.jsonl")
    measured = [line["args"]["data"] for line in lines if "args" in line]
    assert measured == [[str(tmp_path / "one")], [str(tmp_path / "two")]]
    assert len(lines) == 6               # header, data set, summary; twice
    assert lines[1]["data"] == str(tmp_path / "one")


def test_unknown_and_missing_classes_are_named(classifier, tmp_path):
    fill(tmp_path / "odd", ["bee", "yak", "zebra"])
    words = r"odd has 2 classes that .*finetune.pt does not know \(yak, zebra\)"
    with pytest.raises(UserError, match=words):
        run(classifier, "--data", tmp_path / "odd")
    with pytest.raises(UserError, match="does not know"):    # the second is wrong
        run(classifier, "--data", fill(tmp_path / "good", ["bee"]), tmp_path / "odd")
    assert not (classifier / "finetune_eval.jsonl").exists()             # nothing was measured
    with pytest.raises(UserError, match="has no class folders"):
        run(classifier, "--data", tmp_path / "odd" / "yak")
    (tmp_path / "good" / "stray.png").write_bytes((tmp_path / "odd" / "yak" / "0.png").read_bytes())
    with pytest.raises(UserError, match="images outside its class folders.*stray.png"):
        run(classifier, "--data", tmp_path / "good")
    with pytest.raises(UserError, match="there is no such folder"):
        run(classifier, "--data", tmp_path / "nowhere")


@pytest.mark.parametrize("text, sentence", [
    ("\n".join(NAMES[:6]), "names 6 classes, .*finetune.pt has 7 logits"),
    ("bee\ncat\nbee", "a name twice"), ("bee\n\ncat", "an empty line"), ("", "has no name"),
    ("[]", "has no name"), ('["bee", ', "cannot be read"),
    (None, "cannot be read")])
def test_a_bad_class_list_is_one_sentence(classifier, tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "names").write_text(text)
    with pytest.raises(UserError, match=sentence):
        run(classifier, "--data", "shapes", "--classes", tmp_path / "names")


def test_a_file_that_is_no_classifier_is_refused(tmp_path):
    write_file(tmp_path / "vit.pt", dict(model=ViT(**PRESETS["tiny"], pool=None).state_dict()))
    with pytest.raises(UserError, match="holds no classifier"):
        run(tmp_path, "--data", "shapes", file="vit.pt")
    with pytest.raises(UserError, match="there is no file .*none.pt; make it with python finetune"):
        run(tmp_path, "--data", "shapes", file="none.pt")


# --- shifted shapes -------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", SHIFTS)
def test_shifted_shapes_keep_class_mask_and_size_and_are_the_same_twice(shift):
    plain, one, two = (Shapes("val", limit=40, shift=s) for s in (None, shift, shift))
    assert torch.equal(one.images, two.images) and not torch.equal(one.images, plain.images)
    assert one.images.shape == plain.images.shape and one.images.dtype == torch.uint8
    assert torch.equal(one.labels, plain.labels)
    assert torch.equal(one.masks(slice(None)), plain.masks(slice(None)))
    alone = shift_shapes(shift, 0, "val", np.array([7]))[0][0]
    assert (alone == one.images[7].numpy()).all()    # an image depends on its index alone
    assert len({image.numpy().tobytes() for image in one.images}) == 40
    assert data.open_data(f"shapes:{shift}", "val", limit=40).name == f"shapes:{shift}"


def test_an_unknown_shift_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="no shift 'fog': there are shapes:noise, .*shapes:sketch"):
        data.open_data("shapes:fog", "val", limit=10)


def shifted(shift, n=40):
    dataset = Shapes("val", limit=n, shift=shift)
    return dataset.images / 255, dataset.masks(slice(None)).bool()[:, None].expand(-1, 3, -1, -1)


def test_each_shift_does_what_it_is_called_and_greyscale_has_equal_channels():
    plain, _ = shifted(None)

    def detail(x):                                           # how much neighbouring pixels differ
        return (x[..., 1:] - x[..., :-1]).abs().mean()

    assert 2 * detail(shifted("blur")[0]) < detail(plain) < detail(shifted("noise")[0]) / 2
    grey = shifted("grey")[0]
    assert torch.equal(grey[:, :1].expand_as(grey), grey) and (plain[:, 0] != plain[:, 1]).any()
    half_a_level = 0.5 / 255 + 1e-6
    torch.testing.assert_close(shifted("contrast")[0] - 0.5, 0.2 * (plain - 0.5),
                               atol=half_a_level, rtol=0)
    sketch = shifted("sketch")[0]
    assert 0.05 < (sketch < 0.5).float().mean() < 0.3        # a little ink
    assert (sketch.flatten(1).median(dim=1).values > 0.9).all()                  # on white paper
    noisy = shifted("noise")[0]
    # The noise has mean zero. Only clipping moves the mean.
    assert (noisy - plain).mean().abs() < 0.02


def texture_alone(texture, index):
    """Patterns (n, S, S) of training: no object, and the plain ground with its noise subtracted."""
    def grey(kind):
        out_of_sight = np.full(len(index), 500.0)
        images, masks = draw_shapes(0, "val", index, change=dict(
            texture=np.full(len(index), kind), x=out_of_sight, noise=0 * index))[:2]
        assert masks.sum() == 0
        return images.mean(axis=1)

    return torch.from_numpy(grey(texture) - grey(0)).float()


def windows(patterns, stride):
    """All windows of 32 x 32 at some stride, as vectors of length 1 without their mean."""
    found = patterns.unfold(1, 32, stride).unfold(2, 32, stride).reshape(-1, 32 * 32)
    return F.normalize(found - found.mean(dim=1, keepdim=True), dim=1)


def test_the_textures_of_the_shift_are_none_of_the_training_ones():
    textures = range(1, len(TEXTURES))   # gradient, stripes, checks, dots; plain has no pattern
    known = torch.cat([windows(texture_alone(k, np.arange(300)), stride=4) for k in textures])

    def likeness(patterns):
        """The best correlation with any place of any known pattern."""
        return (windows(patterns[:, 8:40, 8:40], stride=1) @ known.T).amax(dim=1)

    for k in textures:                   # other images of training are found again ...
        assert likeness(texture_alone(k, np.arange(1000, 1030))).median() > 0.78
    new = torch.from_numpy(unseen_textures(0, 1, np.arange(100))).float()
    assert likeness(new).max() < 0.7                         # ... those of the shift are not
    assert new.abs().max() <= 1 and (new.std(dim=(1, 2)) > 0.3).all()


def test_new_textures_lie_behind_the_object():
    (plain, inside), (new, _) = shifted(None), shifted("textures")
    # Not 0: pixels on the outline hold some background.
    assert (new - plain)[inside].abs().max() < 0.05
    assert (new - plain)[~inside].abs().max() > 0.1


@pytest.mark.slow
def test_the_table_of_shifts_is_one_command(tmp_path):
    stage("finetune.py", *RUN[:-2], "--init", "scratch", "--steps", 40, "--limit", 400,
          "--batch-size", 40, "--out", tmp_path)
    kinds = ["shapes"] + [f"shapes:{shift}" for shift in SHIFTS]
    command = "extras.robustness", tmp_path / "finetune.pt", *RUN, "--limit", 100, "--data", *kinds
    done = stage(*command)
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("shapes")]
    assert rows == kinds
    found = json.loads(done.stdout.splitlines()[-1])["restricted_top1"]
    assert list(found) == kinds and re.search("among these classes", done.stdout)
    two = stage(*command, processes=2)
    assert json.loads(two.stdout.splitlines()[-1])["restricted_top1"] == found
