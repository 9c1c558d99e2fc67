"""The small networks: sizes, layouts, and what they are before they have learnt anything."""

import pytest

torch = pytest.importorskip("torch")

from vireo.mini import autoencoders  # noqa: E402
from vireo.randomness import Draws  # noqa: E402


@pytest.mark.parametrize("name", sorted(autoencoders.RECIPES))
def test_every_recipe_reconstructs_clips_of_its_stages(name):
    recipe = autoencoders.RECIPES[name]
    network = recipe.build()
    assert sum(p.numel() for p in network.parameters()) < 500_000  # 1 MB in half precision
    for frames in sorted({stage.frames for stage in recipe.stages}):
        clips = torch.zeros(2, frames, 3, 32, 32)
        with torch.no_grad():
            output = recipe.reconstruct(network, clips, Draws(0, range(2)))
        assert output.clips.shape == clips.shape
        assert output.latents.shape[-2:] == (4, 4)
        assert output.penalty.ndim == 0


def test_wan_starts_as_an_image_network():
    """Before training a frame's latents do not depend on the frames before its group's last."""
    network = autoencoders.build_wan()
    clips = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = clips.clone()
    changed[:, :, 5:8] = 0
    with torch.no_grad():
        assert torch.equal(network.encode(clips).latent_dist.mean, network.encode(changed).latent_dist.mean)


def test_taehv_starts_as_an_image_network_and_makes_equal_frames_of_a_latent():
    network = autoencoders.build_taehv()
    autoencoders.share_time_slots(network)
    clips = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        frames = autoencoders.reconstruct_taehv(network, clips, None).clips
    torch.testing.assert_close(frames[:, 1], frames[:, 4])
    torch.testing.assert_close(frames[:, 5], frames[:, 8])
    assert (frames[:, 4] - frames[:, 5]).abs().max() > 1e-3
