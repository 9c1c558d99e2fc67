"""The flow finds known motion, and the warping error sees flicker but no motion."""

import numpy as np
import pytest
import torch

from vireo.mini import masked_clips, scenes
from vireo.sampling.warping import correspondence, optical_flow, warp, warp_error


def video(seed, frames=6):
    pictures = scenes.render(masked_clips.drifting(seed), masked_clips.times(26)[:frames])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)[None].float() / 255


@pytest.mark.parametrize("move", [(0.0, 0.0), (1.5, -0.75), (-3.0, 2.0), (4.0, 5.0)])
def test_the_flow_of_a_moved_picture(move):
    """x, y: where a pixel of the first picture is in the second."""
    scene = masked_clips.drifting(3)._replace(things=())
    still = scene._replace(background=scene.background._replace(pan=(-move[0], -move[1])))
    first, second = torch.from_numpy(scenes.render(still, np.array([0, 1]))).permute(0, 3, 1, 2)[:, None].float() / 255
    flow = optical_flow(first, second)[0, :, 8:-8, 8:-8]
    assert (flow - torch.tensor(move)[:, None, None]).abs().median() < 0.1
    moved = warp(second, optical_flow(first, second))
    assert (moved - first)[..., 8:-8, 8:-8].abs().mean() < 0.01


def test_objects_and_background_move_differently():
    scene, frames = masked_clips.drifting(8), video(8, 2)
    flow, _ = correspondence(frames)
    times = masked_clips.times(26)[:2]
    thing = torch.from_numpy(scenes.coverage(scene.things[0], times)[1] > 0.9)
    back = -np.array(scene.things[0].velocity) * times[1]
    found = [float(flow[0, 0, axis][thing].median()) for axis in (0, 1)]
    assert np.allclose(found, back, atol=0.3)


def test_what_moves_is_no_error_and_what_flickers_is():
    frames = torch.cat([video(seed) for seed in range(4)])
    flow, seen = correspondence(frames)
    assert flow.shape == (4, 5, 2, 64, 64) and seen.shape == (4, 5, 1, 64, 64)
    assert 0.5 < seen.float().mean() < 1, "most, but what comes in or from behind something is not seen before"
    true = warp_error(frames, flow, seen)
    still = warp_error(frames, torch.zeros_like(flow), torch.ones_like(seen))
    assert (true < still / 5).all()
    noise = 0.05 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    assert (warp_error(frames + noise, flow, seen) > true + 2).all()
    steady = warp_error(frames + 0.05, flow, seen)
    torch.testing.assert_close(steady, true, msg="what is wrong in the same way in all frames does not flicker")


def test_the_error_is_a_thousand_times_the_squares_of_all_colours():
    frames = torch.zeros(1, 3, 3, 16, 16)
    frames[:, 1, 0], frames[:, 1, 1] = 0.1, 0.2
    flow, seen = torch.zeros(1, 2, 2, 16, 16), torch.ones(1, 2, 1, 16, 16, dtype=torch.bool)
    assert float(warp_error(frames, flow, seen)) == pytest.approx(1000 * (0.1**2 + 0.2**2))
    seen[:, 1] = False
    assert float(warp_error(frames, flow, seen)) == pytest.approx(500 * (0.1**2 + 0.2**2)), "the mean over pairs"
