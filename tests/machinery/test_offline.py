"""Nothing comes over the network unless a flag asks for it."""
import contextlib
import socket
from unittest import mock

import pytest
from pictures import fill, sentence

import finetune
import linprobe
import pretrain
import segment
import vqkd
from support import data, teachers

QUICK = ["--workers", "0", "--amp", "no", "--device", "cpu",
         "--batch-size", "8", "--micro-batch", "8"]


@contextlib.contextmanager
def offline():
    """Every look-up of a name and every connection fails, and is noted in the list."""
    asked = []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network here")

    with (mock.patch.object(socket.socket, "connect", refuse),
          mock.patch.object(socket, "create_connection", refuse),
          mock.patch.object(socket, "getaddrinfo", refuse)):
        yield asked


def test_opening_a_data_set_asks_no_network(tmp_path):
    with offline() as asked:
        data.open_data("shapes", "val", limit=10)
        data.open_data(str(fill(tmp_path)), "train")[0]
        for name in ("cifar10", "cifar100"):
            text = sentence(data.open_data, name, "train", data_dir=str(tmp_path))
            assert "add --download" in text
        for name in ("hog", "pixel"):
            teachers.build_teacher(name, (6, 6), 8, "cpu")
    assert not asked


def test_download_is_what_asks_the_network(tmp_path):
    with offline() as asked:
        text = sentence(data.open_data, "cifar10", "train", data_dir=str(tmp_path), download=True)
    assert asked and "no network here" in text


@pytest.mark.parametrize("name, module", [("clip", "open_clip"), ("dino", "timm")])
def test_a_named_teacher_with_weights_is_what_fetches_them(monkeypatch, name, module):
    library = pytest.importorskip(module)
    ask = mock.Mock(side_effect=OSError("no network here"))
    monkeypatch.setattr(library, "create_model", ask)
    text = sentence(teachers.build_teacher, name, (14, 14), 16, "cpu")
    assert "no network here" in text and "hog and pixel need no weights" in text
    assert ask.call_args.kwargs["pretrained"]


@pytest.mark.slow
def test_the_five_stages_run_on_built_in_images_without_a_network(tmp_path):
    flags = [*QUICK, "--limit", "16", "--out", str(tmp_path)]
    with offline() as asked:
        vqkd.main([*flags, "--steps", "2", "--continuous-steps", "1", "--codes", "8"])
        pretrain.main([*flags, "--steps", "1"])
        linprobe.main([*flags, "--steps", "1", "--blocks", "1"])
        finetune.main([*flags, "--steps", "1"])
        segment.main([*flags, "--steps", "1"])
    assert not asked
