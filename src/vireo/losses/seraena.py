"""Seraena: a discriminator whose gradient, brought to unit deviation, says how decoded frames should change.

Source: madebyollin/seraena (https://github.com/madebyollin/seraena), seraena.py. It is not a GAN loss. What is
minimised is the distance to fake + correction, and the correction pulls a fake's features towards those of the real
frames it was decoded for, so a discriminator that wins does no harm.

N groups of frames on each rank, equally many; C channels of a group, c of its context.
"""

import functools
import itertools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo import distributed, optimizers
from vireo.errors import UserError
from vireo.losses.replay import DTYPES, Replay
from vireo.randomness import Draws


class Correction(NamedTuple):
    """correction: (N, C, H, W), what to add to the fakes. deviation: of the gradient it comes from, over all ranks.

    feature_loss, discriminator_loss: means over this rank's groups, before and after the correction was computed; of
    the latter 1 means no discrimination and 0 a perfect one. All detached, float32.
    """

    correction: Tensor
    deviation: Tensor
    feature_loss: Tensor
    discriminator_loss: Tensor


class Seraena:
    """The discriminator, its optimizer and its memory, on one process or alike on all ranks.

    discriminator: `discriminator(images, context) -> scores`, with BatchNorm over all ranks.
    lr: of its AdamW.
    eps: floor of the deviation. While the gradient is far below it, early in training, corrections are small. The
        gradient shrinks with the number of pixels, so eps_reference_hw scales the floor as 1 / (H W), equal to eps at
        that side; None does not.
    replay: "position" keeps a group in the slot of its position in the run's global stream, modulo the length, and a
        fair draw replaces it by an old one; so nothing depends on how groups come in batches. "reference" fills slots
        in order, then overwrites random ones, and replaces the second half of all ranks' groups.
    replay_bytes, replay_length, replay_dtype: see Replay. Every rank holds the same ring.

    Everything is computed in float32, outside autocast: bfloat16 would quantise the correction, and in float16 most of
    a fresh discriminator's gradient is exactly zero.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        lr: float = 3e-4,
        eps: float = 1e-5,
        eps_reference_hw: int | None = None,
        replay: Literal["position", "reference"] = "position",
        replay_bytes: int = 512 * 2**20,
        replay_length: int = 16384,
        replay_dtype: Literal["uint8", "bfloat16", "float32"] = "uint8",
    ) -> None:
        if replay not in ("position", "reference") or replay_dtype not in DTYPES:
            raise UserError(
                "loss.replay must be position or reference, and loss.replay_dtype "
                f"{', '.join(DTYPES)}; got {replay!r} and {replay_dtype!r}."
            )
        self.discriminator = discriminator
        named = [{"name": "discriminator", "params": list(discriminator.named_parameters())}]
        self.optimizer = optimizers.adamw(named, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.eps, self.eps_reference_hw = eps, eps_reference_hw
        self.keyed = replay == "position"
        self.make_replay = functools.partial(
            Replay, dtype=replay_dtype, max_bytes=replay_bytes, max_length=replay_length
        )
        self.replay: Replay | None = None  # allocated when the first group shows its size

    def to(self, device: torch.device) -> None:
        """Move the discriminator; on several ranks all take rank 0's."""
        self.discriminator.to(device)
        distributed.broadcast(self.discriminator.state_dict().values())

    def __call__(self, real: Tensor, fake: Tensor, context: Tensor, draws: Draws) -> Correction:
        """Let the discriminator learn from the groups, then ask it for their correction.

        real, fake: (N, C, H, W), detached pixels around [0, 1]. context: (N, c, h, w). draws: of the clips that the
        groups are from, in order, so that N is a multiple of their number.
        """
        with torch.autocast(real.device.type, enabled=False), torch.enable_grad():
            real, fake, context = real.float(), fake.float(), context.float()
            loss = self._learn(real, fake, context, draws)
            return Correction(*self.correct(real, fake, context), loss)

    def correct(self, real: Tensor, fake: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The correction, its gradient's deviation, and the feature loss; changes nothing. All float32."""
        self.discriminator.eval()
        with torch.no_grad():
            wanted = self.discriminator(real, context)
        moved = fake.detach().requires_grad_()
        losses = (wanted - self.discriminator(moved, context)).square().mean(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad(losses.sum(), moved)
        deviation = distributed.var_mean(gradient)[0].sqrt()
        return -gradient / (deviation + self.floor(*fake.shape[-2:])), deviation, losses.detach().mean()

    def floor(self, height: int, width: int) -> float:
        """What is added to the deviation of a gradient on images of this size."""
        reference = self.eps_reference_hw
        return self.eps if reference is None else self.eps * reference**2 / (height * width)

    def _learn(self, real: Tensor, fake: Tensor, context: Tensor, draws: Draws) -> Tensor:
        """One update of the discriminator; returns its loss from before."""
        fakes, contexts = self._mixed(fake, context, draws)
        is_fake = draws.uniform("seraena_coin", len(real) // len(draws.positions)).flatten() < 0.5
        chosen = is_fake.view(-1, 1, 1, 1)
        self.discriminator.train()
        scores = self.discriminator(torch.where(chosen, fakes, real), torch.where(chosen, contexts, context))
        loss = F.mse_loss(scores, (2.0 * chosen - 1).expand_as(scores))
        loss.backward()
        distributed.average_gradients(list(self.discriminator.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _mixed(self, fake: Tensor, context: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Remember the new fakes of all ranks, then replace about half of this rank's by remembered ones."""
        if self.replay is None:
            self.replay = self.make_replay(fake[0], context[0])
        draws = draws.to("cpu")  # slots are chosen on the host
        number, rank, world = len(fake), distributed.rank(), distributed.world_size()
        groups = number // len(draws.positions)
        kept = [distributed.concatenate(rows) for rows in self.replay.encoded(fake, context)]
        self.replay.store(self._slots(self.replay, groups, draws), *kept)
        which = draws.integers("seraena_replay", 0, self.replay.count, groups).flatten()
        if self.keyed:
            old = draws.uniform("seraena_old", groups).flatten() < 0.5
        else:
            old = torch.arange(rank * number, (rank + 1) * number) >= -(-world * number // 2)
        old_fakes, old_contexts = self.replay.take(which)
        old = old.to(fake.device).view(-1, 1, 1, 1)
        return torch.where(old, old_fakes, fake), torch.where(old, old_contexts, context)

    def _slots(self, replay: Replay, groups: int, draws: Draws) -> list[int]:
        """Where the new groups of all ranks go, in the global order."""
        if self.keyed:
            own = [position * groups + group for position in draws.positions for group in range(groups)]
        else:
            own = draws.integers("seraena_slot", 0, len(replay), groups).flatten().tolist()
        everyone = list(itertools.chain(*distributed.gather(own)))
        if self.keyed:
            return [position % len(replay) for position in everyone]
        empty = range(replay.count, len(replay))[: len(everyone)]
        return [*empty, *everyone[len(empty) :]]

    def state_dict(self) -> dict[str, Tensor]:
        """Flat: `disc.*` under the reference's names, `optimizer.*` moments by parameter, `replay.*`."""
        parts = {"disc": self.discriminator.state_dict(), "optimizer": optimizers.moments(self.optimizer)}
        if self.replay is not None:
            parts["replay"] = self.replay.state_dict()
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises UserError if it is of another discriminator or another replay."""
        parts: dict[str, dict[str, Tensor]] = {"disc": {}, "optimizer": {}, "replay": {}}
        for key, value in state.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise UserError(f"the checkpoint's loss has {key}, which Seraena does not keep: was it another loss?")
            parts[part][name] = value
        try:
            self.discriminator.load_state_dict(parts["disc"])
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's discriminator is not loss.discriminator ({error}); init_from=<run> takes the "
                "network's weights alone"
            ) from None
        self.optimizer.state.clear()
        optimizers.load_moments(self.optimizer, parts["optimizer"])
        self.replay = None
        if parts["replay"]:
            device = next(self.discriminator.parameters()).device
            fake, context = (parts["replay"][name][0].to(device) for name in ("fakes", "contexts"))
            self.replay = self.make_replay(fake, context)
            self.replay.load_state_dict(parts["replay"])
