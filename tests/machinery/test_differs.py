"""What comments claim: whom a "Differs from" names, the reading orders, figures one can measure."""
import ast
import importlib
import inspect
import re

import pytest
import torch

from conftest import ROOT
from model import imagenet_normalize
from pretrain import BEiT
from vqkd import l2, nearest_code

STAGES = ["model", "vqkd", "pretrain", "finetune", "linprobe", "segment"]
# Whom our code can differ from. "The recipe" is what the released code does to train the paper's
# models; "the released code" says that it is code, and no choice of the method.
SOURCES = ("Eq. (1)", "Eq. (2)", "Eq. (3)", "the paper", "the recipe", "the released code",
           "the authors' loader", "the plain order", "BEiT v1's probe", "MAE's probe")
FILES = [path for path in sorted(ROOT.rglob("*.py")) if "tests" not in path.parts]


def departures(text):
    """The words that follow each "Differs from", over the ends of lines of a comment."""
    words = " ".join(line.strip().lstrip("# ") for line in text.splitlines())
    return re.findall(r"Differs from (.{40})", words)


def test_a_departure_names_whom_it_departs_from():
    found = [(path.name, said) for path in FILES for said in departures(path.read_text())]
    assert len(found) > 30
    assert not [one for one in found if not one[1].startswith(SOURCES)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_name_of_a_reading_order_is_in_the_file(stage):
    module = importlib.import_module(stage)
    docstring = ast.get_docstring(ast.parse((ROOT / f"{stage}.py").read_text()))
    order = re.search(r"Read in this order: ([^.]*)\.", docstring)[1]
    names = re.split(r",\s+", order)
    assert len(names) > 3
    assert not [name for name in names if not hasattr(module, name)]
    things = [getattr(module, name) for name in names]
    lines = [inspect.getsourcelines(thing)[1] for thing in things]
    assert lines == sorted(lines)            # from the first line to the last


@pytest.mark.parametrize("dtype, least, most", [(torch.float16, 1 / 600, 1 / 270),
                                                (torch.bfloat16, 1 / 50, 1 / 25)])
def test_a_look_up_in_16_bits_gives_as_many_other_ids_as_nearest_code_says(dtype, least, most):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(20_000, 32, generator=generator)
    codebook = torch.randn(8192, 32, generator=generator)
    v = l2(codebook).to(dtype).float().T
    z = torch.cat([(part.to(dtype).float() @ v).to(dtype).float().argmax(-1)
                   for part in l2(h).split(4096)])
    assert least < (z != nearest_code(h, codebook)).float().mean() < most


def test_mixing_before_the_normalisation_gives_the_pixels_of_mixing_after_it():
    a, b = torch.rand(2, 1, 3, 8, 8)
    torch.testing.assert_close(imagenet_normalize(0.3 * a + 0.7 * b),
                               0.3 * imagenet_normalize(a) + 0.7 * imagenet_normalize(b))


def test_the_shallow_head_starts_with_smaller_weights_than_torchs_and_without_biases():
    model = BEiT(32, 16, 768, 1, 12, codes=8, early_layer=1, head_depth=1)
    ours = model.cls_pt_layers[0].mlp.fc1
    torchs = torch.nn.Linear(768, 3072)
    assert ours.weight.std() < 0.6 * torchs.weight.std()
    assert torch.equal(ours.bias, torch.zeros(3072))
