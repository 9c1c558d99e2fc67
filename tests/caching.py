"""A recipe of a few numbers whose encodings can be cached: pictures in files, an instruction, the next picture."""

import functools
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.toys import ToyNetwork
from vireo.cache import Cache
from vireo.data.source import Source, check_content, identify
from vireo.digests import file_digest, file_digests
from vireo.losses.objective import Loss, Objective
from vireo.models.encoders import Encoder
from vireo.pixels import to_pixels
from vireo.randomness import Draws
from vireo.sampling.sampler import Sampler
from vireo.video_io import BadVideoError

SIDE = 8


def write_pictures(root: Path, rows: int = 5, frames: int = 4) -> Path:
    """`<row>_<frame>.raw`: uint8 (3, SIDE, SIDE), the last frame of a row is its target."""
    root.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for row in range(rows):
        for frame in range(frames):
            write_picture(root / f"{row}_{frame}.raw", int(torch.randint(0, 200, (), generator=generator)))
    return root


def write_picture(path: Path, level: int) -> None:
    values = (torch.arange(3 * SIDE * SIDE) + level) % 256
    path.write_bytes(bytes(values.tolist()))
    os.utime(path, (1_600_000_000, 1_600_000_000))  # so that it is remembered


class Pictures:
    """Rows of a folder. A sample is {"frames": [Source] * N, "target": Source, "prompt": str, "name": str}."""

    max_bad_fraction = 0.5

    def __init__(self, root: str, side: int = SIDE, split: str = "train", flip: bool = False) -> None:
        self.root, self.side, self.flip = Path(root), side, flip
        files = sorted(self.root.glob("*.raw"))
        rows = sorted({file.name.split("_")[0] for file in files})
        held_out = rows[-2:]
        self.rows = [
            [file for file in files if file.name.split("_")[0] == row]
            for row in rows
            if (row in held_out) == (split == "validation")
        ]
        self.digests = file_digests(files)
        self.decoded: list[str] = []

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, draws: Draws) -> dict:
        *frames, target = [self.source(file) for file in self.rows[index]]
        return {"frames": frames, "target": target, "prompt": f"move {index % 2}", "name": f"row {index}"}

    def sources(self, index: int) -> dict:
        self.digests |= file_digests(self.rows[index])
        *frames, target = [self.source(file) for file in self.rows[index]]
        return {"frames": frames, "target": [target], "prompt": [f"move {index % 2}"]}

    def describe(self) -> dict:
        return {"rows": len(self)}

    def source(self, file: Path) -> Source:
        identity = identify(self.digests[str(file)], decoder="raw 1", side=self.side, flip=self.flip)
        return Source(identity, functools.partial(self.checked, identity, file), file.name)

    def checked(self, identity: str, file: Path) -> Tensor:
        check_content(identity, file, file.read_bytes())
        return self.decode(file)

    def decode(self, file: Path) -> Tensor:
        self.decoded.append(file.name)
        data = file.read_bytes()
        if len(data) != 3 * SIDE * SIDE:
            raise BadVideoError(file, "is cut off")
        frame = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(3, SIDE, SIDE)[:, : self.side, : self.side]
        return (frame.flip(-1) if self.flip else frame).clone()


class Latents(Encoder):
    """Moments of pictures by a convolution, embeddings of texts by their letters."""

    outputs = {
        "frame_moments": "frames",
        "target_moments": "target",
        "prompt_embeds": "prompt",
        "null_prompt_embeds": '""',
    }
    parts = ("loaded",)

    def __init__(self, weights: str | None = None, scale: float = 1.0) -> None:
        self.weights, self.scale = weights, scale
        self.loads = 0
        self.encoded: list[tuple[str, int]] = []  # outputs and how many at once

    def identity(self, output: str) -> str:
        if output.endswith("prompt_embeds"):
            return "letters"
        weights = file_digest(self.weights) if self.weights else "built in"
        return json.dumps({"weights": weights, "scale": self.scale})

    @functools.cached_property
    def loaded(self) -> nn.Module:
        self.loads += 1
        network = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        generator = torch.Generator().manual_seed(len(Path(self.weights).read_bytes()) if self.weights else 0)
        for parameter in network.parameters():
            parameter.data = self.scale * torch.randn(parameter.shape, generator=generator)
        return network

    @torch.no_grad()
    def encode(self, output: str, values: Tensor | list[str]) -> Tensor:
        self.encoded.append((output, len(values)))
        if not isinstance(values, Tensor):
            codes = [[float(len(text)), float(sum(text.encode()))] for text in values]
            _ = self.loaded
            return torch.tensor(codes)[:, None]
        folded = values.flatten(0, -4) if values.ndim > 3 else values
        return self.loaded(to_pixels(folded)).unflatten(0, values.shape[:-3])

    def condition(self, batch: dict, draws: Draws) -> dict:
        mean, log_variance = batch["target_moments"].chunk(2, dim=1)
        noise = draws.normal("posterior", *mean.shape[1:])
        return {**batch, "latents": mean + torch.exp(0.5 * log_variance) * noise}


class NeverLoaded(Latents):
    """Whose weights must not be touched."""

    @functools.cached_property
    def loaded(self) -> nn.Module:
        raise AssertionError("weights were loaded")


def cache_of(encoder: Encoder, folder: Path, memory: int = 2**20) -> Cache:
    return Cache.of(encoder, folder, memory)


class LatentNetwork(ToyNetwork):
    """(B, N, 4, h, w) of conditions -> (B, 4, h, w): a convolution of their mean."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.first = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, conditions: Tensor) -> Tensor:
        return self.first(conditions.mean(dim=1))


class NextLatents(Loss):
    """Squared error of the next picture's latents; a null prompt's embedding shifts it, so that it matters."""

    def __call__(self, network: nn.Module, batch: dict, draws: Draws) -> Objective:
        prompt = batch["prompt_embeds"] - batch["null_prompt_embeds"]
        prediction = network(batch["frame_moments"]) + 1e-3 * prompt.mean(dim=(1, 2))[:, None, None, None]
        error = (prediction - batch["latents"]).square().mean()
        return Objective(error, {"mse": error.detach()})


class NextPicture(Sampler):
    """Sampler: shows the true picture, for which the batch needs its pixels."""

    def __call__(self, network: nn.Module, encoder: object, batch: dict, draws: Draws) -> dict[str, Tensor]:
        target = to_pixels(batch["target"], low=0.0)[:, None]
        shade = network(batch["frame_moments"]).sigmoid().mean(dim=(1, 2, 3))[:, None, None, None, None]
        return {"target": target, "prediction": shade.expand_as(target)}

    def baselines(self, batch: dict) -> dict[str, Tensor]:
        return {"copy last": to_pixels(batch["frames"][:, -1:], low=0.0)}
