"""What proves that text and history are used, and how roll-outs are measured."""

import pytest
import torch
from tests.edit_toys import FRAMES, SCALE, Drifts, Editor, Halving, LastFrame
from torch import nn

from vireo.data.stream import Stream
from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.errors import UserError
from vireo.metrics import psnr, ssim, ssim_map
from vireo.sampling.columns import Remembered
from vireo.sampling.edit_evaluations import FROZEN, OTHER_TEXT, Counterfactuals, RollOut, other_texts
from vireo.sampling.edits import EditSampler
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.reconstruction import Reconstruction

CPU = torch.device("cpu")
PLAIN = {"text_guidance": 1.0, "image_guidance": 1.0}


def sampler():
    """Decodes what the network says the clean latents are."""
    schedule = NoiseSchedule(prediction_type="sample")
    inputs = ["condition_latents", "prompt_embeds"]
    return EditSampler(schedule, inputs, 2, scheduler="DDIMScheduler", **PLAIN)


def evaluate(evaluation, network, indices=(0, 1, 2), **dataset):
    stream = Stream(Drifts(**dataset), "validation", shuffle=False)
    return list(evaluation(Evaluated(network, Halving(), sampler(), stream, list(indices), CPU, None)))


def lines(rows):
    return {row["line"]: row for row in rows}


class Reader(nn.Module):
    """Copies the last frame, darker the longer the text is, and nothing of the history."""

    def forward(self, noisy, timesteps, condition_latents, prompt_embeds):
        return (condition_latents[:, -1] - 0.2 * prompt_embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1)) * SCALE


class Historian(nn.Module):
    """Goes on as the last two frames did, and cannot read."""

    def forward(self, noisy, timesteps, condition_latents, prompt_embeds):
        return (2 * condition_latents[:, -1] - condition_latents[:, -2]) * SCALE


def test_a_network_that_reads_is_worse_with_another_text():
    rows = lines(evaluate(Counterfactuals(), Reader()))
    assert rows[OTHER_TEXT]["psnr"] != pytest.approx(rows["prediction"]["psnr"], abs=1e-3)
    assert rows[FROZEN]["psnr"] == pytest.approx(rows["prediction"]["psnr"], abs=1e-6)


def test_a_network_that_looks_back_is_worse_without_history():
    rows = lines(evaluate(Counterfactuals(), Historian()))
    assert rows[FROZEN]["psnr"] != pytest.approx(rows["prediction"]["psnr"], abs=1e-3)
    assert rows[FROZEN]["psnr"] == pytest.approx(rows["copy-last vae"]["psnr"], abs=1e-3)
    assert rows[OTHER_TEXT]["psnr"] == pytest.approx(rows["prediction"]["psnr"], abs=1e-6)


def test_a_sampler_that_remembers_is_looked_into(tmp_path):
    stream, plain = Stream(Drifts(), "validation", shuffle=False), evaluate(Counterfactuals(), Editor())
    remembered = Remembered(sampler(), tmp_path)
    assert list(Counterfactuals()(Evaluated(Editor(), Halving(), remembered, stream, [0, 1, 2], CPU, None))) == plain


def test_rows_of_a_table():
    rows = evaluate(Counterfactuals(), Editor())
    names = ["line", "psnr", "ssim", "l1", "changed_l1", "changed_psnr", "changed_ssim", "note"]
    assert all(list(row) == names for row in rows)
    expected = {"prediction", "vae", "copy-last vae", "copy-last", "copy-first", OTHER_TEXT, FROZEN}
    assert set(lines(rows)) == expected


