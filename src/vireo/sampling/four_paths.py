"""A tiny autoencoder and its teacher, crossed: which of the four halves is to blame for what one sees."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.models.taehv import Mode
from vireo.models.teachers import Teacher, compare_latents
from vireo.pixels import to_pixels
from vireo.randomness import Draws
from vireo.sampling.reconstruction import Reconstruction
from vireo.sampling.sampler import Sampler


class FourPaths(Sampler):
    """Each encoder before each decoder, beside the clip. Columns, float32 (B, K, 3, H, W) in [0, 1]:

    target: the clip's first K frames, K being what the tiny decoder gives back.
    teacher: the teacher's latents by the teacher's decoder, the best that there is to learn.
    prediction: the teacher's latents by the tiny decoder, which is what it does behind a video model.
    own latents: the tiny encoder's latents by the tiny decoder.
    tiny to teacher: the tiny encoder's latents by the teacher's decoder.

    mode, chunk: how many frames the tiny network runs at a time, see `TAEHV.encode`. variant: see `Reconstruction`.
    teacher_decoder: false leaves out what the teacher decodes, which costs most by far.
    """

    def __init__(
        self, mode: Mode = "parallel", chunk: int = 4, variant: str | None = None, teacher_decoder: bool = True
    ) -> None:
        self.reconstruction = Reconstruction(mode, chunk, variant)
        self.mode = mode
        self.chunk = chunk
        self.teacher_decoder = teacher_decoder

    @torch.no_grad()
    def __call__(self, network: nn.Module, encoder: Teacher, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """batch: frames, uint8 (B, T, 3, H, W), and target_latents. Raises UserError if no teacher gave the latter."""
        frames, given = to_pixels(batch["frames"], low=0.0), _target_latents(batch)
        own, prediction = network(frames, given, mode=self.mode, chunk=self.chunk)
        columns = {"target": frames}
        if self.teacher_decoder:
            columns["teacher"] = encoder.decode(given)
        columns["prediction"] = prediction
        columns["own latents"] = network(latents=own, mode=self.mode, chunk=self.chunk).frames
        if self.teacher_decoder:
            columns["tiny to teacher"] = encoder.decode(own)
        length = prediction.shape[1]
        return {name: video[:, :length].float().clamp(0, 1) for name, video in columns.items()}

    @torch.no_grad()
    def measure(
        self, network: nn.Module, encoder: Teacher, batch: dict, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """How close the tiny encoder's latents are to the teacher's, one value a clip; see `compare_latents`. (B,)"""
        frames, given = to_pixels(batch["frames"], low=0.0), _target_latents(batch)
        own = network(frames, decode=False, mode=self.mode, chunk=self.chunk).latents
        return compare_latents(own, given)

    def baselines(self, batch: dict) -> dict[str, Tensor]:
        """What one gets without a network, see `Reconstruction.baselines`."""
        return self.reconstruction.baselines(batch)


def _target_latents(batch: dict) -> Tensor:
    if "target_latents" not in batch:
        raise UserError(
            "FourPaths compares with a teacher, but the batch has no target_latents: choose a model whose encoder is a "
            "teacher (model=taehv_cogvideox), or the sampler vireo.sampling.reconstruction.Reconstruction."
        )
    return batch["target_latents"]
