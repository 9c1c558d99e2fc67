"""Flow matching: the same training as `Denoising` on a `FlowSchedule` schedule, for videos.

The network is told 1000 sigma of the very noise level that its latents have. (The published recipe looks the two up in
tables of opposite order, so that they differ by 342 of 1000 on average.)
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from vireo.diffusion.flow_schedule import FlowSchedule
from vireo.diffusion.latent_masks import latent_mask
from vireo.errors import UserError
from vireo.losses.denoising import Denoising
from vireo.randomness import Draws


class FlowMatching(Denoising):
    """Mean squared error, in float32, of noise - clean for latents (B, C, t, h, w).

    noise_schedule, inputs, condition_dropout, image_inputs, timestep_sampling, timestep_bins: see `Denoising`. A
        reference that is dropped has a mask of zeros.
    timestep_range: places in the schedule's table, the first and the one after the last; None: all. Published are 20
        and 980, so noise levels below 0.097 are never trained.
    group_frames: latent frames that share a noise level, where every group has one of its own (causal networks); None:
        one for the whole clip.
    subject_weight: factor of the squared error inside the batch's `subject_mask`, (B, T, 1, H, W), 0 to 1; 1 needs no
        mask.

    Raises UserError for values out of range and names that are not there.
    """

    noise_schedule: FlowSchedule  # type: ignore[assignment]  # has what a NoiseSchedule has

    def __init__(
        self,
        noise_schedule: FlowSchedule,
        inputs: Sequence[str],
        condition_dropout: float = 0.0,
        image_inputs: Sequence[str] = (),
        timestep_sampling: Literal["uniform", "logit_normal"] = "uniform",
        timestep_range: Sequence[int] | None = None,
        timestep_bins: int = 0,
        group_frames: int | None = None,
        subject_weight: float = 1.0,
    ) -> None:
        super().__init__(
            noise_schedule,  # type: ignore[arg-type]
            inputs,
            condition_dropout,
            image_inputs,
            timestep_sampling=timestep_sampling,
            timestep_range=timestep_range,
            timestep_bins=timestep_bins,
        )
        if subject_weight <= 0 or (group_frames is not None and group_frames < 1):
            raise UserError(
                "loss.subject_weight is above 0, and loss.group_frames null or at least 1; "
                f"got {subject_weight} and {group_frames}."
            )
        self.group_frames, self.subject_weight = group_frames, subject_weight

    @property
    def is_plain(self) -> bool:
        return super().is_plain and (self.subject_weight == 1 or not self.learning)

    def timesteps(self, draws: Draws, clean: Tensor) -> Tensor:
        """1000 sigma, float32 (B,), or (B, t) where groups have their own."""
        if self.group_frames is None or not self.learning:
            return self.noise_schedule.timesteps(self.drawn(draws))
        groups = -(-clean.shape[2] // self.group_frames)
        each = self.noise_schedule.timesteps(self.drawn(draws, groups))
        return each.repeat_interleave(self.group_frames, dim=1)[:, : clean.shape[2]]

    def means(self, squares: Tensor, batch: dict) -> Tensor:
        if self.subject_weight != 1 and self.learning:
            if "subject_mask" not in batch:
                raise UserError(
                    f"loss.subject_weight={self.subject_weight} needs to know where the subject is, but the data give "
                    "no subject_mask: set data.subject_mask=true, or loss.subject_weight=1."
                )
            squares = squares * (1 + (self.subject_weight - 1) * latent_mask(batch["subject_mask"], squares))
        return super().means(squares, batch)
