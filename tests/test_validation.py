import pytest
import torch

from tests.toys import Denoise, Denoised, ToyDataset, ToyNetwork
from vireo.data.stream import Stream
from vireo.losses.objective import Objective
from vireo.models.encoders import NoEncoder
from vireo.validation import SEED, ClipScore, further_videos, means, means_by_task, measure_video, score_clips, validate
from vireo.video_io import BadVideoError

CPU = torch.device("cpu")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ToyNetwork().eval()


def scores(network, batch_size, indices=range(5)):
    stream = Stream(ToyDataset(side=16), SEED, shuffle=False)
    return list(score_clips(network, NoEncoder(), Denoise(), Denoised(), stream, list(indices), batch_size, CPU))


def test_scores_do_not_depend_on_the_batch(network):
    one, three = ([score for score, _ in scores(network, size)] for size in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert a.measures == pytest.approx(b.measures, rel=1e-6)
    assert len({score.measures["loss"] for score in three}) == 5, "each clip has a loss of its own"


def test_clips_of_several_shapes_are_taken_one_by_one(network, tmp_path):
    class Several(ToyDataset):
        def sample(self, index, draws):
            sample = super().sample(index, draws)
            return sample | {"frames": sample["frames"][..., : 12 + 4 * (index == 3)]}

    def called(noisy):
        sizes.append(tuple(noisy.shape))
        return network(noisy)

    sizes: list[tuple] = []
    stream = Stream(Several(side=16), SEED, shuffle=False)
    given = (NoEncoder(), Denoise(), Denoised(), stream, list(range(6)), 2, CPU)
    found = [score for score, _ in score_clips(called, *given)]
    assert {shape[0] for shape in sizes if shape[-1] == 16} == {1} and 2 in {shape[0] for shape in sizes}
    alone = [score for score, _ in score_clips(network, *given[:-2], 1, CPU)]
    for a, b in zip(found, alone, strict=True):
        assert a.clip == b.clip and a.measures == pytest.approx(b.measures, rel=1e-6)

    class Offering(Denoised):
        def videos(self, network, encoder, batch, draws):
            return {"again": {"prediction": batch["frames"].float() / 255}}

    shown = further_videos(network, NoEncoder(), Offering(), stream, [2, 3], 2, CPU)
    assert [columns["prediction"].shape[-1] for *_, columns in shown] == [12, 16]


def test_every_column_is_scored_beside_the_baselines(network):
    score, columns = scores(network, 2)[0]
    assert {"psnr", "ssim", "loss", "brightness", "grey/psnr", "grey/ssim"} <= score.measures.keys()
    assert set(columns) == {"target", "prediction"} and columns["target"].dtype == torch.uint8
    assert (
        score.measures["psnr"] == measure_video(*(columns[n].float() / 255 for n in ("prediction", "target")))["psnr"]
    )


def test_what_has_no_truth_is_shown_and_not_measured(network):
    class Shown(Denoised):
        def __call__(self, *arguments):
            return {"prediction": super().__call__(*arguments)["prediction"]}

        def measure(self, *arguments):
            return {}

    stream = Stream(ToyDataset(side=16), SEED, shuffle=False)
    ((score, columns),) = score_clips(network, NoEncoder(), Denoise(), Shown(), stream, [0], 1, CPU)
    assert score.measures == {} and list(columns) == ["prediction"]


def test_the_loss_does_not_learn_in_validation(network):
    seen = []

    class Watching(Denoise):
        def __call__(self, network, batch, draws):
            seen.append(self.learning)
            return super().__call__(network, batch, draws)

    loss = Watching()
    stream = Stream(ToyDataset(side=16), SEED, shuffle=False)
    list(score_clips(network, NoEncoder(), loss, Denoised(), stream, [0], 1, CPU))
    assert seen == [False] and loss.learning


def test_pictures_are_written_and_means_taken(network, tmp_path):
    stream = Stream(ToyDataset(side=16), SEED, shuffle=False)
    figures = validate(
        network,
        NoEncoder(),
        Denoise(),
        Denoised(),
        stream,
        clips=3,
        batch_size=2,
        device=CPU,
        folder=tmp_path,
        fps=8.0,
        pictures=2,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"clip_00{i}.{kind}" for i in range(2) for kind in ("mp4", "png")
    ]
    expected = means(score for score, _ in scores(network, 2, range(3)))
    assert figures == pytest.approx(expected)
    assert means([]) == {}


def test_the_pooled_psnr_of_a_set_is_that_of_its_mean_error():
    clips = [
        ClipScore(number, "", {"pooled_psnr": psnr, "mse": mse, "copy-last/pooled_psnr": psnr, "copy-last/mse": mse})
        for number, (psnr, mse) in enumerate([(10.0, 0.1), (30.0, 0.001)])
    ]
    found = means(clips)
    assert found["mse"] == pytest.approx(0.0505)
    assert found["pooled_psnr"] == found["copy-last/pooled_psnr"] == pytest.approx(12.967, abs=1e-3)


def test_the_loss_is_the_mean_over_its_grid(network):
    class Timed(Denoise):
        grid = ({"level": 0.0}, {"level": 3.0})

        def __call__(self, network, batch, draws):
            return Objective(draws.uniform("level").mean() ** 2, {})

    stream = Stream(ToyDataset(side=16), SEED, shuffle=False)
    [(score, _)] = score_clips(network, NoEncoder(), Timed(), Denoised(), stream, [0], 1, CPU)
    assert score.measures["loss"] == 4.5


def test_columns_for_the_eyes_are_not_scored(network):
    class Looking(Denoised):
        unscored = ("difference",)

        def __call__(self, network, encoder, batch, draws):
            columns = super().__call__(network, encoder, batch, draws)
            return {**columns, "difference": columns["target"] - columns["prediction"]}

    stream = Stream(ToyDataset(side=16), SEED, shuffle=False)
    [(score, shown)] = score_clips(network, NoEncoder(), Denoise(), Looking(), stream, [0], 1, CPU)
    assert "difference" in shown and not any(name.startswith("difference") for name in score.measures)


def test_further_videos_of_each_clip(network):
    class Offering(Denoised):
        def videos(self, network, encoder, batch, draws):
            return {"twice": {"prediction": (batch["frames"].float() / 255).repeat(1, 2, 1, 1, 1)}}

    stream = Stream(ToyDataset(side=16), SEED, shuffle=False)
    found = list(further_videos(network, NoEncoder(), Offering(), stream, [0, 1, 2], 2, CPU))
    assert [(clip, title) for clip, title, _ in found] == [(0, "twice"), (1, "twice"), (2, "twice")]
    frames = stream[(2, 0)]["frames"]
    assert torch.equal(found[2][2]["prediction"], torch.cat([frames, frames]))
    assert list(further_videos(network, NoEncoder(), Denoised(), stream, [0], 1, CPU)) == []


def test_means_of_each_task(network):
    class Kinds(ToyDataset):
        def sample(self, index, draws):
            return {**super().sample(index, draws), "task": ("move", "drop")[index % 2]}

    stream = Stream(Kinds(side=16), SEED, shuffle=False)
    found = [s for s, _ in score_clips(network, NoEncoder(), Denoise(), Denoised(), stream, [0, 1, 2], 2, CPU)]
    rows = {(row.pop("task"), row.pop("column")): row for row in means_by_task(found)}
    assert list(rows) == [(task, column) for task in ("drop", "move") for column in ("prediction", "grey")]
    assert rows["drop", "prediction"] == {"clips": 1, **{n: v for n, v in found[1].measures.items() if "/" not in n}}
    for column, measure in (("prediction", "loss"), ("prediction", "ssim"), ("grey", "psnr")):
        name = measure if column == "prediction" else f"{column}/{measure}"
        its = [found[number].measures[name] for number in (0, 2)]
        assert rows["move", column][measure] == pytest.approx(sum(its) / 2)
    assert rows["move", "grey"]["loss"] is None, "only a network has one"
    assert means_by_task([score for score, _ in scores(network, 2)]) == []


class Torn(ToyDataset):
    """Whose clip 1 cannot be read."""

    def sample(self, index, draws):
        if index == 1:
            raise BadVideoError("clip1.mp4", "cut off")
        return {**super().sample(index, draws), "task": "move"}


def test_a_held_out_clip_that_cannot_be_read_is_left_out_and_told(network, caplog, tmp_path):
    stream = Stream(Torn(side=16), SEED, shuffle=False)
    found = list(score_clips(network, NoEncoder(), Denoise(), Denoised(), stream, [0, 1, 2], 2, CPU))
    (first, _), (torn, nothing), (last, _) = found
    assert (torn.clip, torn.name, torn.measures, torn.unreadable, nothing) == (1, "clip1.mp4", {}, "cut off", {})
    assert [first.name, last.name] == ["clip0", "clip2"] and "left out of the scores: clip1.mp4: cut off" in caplog.text
    scored = [score for score, _ in found]
    assert means(scored)["psnr"] == pytest.approx((first.measures["psnr"] + last.measures["psnr"]) / 2)
    assert {row["clips"] for row in means_by_task(scored)} == {2}
    figures = validate(
        network, NoEncoder(), Denoise(), Denoised(), stream, clips=3, batch_size=2, device=CPU, folder=tmp_path
    )
    assert figures.pop("unreadable_clips") == 1 and figures == pytest.approx(means(scored))
    assert not list(tmp_path.glob("clip_001*")) and list(tmp_path.glob("clip_002*"))
