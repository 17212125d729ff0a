"""Pictures: colours, patches and averages are what they claim to be; the page; curves."""
import json
import re
from argparse import Namespace
from html.parser import HTMLParser

import pytest
import torch
from conftest import stage

import pretrain
import vqkd
from extras import codes, curves, panels, visualize
from extras.codes import Tokens
from model import imagenet_normalize
from support import weights
from support.files import UserError, write_file
from support.run import contents


# --- a run folder in no time: random networks, saved as the stages save them ----------------------
def tiny_tokenizer():
    torch.manual_seed(1)
    model = vqkd.VQKD(24, 6, 32, 1, 2, 1, 12, 4, (5,))
    model.quantize.embedding.weight.copy_(vqkd.l2(torch.randn(12, 4)))
    return model.eval()


def tiny_beit(head_depth=1, shared_head=True):
    torch.manual_seed(2)
    return pretrain.BEiT(24, 6, 32, 3, 2, codes=12, early_layer=2, head_depth=head_depth,
                         shared_head=shared_head).eval()


def save_tokenizer(run):
    args = Namespace(model="tiny", data="shapes", image_size=24, patch_size=6, teacher="hog",
                     seed=5)
    write_file(run / "vqkd.pt", contents("vqkd", tiny_tokenizer(), args))
    write(run / "vqkd.jsonl", dict(args={}), dict(step=0, cosine=0.1, perplexity=3.0),
          dict(step=1, cosine=0.2))
    return run


def save_beit(run, **heads):
    args = Namespace(model="tiny", data="shapes", image_size=24, patch_size=6, seed=5, epochs=1,
                     early_layer=2, head_depth=heads.get("head_depth", 1), mask_patches=6,
                     mask_min_block=1)
    file = contents("pretrain", tiny_beit(**heads), args) | dict(aggregation=True)
    write_file(run / "pretrain.pt", file)
    return run


def write(path, *lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def draw(*flags):
    visualize.main([*map(str, flags), "--limit", "40", "--decoder-steps", "3", "--device", "cpu"])


class Page(HTMLParser):
    """Which pictures a page shows, and whether every tag that was opened is closed in turn."""

    def __init__(self, path):
        super().__init__()
        self.pictures, self.open, self.text = {}, [], path.read_text()
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures[dict(attributes)["src"]] = dict(attributes)["alt"]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# --- what a code looks like -----------------------------------------------------------------------
def test_a_code_has_one_colour_whatever_images_are_shown_and_however_long_its_vector_is():
    codebook = tiny_tokenizer().quantize.embedding.weight
    colours = codes.code_colours(codebook)
    assert colours.shape == (12, 3) and colours.min() >= 0 and colours.max() <= 1
    assert len({tuple(colour) for colour in colours}) == 12          # and no two codes share theirs
    assert (colours == codes.code_colours(3 * codebook)).all()   # only directions count


def test_near_codes_have_near_colours():
    v = torch.randn(40, 3)
    v = torch.cat([v, v + 0.01 * torch.randn(40, 3)])                # every code with a twin
    colours = torch.from_numpy(codes.code_colours(v))
    far = torch.cdist(colours, colours).mean()
    assert (colours[:40] - colours[40:]).norm(dim=1).mean() < far / 5


@pytest.mark.parametrize("K, D", [(2, 1), (1, 4), (5, 2)])
def test_small_codebooks_have_colours_too(K, D):
    colours = codes.code_colours(torch.randn(K, D))
    assert colours.shape == (K, 3) and (colours >= 0).all() and (colours <= 1).all()


def test_the_patches_of_a_code_have_that_code_and_come_from_different_images():
    z = torch.randint(0, 5, (30, 4, 4))
    for code in range(5):
        chosen = codes.patches_of_code(z, code, 8)
        assert len(chosen) == 8 and all(z[place] == code for place in chosen)
        assert len({image for image, _, _ in chosen}) == 8
    assert codes.patches_of_code(z, 3, 8, seed=1) == codes.patches_of_code(z, 3, 8, seed=1)
    assert codes.patches_of_code(z, 7, 8) == []


def test_the_average_patch_of_a_code_equals_a_plain_loop():
    images = torch.randint(0, 256, (70, 3, 12, 8), dtype=torch.uint8)
    z = torch.randint(0, 4, (70, 3, 2))
    patches = codes.mean_patches(Tokens(images, z), codes=5)
    for code in range(4):
        members = [images[i, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4] / 255
                   for i in range(70) for y in range(3) for x in range(2) if z[i, y, x] == code]
        torch.testing.assert_close(patches[code], torch.stack(members).mean(dim=0))
    assert (patches[4] == 0.5).all()                                 # nobody has code 4


def test_a_stroke_and_its_negative_average_to_grey_unless_they_are_turned_to_agree():
    stroke = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    stroke[:, 1] = 200
    images = torch.stack([stroke] * 3 + [255 - stroke] * 4)
    tokens = Tokens(images, torch.zeros(7, 1, 1, dtype=torch.long))
    plain = codes.mean_patches(tokens, 1)[0]
    turned = codes.mean_patches(tokens, 1, turn=2)[0]
    assert plain.std() < 0.03 and abs(turned.std() - (stroke / 255).std()) < 1e-4
    torch.testing.assert_close(plain.mean(), turned.mean())          # brightness is what it was


def test_a_mosaic_of_each_patchs_own_average_is_the_image_itself():
    image = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8)
    z = torch.arange(9).view(1, 3, 3)                                # every patch a code of its own
    patches = codes.mean_patches(Tokens(image, z), 9)
    torch.testing.assert_close(codes.mosaic(image[0] / 255, z[0], patches), image[0] / 255)
    where = torch.zeros(3, 3, dtype=torch.bool)
    where[1, 2] = True
    mixed = codes.mosaic(image[0] / 255, z[0], torch.zeros_like(patches), where)
    assert (mixed[:, 4:8, 8:] == 0).all() and torch.equal(mixed[:, :4], image[0, :, :4] / 255)


