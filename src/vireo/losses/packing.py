"""Clips as images of a few consecutive frames each, for a network that sees images, and back.

Source: madebyollin/seraena, TAEHV_Training_Example.ipynb. Everything follows from the frames that are there, so any
number of frames K packs into groups of any size g.
"""

from torch import Tensor


def padding(num_frames: int, group_frames: int, at_least: int = 0) -> int:
    """Frames to add to num_frames so that groups of group_frames are full: the fewest that are `at_least`."""
    return at_least + -(num_frames + at_least) % group_frames


def pack(frames: Tensor, group_frames: int, at_least: int = 0) -> Tensor:
    """Frames (B, K, C, H, W) as groups (B * G, g * C, H, W), channel = C * frame + colour, a clip's groups adjacent.

    What is missing in the last group, and at_least so many frames, comes from the clip's start; if the clip is too
    short for that, its last frame is repeated.
    """
    batch, length, channels, height, width = frames.shape
    missing = padding(length, group_frames, at_least)
    if missing:
        frames = frames[:, [*range(length), *(min(index, length - 1) for index in range(missing))]]
    return frames.reshape(-1, group_frames * channels, height, width)


def unpack(groups: Tensor, batch_size: int, num_frames: int, channels: int = 3) -> Tensor:
    """The frames (B, K, C, H, W) of groups that `pack` made of them."""
    return groups.reshape(batch_size, -1, channels, *groups.shape[-2:])[:, :num_frames]


def pack_latents(latents: Tensor, groups: int) -> Tensor:
    """What a clip's groups are judged by, (B * groups, C, h, w): its latents (B, C, t, h, w), averaged over time.

    The same for all groups of a clip, since a latent belongs to no single frame.
    """
    return latents.mean(dim=2).repeat_interleave(groups, dim=0)
