"""results.mistakes: each mistake is the one that its name says; the page is made of the records."""
import types

import pytest
import torch
import torch.nn.functional as F

import pretrain
import vqkd
from conftest import log_lines
from results import mistakes
from results.ablate import exchanged
from support.files import UserError


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def tiny_tokenizer():
    args = vqkd.parse_args(["--encoder-depth", "1"])
    model = vqkd.build(args, (144,))
    model.quantize.embedding.weight.copy_(unit(64, 16))
    return model


def small_backbone():
    return pretrain.BEiT(48, 8, 32, 2, 2, codes=5, early_layer=1, head_depth=1, position_std=1.0)


def test_without_l2_a_long_code_is_chosen_before_a_near_one():
    codebook = torch.tensor([[1.0, 0.1], [9.0, 9.0]])
    h = torch.tensor([[1.0, 0.0]])
    assert vqkd.nearest_code(h, codebook).item() == 0
    with exchanged(mistakes.no_l2()):
        assert vqkd.nearest_code(h, codebook).item() == 1


def test_codes_that_move_first_are_looked_up_where_they_have_moved_to():
    with exchanged(mistakes.update_first()):
        wrong = tiny_tokenizer().quantize
    before = wrong.embedding.weight.clone()
    right = vqkd.Codebook(64, 16)
    right.embedding.weight.copy_(before)
    h = unit(2, 9, 16)
    assert torch.equal(right(h)[0], vqkd.l2(before)[right(h)[1]])
    v, z = wrong(h)
    sums, counts = vqkd.code_sums(h, right(h)[1], 64)
    moved = vqkd.ema_update(before, sums, counts, 0.97)
    assert torch.equal(wrong.embedding.weight, moved)
    assert torch.equal(v, vqkd.l2(moved)[z])
    wrong.update(sums, counts, 0.97)         # the call of the loop
    assert torch.equal(wrong.embedding.weight, moved)
    wrong.eval()(h)                          # measuring moves nothing
    assert torch.equal(wrong.embedding.weight, moved)


def test_the_stop_gradient_on_the_wrong_side_leaves_the_vectors_without_commitment():
    o, t, v = torch.randn(2, 3, 8), torch.randn(2, 3, 8), unit(2, 3, 4)
    h = unit(2, 3, 4).requires_grad_()
    loss, _ = vqkd.vqkd_loss(o, t, h, v)
    assert loss.requires_grad
    with exchanged(mistakes.stop_gradient_on_the_wrong_side()):
        wrong, _ = vqkd.vqkd_loss(o, t, h, v)
    assert wrong.item() == pytest.approx(loss.item()) and not wrong.requires_grad


def test_without_straight_through_the_decoder_teaches_the_encoder_nothing():
    model, images = tiny_tokenizer(), torch.rand(2, 3, 48, 48)
    weight = model.encode_task_layer[2].weight
    with exchanged(mistakes.no_straight_through()):
        model(images)[0].sum().backward()
    assert weight.grad is None
    model(images)[0].sum().backward()
    assert weight.grad.abs().sum() > 0


