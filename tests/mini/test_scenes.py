"""Clips are a pure function of their seed, and show what their text says."""

import subprocess
import sys

import numpy as np
import pytest

from vireo.mini import scenes

FRAMES = np.arange(scenes.NUM_FRAMES)


def seeds_of(task: str, count: int = 40) -> list[int]:
    return [seed for seed in range(400) if scenes.scene(seed).task == task][:count]


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    code = (
        "import hashlib, sys; from vireo.mini import scenes;"
        "print(hashlib.sha256(scenes.render(scenes.scene(7)).tobytes()).hexdigest(), 'torch' in sys.modules)"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(runs) == 1
    digest, imported_torch = runs.pop().split()
    assert len(digest) == 64
    assert imported_torch == "False"


def test_clips_of_different_seeds_differ():
    assert len({scenes.render(scenes.scene(seed)).tobytes() for seed in range(20)}) == 20


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (128, 192)])
def test_frames_are_uint8_pictures_of_the_size_asked_for(height, width):
    frames = scenes.render(scenes.scene(3, width / height), np.arange(4), height, width)
    assert frames.shape == (4, height, width, 3)
    assert frames.dtype == np.uint8


def test_resolution_scales_lengths():
    """A picture of twice the size, averaged over 2x2 pixels, is the picture."""
    scene = scenes.scene(11)
    small = scenes.render(scene, FRAMES[:1])[0].astype(float)
    large = scenes.render(scene, FRAMES[:1], 128, 128)[0].astype(float).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(small - large).mean() < 1


def test_frames_can_be_asked_for_one_by_one():
    scene = scenes.scene(5)
    assert np.array_equal(scenes.render(scene)[[3, 20]], scenes.render(scene, np.array([3, 20])))


@pytest.mark.parametrize("task", scenes.TASKS)
def test_nothing_moves_before_the_action_and_only_the_first_thing_then(task):
    for seed in seeds_of(task):
        actor, *others = scenes.scene(seed).things
        path = actor.centre(FRAMES)
        assert np.ptp(path[: scenes.ACTION_FRAME + 1], axis=0).max() == 0
        assert np.linalg.norm(path[-1] - path[-2]) > 2
        for other in others:
            assert np.ptp(other.centre(FRAMES), axis=0).max() == 0


def test_a_move_goes_where_its_text_says():
    said = set()
    for seed in seeds_of("move_object", 80):
        scene = scenes.scene(seed)
        direction = next(d for d in scenes.DIRECTIONS if scene.text.endswith(d))
        path = scene.things[0].centre(FRAMES)
        x, y = path[-1] - path[0]
        assert {"to the left": x < -20, "to the right": x > 20, "up": y < -20, "down": y > 20}[direction]
        assert min(abs(x), abs(y)) < 1e-3
        said.add(direction)
    assert said == set(scenes.DIRECTIONS)


def test_a_drop_reaches_the_floor_one_frame_after_the_end_and_gets_faster():
    for seed in seeds_of("drop_object"):
        thing = scenes.scene(seed).things[0]
        x, y = thing.centre(FRAMES).T
        assert np.ptp(x) == 0
        assert y[0] < 64 / 3 + 1e-3
        steps = np.diff(y[thing.rest :])
        assert (np.diff(steps) > 0).all()
        below = scenes._BELOW[thing.shape] * thing.radius
        assert y[-1] + below < 64 < y[-1] + steps[-1] * 1.35 + below


def test_a_cover_ends_one_frame_short_of_the_covered_thing():
    for seed in seeds_of("cover_object"):
        scene = scenes.scene(seed)
        above, below = scene.things
        path = above.centre(FRAMES)
        target = np.array(below.start)
        step = path[-1] - path[-2]
        np.testing.assert_allclose(path[-1] + step, target, atol=1e-3)
        assert below.radius < above.radius
        assert scene.text == f"cover the {below.name} with the {above.name}"


@pytest.mark.parametrize("task", scenes.TASKS)
def test_the_named_things_are_seen_where_the_scene_says(task):
    """The pixels of the picture, not only the numbers of the scene: the actor's own colour is at its centre."""
    for seed in seeds_of(task, 12):
        scene = scenes.scene(seed)
        actor = scene.things[0]
        assert actor.name in scene.text
        frames = scenes.render(scene)
        for frame in (0, 16, 20):
            x, y = np.clip(actor.centre(np.array(frame)).astype(int), 0, 63)
            seen = frames[frame, y, x] / 255
            nearest = min(scenes.COLOURS, key=lambda name: np.abs(seen - np.array(scenes.COLOURS[name])).sum())
            assert nearest == actor.colour


def test_colours_and_counts():
    for seed in range(100):
        things = scenes.scene(seed).things
        assert 1 <= len(things) <= 3
        assert len({thing.colour for thing in things}) == len(things)
        assert all(6 <= thing.radius <= 12 for thing in things)


def test_coverage_is_the_region_that_a_thing_changes():
    scene = next(s for s in map(scenes.scene, range(100)) if len(s.things) == 1)
    alone = scene._replace(things=())
    changed = (scenes.render(scene).astype(int) != scenes.render(alone)).any(-1)
    covered = scenes.coverage(scene.things[0])
    assert covered.shape == (21, 64, 64)
    assert not changed[covered == 0].any()
    assert changed[covered == 1].mean() > 0.98
    assert scenes.coverage(scene.things[0], grow=3).sum() > 1.3 * covered.sum()


def test_copying_the_last_frame_is_a_bad_guess():
    """What makes the task worth learning: the world's published copy-last figure, within a decibel."""
    frames = np.stack([scenes.render(scenes.scene(seed), np.array([19, 20])) for seed in range(96)]).astype(float)
    psnr = 10 * np.log10(255**2 / ((frames[:, 0] - frames[:, 1]) ** 2).mean((1, 2, 3)))
    assert 20.3 < psnr.mean() < 22.8