def test_most_used_codes_come_first_and_dead_ones_not_at_all():
    counts = torch.tensor([5, 0, 9, 1, 7, 2])
    assert codes.most_used(counts, 3) == [2, 4, 0]
    assert codes.most_used(counts, 9) == [2, 4, 0, 5, 3]
    assert codes.most_used(counts, 2, among=0.5) == [2, 4]
    assert codes.most_used(torch.arange(100, 0, -1), 3, among=0.5) == [0, 24, 49]
    assert len(codes.most_used(torch.zeros(4), 3)) == 1


# --- networks -------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [
    dict(head_depth=0), dict(head_depth=1), dict(head_depth=2, shared_head=False)])
def test_the_backbone_with_its_heads_comes_back_from_its_file(tmp_path, heads):
    model = tiny_beit(**heads)
    images = torch.rand(2, 3, 24, 24)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3:7] = True
    loaded, _ = visualize.load_beit(save_beit(tmp_path, **heads) / "pretrain.pt")
    for ours, theirs in zip(model(images, mask), loaded(images, mask), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(UserError, match="no head over the codes"):
        visualize.load_beit(save_tokenizer(tmp_path) / "vqkd.pt")


@pytest.mark.parametrize("size, block", [(24, -1), (36, -1), (48, 0)])
def test_cls_attention_has_a_map_per_head_at_any_resolution(tmp_path, size, block):
    path = save_beit(tmp_path) / "pretrain.pt"
    model, _, _ = weights.load_backbone(path, pool=None, image_size=size)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    maps = panels.cls_attention(model.eval(), images, block)
    assert maps.shape == (2, 2, size // 6, size // 6) and (maps >= 0).all()
    # The rest goes to [CLS] itself.
    itself = panels.attention_maps(model, imagenet_normalize(images / 255), block)[:, :, 0, 0]
    torch.testing.assert_close(maps.sum(dim=(2, 3)) + itself, torch.ones(2, 2))


def test_the_decoder_to_pixels_learns_and_is_the_same_twice():
    z = torch.randint(0, 4, (64, 3, 3))
    shades = torch.tensor([0, 80, 160, 240], dtype=torch.uint8)      # a code is a shade of grey
    grey = shades[z].repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = grey[:, None].expand(-1, 3, -1, -1)
    a, b = (codes.train_pixel_decoder(Tokens(images, z), torch.eye(4), 30) for _ in range(2))
    assert (a(z) - images / 255).abs().mean() < 0.08     # grey everywhere would be wrong by 0.25
    assert torch.equal(a(z), b(z)) and not any(p.requires_grad for p in a.parameters())


def test_an_image_and_its_negative_are_one_image_once_the_middle_is_the_lighter_part():
    image = torch.rand(4, 3, 16, 16) * 0.2 + 0.4
    negative = 2 * image.mean(dim=(2, 3), keepdim=True) - image
    a, dark = codes.lighten_middle(image)
    b, light = codes.lighten_middle(negative)
    torch.testing.assert_close(a, b)
    assert torch.equal(dark, ~light)


# --- the page -------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_page_names_every_picture_and_no_other(tmp_path):
    draw(save_beit(save_tokenizer(tmp_path)), "--attention-size", 36)
    folder = tmp_path / "figures"
    page = Page(folder / "index.html")
    assert set(page.pictures) == {f"{name}.png" for name in visualize.PICTURES}
    assert set(page.pictures) == {f.name for f in folder.glob("*.png")}
    assert all(page.pictures.values())                       # each says in words what it shows
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in page.pictures)
    assert not re.search(r'(src|href)="(/|\w+:)', page.text)         # relative: the folder can move


def test_a_tokenizer_alone_gives_a_page_that_says_what_is_missing(tmp_path, capsys):
    draw(save_tokenizer(tmp_path))
    page = Page(tmp_path / "figures" / "index.html")
    drawn = "codes tokens where usage pixels curves".split()
    assert set(page.pictures) == {f"{name}.png" for name in drawn}
    assert "pretrain.pt" in page.text and "pretrain.py makes it" in page.text
    assert "no prediction.png" in capsys.readouterr().out


def test_single_pictures_are_drawn_without_a_page_and_the_same_twice(tmp_path):
    run = save_tokenizer(tmp_path)
    draw(run, "--only", "codes", "where", "--codes", 3, 7, "--out", tmp_path / "a")
    draw(run, "--only", "codes", "where", "--codes", 3, 7, "--out", tmp_path / "b")
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["codes.png", "where.png"]
    for name in ("codes.png", "where.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_pictures_can_be_made_of_ones_own_images(tmp_path):
    from PIL import Image
    run = save_beit(save_tokenizer(tmp_path))
    Image.new("RGB", (90, 60), "orange").save(tmp_path / "mine.png")
    draw(run, "--images", tmp_path / "mine.png", "--only", "tokens", "prediction", "attention",
         "pixels")
    assert len(list((tmp_path / "figures").glob("*.png"))) == 4


def test_a_released_tokenizer_without_arguments_or_arch_is_drawn(tmp_path):
    torch.manual_seed(1)
    model = vqkd.VQKD(32, 16, 64, 1, 1, 1, 12, 4, (5,))      # 64 a head, as released ones
    model.quantize.embedding.weight.copy_(torch.randn(12, 4))
    torch.save(dict(model=model.state_dict()), tmp_path / "released.pth")
    draw(tmp_path, "--tokenizer", tmp_path / "released.pth", "--only", "codes", "tokens", "usage")
    assert len(list((tmp_path / "figures").glob("*.png"))) == 3


@pytest.mark.parametrize("flags, sentence", [
    (["no/such/run"], "there is no run"),
    (["RUN", "--only", "attention"], "there is no backbone"),
    (["RUN", "--tokenizer", "nowhere.pt"], "there is no file nowhere.pt"),
    (["RUN", "--codes", "3", "99"], "must lie in"),
    (["RUN", "--images", "nowhere.jpg"], "no such file"),
    (["RUN", "--only", "pixels", "--decoder-steps", "0"], "asked for"),
    (["RUN", "--data", "nowhere"], "there is no such folder"),
    (["RUN", "RUN/figures"], "one run at a time"),
])
def test_what_cannot_be_drawn_is_refused_in_a_sentence(tmp_path, flags, sentence):
    run = save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=sentence):
        visualize.main([flag.replace("RUN", str(run)) for flag in flags])


def test_a_block_that_is_not_there_and_a_backbone_of_another_tokenizer_are_refused(tmp_path):
    run = save_beit(save_tokenizer(tmp_path))
    with pytest.raises(UserError, match="has 3 blocks"):
        draw(run, "--only", "attention", "--block", 4)
    other = vqkd.VQKD(24, 6, 32, 1, 2, 1, 9, 4, (5,))
    args = Namespace(model="tiny", data="shapes", image_size=24, teacher="pixel", seed=0)
    write_file(run / "other.pt", contents("vqkd", other, args))
    with pytest.raises(UserError, match="do not belong together"):
        draw(run, "--tokenizer", run / "other.pt", "--only", "prediction")


@pytest.mark.slow
def test_a_missing_run_is_one_sentence_and_exit_code_2(tmp_path):
    done = stage("extras.visualize", tmp_path / "nothing", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no run")
    assert "Traceback" not in done.stderr


# --- curves ---------------------------------------------------------------------------------------
def test_curves_become_a_png_with_a_panel_per_quantity(tmp_path):
    a = write(tmp_path / "a.jsonl", dict(args={}, chance=4.16),
              dict(step=0, loss_mim=4.2, mask_acc=1.0), dict(step=1, loss_mim=4.0, mask_acc=2.0),
              dict(step=1, split="val", loss_mim=4.1, guess_nearest=1.5), dict(summary=1, step=1))
    b = write(tmp_path / "b.jsonl", dict(args={}), dict(step=0, cosine=0.1, perplexity=3.0))
    visualize.main([str(a), str(b), "--out", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_training_and_held_out_lines_are_kept_apart(tmp_path):
    path = write(tmp_path / "a.jsonl", dict(args={}), dict(step=0, loss_mim=4.2),
                 dict(step=0, split="val", loss_mim=4.1), dict(summary=1, step=0))
    _, train, val = curves.read_log(path)
    assert [x["loss_mim"] for x in train] == [4.2] and [x["loss_mim"] for x in val] == [4.1]


def test_what_is_no_log_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("missing.jsonl", "empty.jsonl"):
        with pytest.raises(UserError, match="not a JSON log"):
            curves.read_log(tmp_path / name)
    with pytest.raises(UserError, match="curve"):
        curves.draw_curves([write(tmp_path / "a.jsonl", dict(args={}))], tmp_path / "c.png")