def test_a_shifted_mask_reads_the_token_before_each_hidden_patch():
    right, x = small_backbone(), torch.randn(1, 3, 48, 48)
    with exchanged(mistakes.mask_shifted()):
        wrong = pretrain.BEiT(48, 8, 32, 2, 2, codes=5, early_layer=1, head_depth=1)
    wrong.load_state_dict(right.state_dict())
    mask = torch.zeros(1, 36, dtype=torch.bool)
    mask[0, [7, 20]] = True
    before = torch.tensor([[6, 19]])         # patches counted from 0
    for ours, theirs in zip(wrong(x, mask), right(x, mask, before), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_targets_from_the_masked_image_hide_the_same_patches_from_the_tokenizer():
    from support.transforms import MIMEvalTransform, MIMTransform
    image = torch.randint(1, 256, (3, 48, 48), dtype=torch.uint8)
    with exchanged(mistakes.targets_from_the_masked_image()):
        crops = MIMTransform(48, 48, (1.0, 1.0), 0.0)
        (view, target), mask = pretrain.masked_views(image, crops, (6, 6), 13, 1)
        still, _ = pretrain.masked_views(image, MIMEvalTransform(48, 48), (6, 6), 13, 1)
    assert (view > 0).all() and isinstance(still, torch.Tensor)
    black = (target == 0).all(dim=0).unflatten(0, (6, 8)).unflatten(2, (6, 8)).all(dim=3).all(dim=1)
    assert torch.equal(black, mask.view(6, 6))
    seen = target > 0
    assert torch.equal(target[seen], view[seen])


def test_the_two_teachers_differ_in_what_their_network_gets(monkeypatch):
    given = []

    class Network(torch.nn.Module):
        width = 4
        grid = 6, 6

        def forward(self, x):
            given.append(x)
            return torch.zeros(len(x), 37, 4)

    stand_ins = types.SimpleNamespace(read=lambda path: path,
                                      load_backbone=lambda *_, **__: (Network(), None, None))
    monkeypatch.setattr(mistakes, "weights", stand_ins)
    images = torch.rand(2, 3, 48, 48)
    for name in (mistakes.SEEING, "teacher with the wrong normalisation"):
        run, = [run for run in mistakes.ALL if run.name == name]
        with exchanged(run.change()):
            teacher = vqkd.teachers.build_teacher("hog", (6, 6), 8, "cpu")
            assert teacher(images).shape == (2, 36, 4)
            assert len(teacher.names) == len(teacher.dims) and sum(teacher.dims) == 4
    assert torch.equal(given[0], mistakes.imagenet_normalize(images))
    assert torch.equal(given[1], images)


def test_every_mistake_lies_over_healthy_runs_of_its_stage_and_says_what_one_sees():
    stages = {run.name: run.stage for run in mistakes.ALL}
    assert len(mistakes.mistakes()) == 8 and len(stages) == len(mistakes.ALL)
    for run in mistakes.mistakes():
        assert {stages[name] for name in run.healthy} == {run.stage}
        assert run.show in mistakes.CURVES[run.stage] and run.show in mistakes.TITLES


def test_an_unknown_run_is_named():
    with pytest.raises(mistakes.UserError, match="there is no run no l3"):
        mistakes.main(["--runs", "no l3"])


@pytest.mark.slow
def test_all_runs_leave_records_a_picture_and_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(mistakes, "RUNS", tmp_path)
    short = "--batch-size 4 --micro-batch 4 --limit 64 --steps 6"
    monkeypatch.setattr(mistakes, "FLAGS", {
        "vqkd": f"{short} --continuous-steps 2", "pretrain": short,
        "linprobe": "--limit 100 --blocks 1 --epochs 1"})
    monkeypatch.setattr(mistakes, "COMMON", "--workers 0 --log-every 2")
    flags = ["--results", str(tmp_path / "mistakes.jsonl")]
    mistakes.main(flags)
    first = log_lines(tmp_path / "mistakes.jsonl")
    assert [x["run"] for x in first] == [run.name for run in mistakes.ALL]
    assert all(x["threads"] == 1 and x["curves"]["train"] and "top1" in x["result"] for x in first)
    assert (tmp_path / "mistakes.png").stat().st_size > 1000
    page = (tmp_path / "mistakes.md").read_text()
    mistakes.main(flags)                     # finished runs are not run again
    assert log_lines(tmp_path / "mistakes.jsonl") == first
    assert (tmp_path / "mistakes.md").read_text() == page


def test_a_teacher_that_stands_in_is_the_one_that_stage_1_builds(tmp_path):
    def refuse(name, *_):
        raise UserError(f"another teacher than {name}")
    flags = ["--limit", "20", "--steps", "1", "--workers", "0", "--out", str(tmp_path / "run")]
    with exchanged({"teachers.build_teacher": refuse}), pytest.raises(UserError, match="another"):
        vqkd.main(flags)
