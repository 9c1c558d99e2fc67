"""Speed and memory of the tiny autoencoder's modes, beside its teacher's."""

import time

import pytest
import torch
from tests.toys import ToyDataset, ToyNetwork

from vireo.data.stream import Stream
from vireo.errors import UserError
from vireo.models.encoders import NoEncoder
from vireo.sampling import autoencoder_speed
from vireo.sampling.autoencoder_speed import AutoencoderSpeed
from vireo.sampling.evaluation import Evaluated

CPU = torch.device("cpu")
TINY = [("tiny", mode, part) for mode in ("parallel", "chunked", "sequential") for part in ("encode", "decode")]


def rows(network, encoder, tmp_path, **options):
    stream = Stream(ToyDataset(), "validation", shuffle=False)
    options = {"num_frames": 8, "height": 16, "width": 24, "repeats": 1, **options}
    return AutoencoderSpeed(**options)(Evaluated(network, encoder, None, stream, range(1), CPU, tmp_path))


def named(found):
    return [(row["network"], row["mode"], row["part"]) for row in found]


def test_every_mode_beside_the_teacher(tiny, teacher, tmp_path):
    found = rows(tiny, teacher, tmp_path)
    assert named(found) == [("teacher", "its own", "encode"), ("teacher", "its own", "decode"), *TINY]
    assert {row["clip"] for row in found} == {"5x16x24"}, "the longest legal clip of at most 8 frames"
    assert {row["dtype"] for row in found} == {"fp32"} and {tuple(row) for row in found} == {tuple(found[0])}
    speed = {name: row["frames_per_s"] for name, row in zip(named(found), found, strict=True)}
    for name, row in zip(named(found), found, strict=True):
        assert row["frames_per_s"] > 0
        assert row["x_teacher"] == pytest.approx(row["frames_per_s"] / speed["teacher", "its own", name[2]])


@pytest.mark.parametrize("encoder, options", [(NoEncoder(), {}), ("teacher", {"teacher": False})])
def test_the_tiny_network_alone(tiny, encoder, options, tmp_path, request):
    encoder = request.getfixturevalue(encoder) if isinstance(encoder, str) else encoder
    found = rows(tiny, encoder, tmp_path, **options)
    assert named(found) == TINY and all(row["x_teacher"] is None for row in found)


def test_both_compute_in_the_teachers_dtype_and_the_network_stays_as_it_was(tiny, teacher, tmp_path):
    teacher.dtype, seen = "bf16", set()
    type(tiny).encode, original = lambda self, x, *a: seen.add(x.dtype) or original(self, x, *a), type(tiny).encode
    try:
        found = rows(tiny, teacher, tmp_path)
    finally:
        type(tiny).encode = original
    assert seen == {torch.bfloat16} and {row["dtype"] for row in found} == {"bf16"}
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}


def test_the_median_of_the_timed_calls_counts(monkeypatch):
    waits = iter([0.02, 0.2, 0.02])
    assert 0.02 <= autoencoder_speed._median_seconds(lambda: time.sleep(next(waits)), 3, CPU) < 0.1


def test_chunks_take_less_memory(tiny, tmp_path):
    found = rows(tiny, NoEncoder(), tmp_path, num_frames=17, height=192, width=192)
    if found[0]["peak_MiB"] is None:
        pytest.skip(found[0]["note"])
    peaks = {row["mode"]: row["peak_MiB"] for row in found if row["part"] == "decode"}
    assert peaks["parallel"] > 1.3 * peaks["chunked"] > peaks["sequential"]


@pytest.mark.parametrize("which", ["teacher", "tiny"])
def test_encoding_that_does_not_fit_says_so_too(which, tiny, teacher, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(*{"teacher": (teacher, "condition"), "tiny": (type(tiny), "encode")}[which], full)
    found = rows(tiny, teacher, tmp_path)
    measured = [name for name, row in zip(named(found), found, strict=True) if row["frames_per_s"] is not None]
    assert {name[0] for name in measured} == {"teacher", "tiny"} - {which}
    assert all("does not fit" in row["note"] for row in found if row["network"] == which)


def test_what_does_not_fit_says_so_and_the_rest_goes_on(tiny, teacher, tmp_path, monkeypatch):
    def full(latents):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(teacher, "decode", full)
    found = rows(tiny, teacher, tmp_path)
    assert "does not fit" in found[1]["note"] and found[1]["frames_per_s"] is None
    assert [row["x_teacher"] is None for row in found[2:]] == [False, True] * 3


def test_a_teacher_that_fails_is_not_left_out(tiny, teacher, tmp_path, monkeypatch):
    def broken(latents):
        raise RuntimeError("broken")

    monkeypatch.setattr(teacher, "decode", broken)
    with pytest.raises(RuntimeError, match="broken"):
        rows(tiny, teacher, tmp_path)


def test_other_networks_and_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="measures a TAEHV, the network is a ToyNetwork"):
        rows(ToyNetwork(), NoEncoder(), tmp_path)
    with pytest.raises(UserError, match="from 1 on, got .*'repeats': 0"):
        AutoencoderSpeed(9, 16, 16, repeats=0)
