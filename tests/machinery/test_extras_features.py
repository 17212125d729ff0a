"""python -m extras.features: tokens, features and classes of anyone's pictures, as files."""
import csv

import numpy as np
import pytest
import torch
from pictures import noise, save, sentence

import vqkd
from extras import features
from model import PRESETS, ViT, imagenet_normalize
from pretrain import BEiT
from support.files import write_file
from support.images import open_images
from support.transforms import EvalTransform

VIT = PRESETS["tiny"] | dict(depth=2)
BEIT = PRESETS["tiny"] | dict(depth=2, codes=16, early_layer=1, head_depth=1)


@pytest.fixture
def pictures(tmp_path):
    """A folder with five pictures, one of them in a folder below."""
    for name in ("a", "b", "c", "d", "e/f"):
        save(tmp_path / "pictures" / f"{name}.png", noise(seed=len(name)))
    return tmp_path / "pictures"


def checkpoint(path, kind, model):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    write_file(path, dict(kind=kind, model=model.state_dict(), arch=model.arch()))
    return model.eval()


def pixels(folder):
    images = open_images(folder, EvalTransform(48))
    return torch.stack([images[i][0] for i in range(len(images))]) / 255


def test_features_are_cls_and_the_patch_mean_after_the_final_norm(pictures, tmp_path):
    model = checkpoint(tmp_path / "pretrain.pt", "pretrain", BEiT(**BEIT))
    features.main([str(tmp_path / "pretrain.pt"), str(pictures), "--what", "features",
                   "--batch-size", "2"])
    with np.load(tmp_path / "features.npz") as found:
        assert found["cls"].shape == found["patches"].shape == (5, VIT["width"])
        cls, patches, names = (torch.from_numpy(found["cls"]), torch.from_numpy(found["patches"]),
                               found["names"])
    assert [name.split("/pictures/")[1] for name in names] == [
        "a.png", "b.png", "c.png", "d.png", "e/f.png"]
    with torch.no_grad():
        x = imagenet_normalize(pixels(pictures))
        tokens = model.norm(model.features(x, blocks=[-1])[0])
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 1:].mean(dim=1))


def test_features_of_a_classifier_and_of_a_tokenizers_encoder_are_read_as_well(pictures, tmp_path):
    checkpoint(tmp_path / "finetune.pt", "finetune", ViT(**VIT, num_classes=3))
    args = vqkd.parse_args(["--encoder-depth", "2", "--codes", "16"])
    tokenizer = checkpoint(tmp_path / "vqkd.pt", "vqkd", vqkd.build(args, (7,)))
    for stage in ("finetune", "vqkd"):
        features.main([str(tmp_path / f"{stage}.pt"), str(pictures), "--what", "features",
                       "--out", str(tmp_path / "new" / f"{stage}.npz")])
    with np.load(tmp_path / "new" / "finetune.npz") as found:
        assert found["cls"].shape == (5, VIT["width"])
    with np.load(tmp_path / "new" / "vqkd.npz") as found, torch.no_grad():
        tokens = tokenizer.encoder(2 * pixels(pictures) - 1)
        cls = torch.from_numpy(found["cls"])
        torch.testing.assert_close(cls, tokens[:, 0], rtol=1e-3, atol=1e-4)


def test_one_picture_is_enough_and_its_tokens_form_a_grid(pictures, tmp_path):
    args = vqkd.parse_args(["--encoder-depth", "1", "--codes", "16"])
    tokenizer = checkpoint(tmp_path / "vqkd.pt", "vqkd", vqkd.build(args, (7,)))
    features.main([str(tmp_path / "vqkd.pt"), str(pictures / "a.png")])
    with np.load(tmp_path / "tokens.npz") as found:
        assert found["ids"].shape == (1, 6, 6) and len(found["names"]) == 1
        z = tokenizer.encode(pixels(pictures / "a.png"))
        assert np.array_equal(found["ids"].reshape(1, -1), z.numpy())


def test_tokens_of_what_is_no_tokenizer_and_a_folder_that_is_a_file_are_sentences(
        pictures, tmp_path):
    checkpoint(tmp_path / "finetune.pt", "finetune", ViT(**VIT, num_classes=3))
    flags = [str(tmp_path / "finetune.pt"), str(pictures)]
    assert "is no VQ-KD tokenizer" in sentence(features.main, flags)
    flags += ["--what", "features", "--out", str(pictures / "a.png" / "x.npz")]
    assert "choose another --out" in sentence(features.main, flags)
    assert "there is no" in sentence(features.main, [str(tmp_path / "x.pt"), str(pictures)])
    assert "no/such" in sentence(features.main, [flags[0], "no/such", "--what", "features"])


