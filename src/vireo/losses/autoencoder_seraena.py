"""The objective of a distilled video autoencoder with Seraena: decoded frames also follow corrections.

Source: madebyollin/seraena, TAEHV_Training_Example.ipynb: the sum of three mean squared errors, to the teacher's
latents, to the frames, and to the decoded frames with their corrections added.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo import distributed
from vireo.errors import UserError
from vireo.losses.autoencoder import Autoencoder, Step
from vireo.losses.packing import pack, pack_latents, unpack
from vireo.losses.seraena import Seraena
from vireo.randomness import Draws

VALUE = "seraena/uninformative_value"


class AutoencoderSeraena(Autoencoder):
    """Autoencoder's terms and the distance to the corrected frames.

    seraena: weight of that distance's mean square. At equal weights it pulls 1 / RMSE times as strongly as the
        reconstruction does, twenty times at 26 dB.
    group_frames: consecutive frames that the discriminator sees together. Any number goes with any length of clip.
    discriminator: of 3 * group_frames image channels, with the latents' channels as context (`for_taehv`).
    pad: frames that are packed twice because groups must be full: "minimal", or as many as "notebook", whose groups
        cover the clip's whole length though the decoder gives fewer frames.
    discriminator_lr, eps, eps_reference_hw, replay, replay_bytes, replay_length, replay_dtype: see Seraena.
    The others: see Autoencoder.

    The discriminator learns at every micro-batch, as the reference's does, so gradient_accumulation is not a larger
    batch. It learns nowhere else: with `learning` false the term and its figures are absent, so that the total of
    validation is one that can fall. A micro-batch whose reconstruction is not finite on one rank teaches it nothing on
    any; the loop turns that step away.

    Metrics beside Autoencoder's:
    - seraena/discriminator_loss: 1 is no discrimination, 0 perfect. The published run ends at 0.74.
    - seraena/feature_loss: mean squared distance of the scores of real and decoded frames.
    - seraena/deviation: of the gradient before it is normalized.
    - seraena/gradient_ratio: norm of this term's gradient on the decoded frames over the reconstruction's, weights
      included (absent if the reconstruction has none).
    - seraena/uninformative_value: the distance. It is about (deviation / (deviation + eps))^2 by construction, says
      nothing about quality and does not fall.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        seraena: float = 1.0,
        group_frames: int = 3,
        pad: Literal["minimal", "notebook"] = "minimal",
        *,
        reconstruction: float = 1.0,
        latent: float = 1.0,
        l1: float = 0.0,
        decoder_input: Literal["teacher", "own", "mixed"] | None = None,
        mix_probability: float = 0.5,
        detach: bool | None = None,
        discriminator_lr: float = 3e-4,
        eps: float = 1e-5,
        eps_reference_hw: int | None = None,
        replay: Literal["position", "reference"] = "position",
        replay_bytes: int = 512 * 2**20,
        replay_length: int = 16384,
        replay_dtype: Literal["uint8", "bfloat16", "float32"] = "uint8",
    ) -> None:
        super().__init__(reconstruction, latent, l1, decoder_input, mix_probability, detach)
        if pad not in ("minimal", "notebook") or group_frames < 1:
            raise UserError(
                "loss.pad must be minimal or notebook, and loss.group_frames at least 1; "
                f"got {pad!r} and {group_frames}."
            )
        if discriminator.image_channels != 3 * group_frames:
            raise UserError(
                f"loss.discriminator takes images of {discriminator.image_channels} channels, but "
                f"loss.group_frames={group_frames} makes {3 * group_frames}, three a frame."
            )
        self.weights[VALUE] = seraena
        self.group_frames, self.pad = group_frames, pad
        self.seraena = Seraena(
            discriminator,
            lr=discriminator_lr,
            eps=eps,
            eps_reference_hw=eps_reference_hw,
            replay=replay,
            replay_bytes=replay_bytes,
            replay_length=replay_length,
            replay_dtype=replay_dtype,
        )

    is_local = False  # the discriminator's statistics are those of all ranks

    def to(self, device: torch.device) -> None:
        self.seraena.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        return self.seraena.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seraena.load_state_dict(state)

    def compare(self, step: Step, draws: Draws) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        terms, figures = super().compare(step, draws)
        if not self.learning or not self._finite(terms["reconstruction"], step.decoded_latents):
            return terms, figures
        found = self.seraena(*self._groups(step), draws)
        prediction = step.prediction.detach()
        corrected = prediction + unpack(found.correction, *prediction.shape[:2])
        terms[VALUE] = F.mse_loss(step.prediction, corrected)
        figures["seraena/discriminator_loss"] = found.discriminator_loss
        figures["seraena/feature_loss"] = found.feature_loss
        figures["seraena/deviation"] = found.deviation
        if self.weights["reconstruction"]:
            # A mean square's gradient is 2 / numel times the difference, so its norm goes as the root of the value.
            squares = [self.weights[name] ** 2 * terms[name].detach() for name in (VALUE, "reconstruction")]
            pull, reconstruction = distributed.sum_over_ranks(torch.stack(squares))
            figures["seraena/gradient_ratio"] = (pull / reconstruction).sqrt()
        return terms, figures

    def _groups(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Real and decoded frames as the discriminator's images, and their contexts; detached, float32."""
        at_least = step.num_frames - step.prediction.shape[1] if self.pad == "notebook" else 0
        real, fake = (pack(frames, self.group_frames, at_least) for frames in (step.target, step.prediction.detach()))
        context = pack_latents(step.decoded_latents.detach().float(), len(fake) // len(step.prediction))
        expected = self.seraena.discriminator.context_channels
        if context.shape[1] != expected:
            raise UserError(
                f"loss.discriminator judges frames by contexts of {expected} channels, but the latents that they are "
                f"decoded from have {context.shape[1]}: build it for this variant."
            )
        return real, fake, context

    def _finite(self, reconstruction: Tensor, latents: Tensor) -> bool:
        """Whether, on all ranks, the discriminator can learn from this micro-batch without harm to its state."""
        # Squared for a margin: the discriminator's statistics square sums of these pixels.
        finite = torch.isfinite(reconstruction.detach().square()) & torch.isfinite(latents.detach()).all()
        return not distributed.vote(int(not finite))
