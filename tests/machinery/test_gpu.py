"""results.gpu runs on a CPU at small sizes; its page is made of the records."""
import pytest
import torch

from conftest import log_lines
from results import gpu, gpu_page


def smoke(out, *parts):
    gpu.main(["--smoke", "--out", str(out), "--device", "cpu", "--parts", *parts])
    return log_lines(out / "gpu.jsonl")


def test_every_part_leaves_a_record_and_the_first_line_says_which_source(tmp_path):
    records = smoke(tmp_path, "card", "attention", "waits", "profile")
    assert records[0]["part"] == "begin"
    assert records[0]["commit"] and records[0]["command"]
    assert {r["part"] for r in records} == {"begin", "card", "attention", "waits", "profile"}
    assert not [r for r in records if "failed" in r]


def test_a_part_that_fails_says_so_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(args, device):
        yield dict(first="kept")
        raise RuntimeError("no such card")
    monkeypatch.setitem(gpu.PARTS, "attention", broken)
    records = smoke(tmp_path, "attention", "waits")
    assert [r["part"] for r in records] == ["begin", "attention", "attention", "waits"]
    assert records[1]["first"] == "kept"
    assert "no such card" in records[2]["failed"]


def test_no_part_begins_when_the_time_is_over(tmp_path):
    gpu.main(["--smoke", "--out", str(tmp_path), "--device", "cpu", "--minutes", "0",
              "--parts", "card"])
    assert log_lines(tmp_path / "gpu.jsonl")[1]["skipped"] == "no time left"


def test_the_authors_tensors_are_met_by_outputs_and_gradients(tmp_path, golden):
    golden("encoder_forward")                # skips without the files
    records = [r for r in smoke(tmp_path, "goldens") if r["part"] == "goldens"]
    exact = [r for r in records if r["amp"] == "no"]
    assert len(exact) == 4
    assert all(r["forward"] <= 2e-5 and r["gradient"] <= 1e-4 for r in exact)


def test_the_page_is_what_the_records_say(monkeypatch):
    card = dict(part="card", file="a.jsonl", date="2026-01-01", gpu="a card", cores=4, torch="2",
                bf16_tflops=700.0, commit="0123456789")
    step = dict(part="base_steps", stage="pretrain", model="base", batch_size=128, compile=False,
                images_per_s=1000.0, tflops=160.0, share=0.3, share_of_datasheet=0.2,
                peak_mib=2048.0, file="a.jsonl")
    begin = dict(part="begin", commit="0123456789", torch="2", date="2026-01-01", smoke=False)
    text = gpu_page.page([begin, card, step, step | dict(images_per_s=1100.0)])
    assert "(gpu/a.jsonl) | 2026-01-01 | a card | 4 | 2 | 700 TFLOP/s | 0123456 |" in text
    assert "| pretrain | base | 128 | no | 1100 | 160.0 | 30.0% | 20.0% | 2.0 | a.jsonl |" in text
    assert "1000" not in text
    assert "## Does a step wait for the GPU?\n\nnot run yet" in text


@pytest.mark.slow
def test_the_whole_command_runs_at_small_sizes(tmp_path):
    parts = [name for name in gpu.PARTS if name not in ("card", "attention", "goldens")]
    records = smoke(tmp_path, *parts)
    assert not [r for r in records if "failed" in r]
    assert {r["part"] for r in records} == {"begin", *parts}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_cuda_attention_with_a_position_bias_takes_a_fused_kernel(dtype):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from model import attention, position_bias, position_table, relative_position_index
    q, k, v = torch.randn(3, 2, 4, 17, 16, device="cuda", dtype=dtype, requires_grad=True)
    table = position_table((4, 4), 4).detach().cuda().requires_grad_()
    bias = position_bias(table, relative_position_index(4, 4).cuda())
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        attention(q, k, v, bias).sum().backward()
    assert table.grad.isfinite().all()