def classifier(tmp_path, **more):
    """A classifier of seven classes.  -> its path, the model"""
    model = checkpoint(tmp_path / "finetune.pt", "finetune", ViT(**VIT, num_classes=7))
    contents = dict(kind="finetune", model=model.state_dict(), arch=model.arch())
    write_file(tmp_path / "finetune.pt", contents | more)
    return str(tmp_path / "finetune.pt"), model


def test_classes_are_the_five_likeliest_with_name_and_probability(pictures, tmp_path, capsys):
    names = [f"kind {i}" for i in range(7)]
    path, model = classifier(tmp_path, classes=names)
    features.main([path, str(pictures), "--what", "classes", "--batch-size", "2"])
    with torch.no_grad():
        p = model(imagenet_normalize(pixels(pictures))).softmax(dim=-1)
    best = p.sort(dim=-1, descending=True)
    with np.load(tmp_path / "classes.npz") as found:
        assert found["class"].shape == found["probability"].shape == (5, 5)
        assert found["class"].tolist() == [[names[i] for i in row] for row in best.indices[:, :5]]
        torch.testing.assert_close(torch.from_numpy(found["probability"]), best.values[:, :5])
    table = list(csv.DictReader(open(tmp_path / "classes.csv", encoding="utf-8", newline="")))
    assert [row["class_1"] for row in table] == [names[i] for i in best.indices[:, 0]]
    assert float(table[4]["probability_5"]) == pytest.approx(best.values[4, 4].item(), rel=1e-4)
    assert table[4]["name"].endswith("pictures/e/f.png")
    assert f"e/f.png: {names[best.indices[4, 0]]} (" in capsys.readouterr().out


def test_a_file_of_names_names_the_classes_of_a_released_classifier(pictures, tmp_path, capsys):
    path, _ = classifier(tmp_path)
    flags = [path, str(pictures / "a.png"), "--what", "classes", "--out"]
    features.main([*flags, str(tmp_path / "numbers.npz")])
    assert "note: the classes of this file have no names" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("".join(f"n{i}\n" for i in range(7)))
    features.main([*flags, str(tmp_path / "names.npz"), "--classes", str(tmp_path / "names.txt")])
    numbers, names = (np.load(tmp_path / f"{x}.npz")["class"] for x in ("numbers", "names"))
    assert names.tolist() == [[f"n{i}" for i in row] for row in numbers]
    assert not (tmp_path / "classes.csv").exists()
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert "2 classes" in sentence(
        features.main, [*flags, str(tmp_path / "x.csv"), "--classes", str(tmp_path / "names.txt")])


def test_a_table_holds_the_numbers_of_the_arrays(pictures, tmp_path):
    checkpoint(tmp_path / "pretrain.pt", "pretrain", BEiT(**BEIT))
    flags = [str(tmp_path / "pretrain.pt"), str(pictures), "--what", "features", "--out"]
    for ending in ("npz", "csv"):
        features.main([*flags, str(tmp_path / f"x.{ending}")])
    with np.load(tmp_path / "x.npz") as found:
        arrays = np.concatenate([found["cls"], found["patches"]], axis=1)
    lines = list(csv.reader(open(tmp_path / "x.csv", encoding="utf-8", newline="")))
    width = VIT["width"]
    assert lines[0][:2] == ["name", "cls_1"] and lines[0][-1] == f"patches_{width}"
    np.testing.assert_allclose(np.array(lines[1:])[:, 1:].astype(float), arrays, rtol=1e-4)


def test_classes_of_what_is_no_classifier_and_files_of_other_kinds_are_sentences(
        pictures, tmp_path):
    checkpoint(tmp_path / "pretrain.pt", "pretrain", BEiT(**BEIT))
    flags = [str(tmp_path / "pretrain.pt"), str(pictures)]
    assert "holds no classifier" in sentence(features.main, [*flags, "--what", "classes"])
    assert ".npz or .csv" in sentence(features.main, [*flags, "--out", str(tmp_path / "x.txt")])
    assert "--what classes" in sentence(features.main, [*flags, "--classes", "names.txt"])