def test_the_batch_does_not_matter():
    one, three = (evaluate(Counterfactuals(batch_size=size), Editor()) for size in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert a["line"] == b["line"] and a["psnr"] == pytest.approx(b["psnr"], abs=1e-2)


def test_what_cannot_be_asked_says_why():
    rows = lines(evaluate(Counterfactuals(), LastFrame(), text="move"))
    assert rows[OTHER_TEXT]["psnr"] is None and "same text" in rows[OTHER_TEXT]["note"]
    rows = lines(evaluate(Counterfactuals(), LastFrame(), frames=1))
    assert rows[FROZEN]["psnr"] is None and "single frame" in rows[FROZEN]["note"]


def test_only_the_first_clips():
    few, all_of_them = (evaluate(Counterfactuals(clips=clips), Historian()) for clips in (1, None))
    assert few == evaluate(Counterfactuals(), Historian(), indices=(0,)) != all_of_them
    assert evaluate(Counterfactuals(), Historian(), indices=()) == []


def test_the_next_text_that_differs():
    assert other_texts(["a", "a", "b", "a"]) == ["b", "b", "a", "b"]
    assert other_texts(["a", "a"]) == [None, None] and other_texts([]) == []


def test_a_roll_out_frame_by_frame():
    rows = evaluate(RollOut(num_frames=3), LastFrame())
    lines = ["prediction", "copy-last", "copy-first"]
    assert [(row["frame"], row["line"]) for row in rows] == [(n, line) for n in (1, 2, 3) for line in lines]
    assert {row["known_frames"] for row in rows} == {FRAMES + 1 - 3}
    copied = [row for row in rows if row["line"] == "copy-last"]
    assert [row["psnr"] for row in copied] == sorted((row["psnr"] for row in copied), reverse=True), "it moves away"
    truth = torch.stack(
        [torch.cat([c["frames"], c["target"][None]]) for c in (Drifts().sample(i, None) for i in range(3))]
    )
    truth = truth.float() / 255
    for row in rows:
        target, known = truth[:, 1 + row["frame"], None], truth[:, 1:2]
        held = {"copy-last": known, "copy-first": truth[:, :1]}.get(row["line"])
        if held is not None:
            assert row["psnr"] == pytest.approx(float(psnr(held, target).mean()), rel=1e-5)
            assert row["ssim"] == pytest.approx(float(ssim(held, target).mean()), rel=1e-5)
            assert row["l1"] == pytest.approx(float((held - target).abs().mean()), rel=1e-5)
        changed = ((target - known).abs().amax(dim=2, keepdim=True) > 0.1).expand_as(target)
        if row["line"] == "copy-last":
            its = [(held - target).abs()[clip][changed[clip]].mean() for clip in range(3)]
            assert row["changed_l1"] == pytest.approx(float(torch.stack(its).mean()), rel=1e-5)
            its = [ssim_map(held, target)[clip][changed[clip]].mean() for clip in range(3)]
            assert row["changed_ssim"] == pytest.approx(float(torch.stack(its).mean()), rel=1e-5)


def test_frames_that_are_not_evenly_spaced_have_no_roll_out():
    class Chosen(Drifts):
        numbers = [4, 8, 12, 16, 20]

        def sample(self, index, draws):
            return {**super().sample(index, draws), "frame_numbers": self.numbers}

    def rows():
        stream = Stream(Chosen(), "validation", shuffle=False)
        return RollOut(num_frames=2)(Evaluated(LastFrame(), Halving(), sampler(), stream, [0, 1], CPU, None))

    assert len(rows()) == 2 * 3
    Chosen.numbers = [4, 10, 15, 19, 20]
    (row,) = rows()
    assert row["note"].startswith("not measured: the frames of data.condition_frames")


def test_a_perfect_roll_out_of_what_stands_still():
    class Still(Drifts):
        def sample(self, index, draws):
            one = super().sample(index, draws)
            grey = torch.full_like(one["target"], 77)
            return {**one, "frames": grey.expand_as(one["frames"]).contiguous(), "target": grey}

    stream = Stream(Still(), "validation", shuffle=False)
    rows = RollOut(num_frames=99)(Evaluated(LastFrame(), Halving(), sampler(), stream, [0, 1], CPU, None))
    assert len(rows) == 3 * FRAMES and all(row["psnr"] == 100 and row["l1"] == 0 for row in rows)


def test_mistakes():
    with pytest.raises(UserError, match="num_frames=0"):
        RollOut(num_frames=0)
    for evaluation in (Counterfactuals(), RollOut()):
        with pytest.raises(UserError, match="EditSampler as model.sampler, got Reconstruction"):
            evaluation(Evaluated(LastFrame(), Halving(), Reconstruction(), None, [0], CPU, None))
    assert evaluate(RollOut(), LastFrame(), indices=()) == []
