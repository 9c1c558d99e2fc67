"""A picture "VAE" and an editor of a few lines, to test what samples and rolls out without weights."""

import torch
import torch.nn.functional as F
from torch import nn

from vireo.models.encoders import Encoder
from vireo.pixels import to_pixels

FRAMES, SIDE, SCALE = 4, 16, 0.2


class Halving(Encoder):
    """Latents (4, H / 2, W / 2) are the averages of 2 x 2 pixels in [-1, 1], and their mean over colours."""

    outputs = {
        "frame_moments": "frames",
        "target_moments": "target",
        "prompt_embeds": "prompt",
        "null_prompt_embeds": '""',
    }
    scaling_factor = SCALE

    def __init__(self):
        self.calls = []

    def encode(self, output, values):
        self.calls.append(output)
        if output.endswith("prompt_embeds"):
            return torch.stack([torch.full((2, 3), float(len(text))) for text in values])
        if output.endswith("_moments"):
            small = F.avg_pool2d(to_pixels(values.flatten(0, -4)), 2)
            mean = torch.cat([small, small.mean(1, keepdim=True)], 1)
            return torch.cat([mean, torch.full_like(mean, -30.0)], 1).unflatten(0, values.shape[:-3])
        raise KeyError(output)

    def condition(self, batch, draws):
        return {**batch, "condition_latents": batch["frame_moments"].chunk(2, dim=2)[0]}

    def decode(self, latents):
        return F.interpolate(latents[:, :3] / SCALE / 2 + 0.5, scale_factor=2.0)


class Editor(nn.Module):
    """A convolution over everything that it is given, time and text included; only `forward` may be called."""

    def __init__(self, frames=FRAMES):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(4 + 4 * frames, 4, 3, padding=1)
        self.batches = []

    def forward(self, noisy, timesteps, condition_latents, prompt_embeds):
        self.batches.append(len(noisy))
        assert timesteps.shape == (len(noisy),)
        mixed = self.mix(torch.cat([noisy, condition_latents.flatten(1, 2)], dim=1))
        return mixed + 0.01 * prompt_embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1) + (timesteps / 1000).view(-1, 1, 1, 1)


class LastFrame(nn.Module):
    """Predicts that the clean latents are those of the last frame, scaled: a perfect copy."""

    def forward(self, noisy, timesteps, condition_latents, prompt_embeds):
        return condition_latents[:, -1] * SCALE


def batch(clips=(0, 1), frames=FRAMES):
    """Smooth clips that drift to the right: uint8 frames (B, frames, 3, SIDE, SIDE), the target behind them, a text."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randint(0, 256, (8, 3, 4, 4), generator=generator).float()
    pictures = F.interpolate(start, size=(SIDE, SIDE), mode="bilinear")[list(clips)]
    moved = [pictures.roll(2 * step, dims=-1).round().to(torch.uint8) for step in range(frames + 1)]
    return {
        "frames": torch.stack(moved[:-1], dim=1),
        "target": moved[-1],
        "prompt": [f"move {'x' * clip}" for clip in clips],
        "name": [f"clip {clip}" for clip in clips],
        "task": [("move", "drop")[clip % 2] for clip in clips],
        "position": torch.tensor(list(clips)),
    }


class Drifts:
    """The clips of `batch` as a dataset; all with one text if `text` is given."""

    max_bad_fraction = 0.0

    def __init__(self, clips=4, frames=FRAMES, text=None):
        self.clips, self.frames, self.text = clips, frames, text

    def __len__(self):
        return self.clips

    def sample(self, index, draws):
        one = {name: value[0] for name, value in batch([index], self.frames).items() if name != "position"}
        return {**one, "prompt": self.text or one["prompt"]}

    def sources(self, index):
        return {}

    def describe(self):
        return {}
