"""A training step never makes the host wait for a GPU, and --compile gets each network whole.

The steps run on fake tensors, which have a shape and the device "cuda" but no numbers. An operation
that needs a number on the host (.item(), bool(), nonzero, indexing with a mask) raises there.
"""
import collections
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode)

import finetune
import pretrain
import segment
import vqkd
from extras import steps
from extras.operations import sizes
from model import ViT, per_channel
from support.process import Process

ARGS = SimpleNamespace(batch_size=4, compile=False, checkpoint_activations=False)
CUDA = torch.device("cuda")
RAISED = DataDependentOutputException, DynamicOutputShapeException


@pytest.fixture
def copies(monkeypatch):
    """{what: times} of blocking copies from the host to the GPU, counted while the test runs."""
    found = collections.Counter()
    real_tensor = torch.tensor
    real_to = torch.Tensor.to

    def tensor(values, **options):
        if "cuda" in str(options.get("device")):
            found["torch.tensor of a list"] += 1
        return real_tensor(values, **options)

    def to(self, *where, **options):
        result = real_to(self, *where, **options)
        if self.device.type == "cpu" and result.device.type == "cuda":
            found["Tensor.to"] += not options.get("non_blocking", False)
        return result

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return found


class Numbers(list):
    """A list that passes for a tensor of rates."""

    def tolist(self):
        return self

    def __getitem__(self, part):
        return Numbers(super().__getitem__(part))


def fake_step(stage, monkeypatch):
    """step(run, clock) of a stage, built of fake tensors on a GPU that need not exist.

    What building needs in numbers is replaced: random weights, rates of stochastic depth, and the
    places of the hidden patches, which the loop finds on the host.
    """
    c = sizes("tiny")
    monkeypatch.setattr(torch, "linspace", lambda low, high, n, device: Numbers([low] * n))
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **cut: tensor)
    monkeypatch.setattr(pretrain, "hidden_patches",
                        lambda mask: torch.zeros(len(mask), c.M, dtype=torch.long))
    monkeypatch.setattr(steps, "random_clip", lambda c, device: lambda images: torch.zeros(
        len(images), c.N, c.C, device=device))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)     # wants a real device
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: self)   # it is there
    monkeypatch.setattr(steps, "optimizer_for", lambda groups, device: torch.optim.AdamW(
        groups, foreach=False))
    with CUDA:
        return steps.STEPS[stage](c, ARGS, CUDA)


@pytest.mark.parametrize("stage", ["vqkd", "pretrain", "finetune", "segment"])
def test_a_step_does_not_wait_for_the_gpu(stage, monkeypatch, copies):
    per_channel.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = fake_step(stage, monkeypatch)
        step(Process(device=CUDA), lambda part: None)        # the first one copies mean and std
        copies.clear()
        step(Process(device=CUDA), lambda part: None)        # raises if a number is needed
    per_channel.cache_clear()                                # they were fake
    assert not +copies


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x.any()),
    lambda x: x.long().bincount(minlength=4)])
def test_fake_tensors_notice_what_waits(wait):
    with FakeTensorMode(), CUDA:
        x = torch.ones(3)
        with pytest.raises(RAISED):
            wait(x)


def test_copies_that_wait_are_counted(copies):
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.zeros(2, device="cpu").to(CUDA)
        torch.zeros(2, device="cpu").to(CUDA, non_blocking=True)
        torch.tensor([1.0, 2.0], device=CUDA)
    assert +copies == {"Tensor.to": 1, "torch.tensor of a list": 1}


SIZES = dict(image_size=32, patch_size=8, width=32, depth=3, heads=2)
MASK = torch.zeros(2, 16, dtype=torch.bool)
MASK[:, 3:8] = True
HIDDEN = torch.arange(3, 8).repeat(2, 1)


def networks():
    """(name, function, inputs) of whatever --compile hands to torch.compile, and of the losses."""
    x = torch.rand(2, 3, 32, 32)
    beit = pretrain.BEiT(**SIZES, codes=64, early_layer=2, head_depth=2, drop_path=0.1).train()
    tokenizer = vqkd.VQKD(32, 8, 32, 3, 2, 1, 64, 8, (16,))
    classifier = ViT(**SIZES, num_classes=10, drop_path=0.1).train()
    h = vqkd.l2(torch.randn(2, 16, 8))
    o = torch.randn(2, 16, 12)
    logits = torch.randn(10, 64)
    z = torch.randint(64, (10,))
    return [
        ("BEiT", beit, (x, MASK, HIDDEN)),
        ("VQKD", tokenizer, (x, True)),
        ("VQKD without quantizer", tokenizer, (x, False)),
        ("encode", tokenizer.encode, (x,)),
        ("classifier", classifier, (x,)),
        ("UPerNet", segment.UPerNet(ViT(**SIZES | dict(depth=4)), 5).train(), (x,)),
        ("mim_loss", pretrain.mim_loss, (logits, logits, z)),
        ("vqkd_loss", vqkd.vqkd_loss, (o, o, h, h)),
        ("soft_cross_entropy", finetune.soft_cross_entropy, (logits, logits.softmax(-1))),
    ]


@pytest.mark.parametrize("name, function, inputs", networks(), ids=lambda x: x if isinstance(
    x, str) else "")
def test_compile_gets_it_in_one_graph(name, function, inputs):
    torch._dynamo.reset()
    found = torch._dynamo.explain(function)(*inputs)
    assert found.graph_count == 1
    assert found.graph_break_count == 0


def test_a_compiled_network_computes_the_same():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    beit = pretrain.BEiT(**SIZES, codes=64, early_layer=2, head_depth=2).train()
    z = torch.randint(64, (10,))

    def step(network):
        beit.zero_grad()
        loss, _ = pretrain.mim_loss(*network(x, MASK, HIDDEN), z)
        loss.backward()
        return [loss.detach(), *(p.grad for p in beit.parameters())]

    plain = step(beit)
    torch._dynamo.reset()
    compiled = step(torch.compile(beit, backend="aot_eager"))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
