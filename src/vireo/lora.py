"""Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685) of any network, by peft, and its files.

A layer computes W x + scale B A x, where only A and B learn. Files are those of diffusers' pipelines: their keys begin
with the name of a pipeline's part, and so do our networks' parameters, which are called as the parts are.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vireo import json_files, tensor_files
from vireo.errors import UserError
from vireo.float8 import store_in_float8
from vireo.models.network import LORA, Network

log = logging.getLogger(__name__)

FILE = "pytorch_lora_weights.safetensors"  # what diffusers' load_lora_weights looks for in a folder
METADATA = "lora_adapter_metadata"  # the entry of the file's header in which diffusers looks for the scale
ADAPTER = "default"  # peft's name for a network's only adapter
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
WEAK = 0.25  # below this scale an update of usual size hardly moves the network


class LoRA:
    """Adds A and B, float32, to the layers that `targets` names, and freezes everything else.

    rank: columns of A^T and B. alpha: the scale is alpha / rank, with `rslora` alpha / sqrt(rank) (Kalajdzievski 2023,
        https://arxiv.org/abs/2312.03732).
    targets: ends of the names of layers ("to_q", "ff.net.2"; "to_out" is diffusers' "to_out.0"), or one regular
        expression for whole names.
    dropout: share of what A sees that is zero in training, drawn anew for each step, micro-step and process.
    dora: also learn the norms of W's rows (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
    float8: store the frozen layers beside the adapted ones, and these, in 8 bits; see `store_in_float8`.
    weights: a file or folder of an export to begin with; None begins with B = 0, which changes nothing.
    export: what a network's export is. "lora": the file with its scale in the header, as diffusers' own. "folded": the
        scale is multiplied into B, for readers that ignore headers. "merged": the whole network with the updates in it.
        None: "lora" where the network's export can be an adapter's file, else "merged".

    Raises UserError for values that make no sense and targets that name no layer.
    """

    def __init__(
        self,
        rank: int = 64,
        alpha: float = 64,
        targets: Sequence[str] | str = TARGETS,
        dropout: float = 0.0,
        dora: bool = False,
        rslora: bool = False,
        float8: bool = False,
        weights: str | None = None,
        export: Literal["lora", "folded", "merged"] | None = None,
    ) -> None:
        if rank < 1 or not 0 < alpha < math.inf or not targets or not 0 <= dropout < 1:
            raise UserError(
                "adapter: rank is at least 1, alpha above 0, dropout in [0, 1), and targets names some layers; "
                f"got rank={rank}, alpha={alpha}, dropout={dropout}, targets={targets}."
            )
        if export not in (None, "lora", "folded", "merged"):
            raise UserError(f"adapter.export is lora, folded, merged or null; got {export}.")
        self.rank, self.alpha, self.dora, self.rslora, self.float8 = rank, alpha, dora, rslora, float8
        self.targets = targets if isinstance(targets, str) else [_name(target) for target in targets]
        self.dropout, self.weights, self.form = dropout, weights, export
        if alpha / rank < WEAK:
            log.warning(
                "adapter: alpha / rank is %.3g; updates are scaled by it, and below %.2g runs are known to learn "
                "little. Set adapter.alpha to the rank, or half of it",
                alpha / rank,
                WEAK,
            )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def merges(self) -> bool:
        """Whether an export is the whole network."""
        return self.form == "merged"

    def __call__(self, network: Network) -> None:
        """Add the adapter to the network, in place. Draws A from torch's default generator, which the caller seeds."""
        from peft import LoraConfig, inject_adapter_in_model

        self._check_targets(network)
        self.form = self.form or ("lora" if network.exports_adapter else "merged")
        if not (self.merges or network.exports_adapter):
            raise UserError(f"adapter.export={self.form}: this network's export is always whole; say merged, or null.")
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=self.targets,
            lora_dropout=self.dropout,
            use_dora=self.dora,
            use_rslora=self.rslora,
            init_lora_weights=True,
        )
        inject_adapter_in_model(config, network, ADAPTER)
        for name, parameter in network.named_parameters():
            if _is_adapters(name):
                parameter.data = parameter.data.float()
        network.adapter = self
        if self.float8:
            store_in_float8(network)
        if self.weights is not None:
            self.load(network, Path(self.weights))

    def save(self, network: Network, folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
        """Write the adapter's part of the network's full state, as `export` says."""
        scale = self.scale if self.form == "folded" else 1.0
        tensors = {
            _stored(name): (value.float() * scale if ".lora_B." in name else value.float()).contiguous()
            for name, value in state.items()
            if _is_adapters(name)
        }
        about = {
            f"{part}.{key}": value
            for part in sorted({layer.partition(".")[0] for layer in layers(state)})
            for key, value in self._about(network, part).items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt", METADATA: json.dumps(about, sort_keys=True)}
        save_file(tensors, folder / FILE, metadata=header)
        return [folder / FILE]

    def load(self, network: Network, path: Path) -> None:
        """Take in what `save` wrote, here or elsewhere, so that the network computes the same whatever this scale is.

        Raises UserError for files of another rank, other layers or none.
        """
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path} holds no adapter: there is no {file}.")
        stored, metadata = tensor_files.read(file)
        about = json_files.parse(metadata.get(METADATA, "{}"), str(file))
        own = {_stored(name): value for name, value in network.state_dict().items() if _is_adapters(name)}
        odd = sorted(own.keys() ^ stored.keys()) or [n for n in own if own[n].shape != stored[n].shape]
        if odd:
            raise UserError(
                f"{file} does not fit the adapter, for instance {odd[0]}: adapter.rank={self.rank}, targets and dora "
                "must be those it was trained with."
            )
        ratio = _scale(about, self.rank) / self.scale
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(stored[name] * ratio if ".lora_B." in name else stored[name])

    def merged(self, network: Network, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's full state without the adapter and with its updates in the weights, float32 where they are."""
        whole = {n.replace(".base_layer.", "."): v for n, v in state.items() if not _is_adapters(n)}
        for layer in layers(state):
            a, b = (state[f"{layer}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
            weight = whole[f"{layer}.weight"].float()
            weight = weight + self.scale * (b.flatten(1) @ a.flatten(1)).view(weight.shape)
            if self.dora:
                norms = state[f"{layer}.lora_magnitude_vector.{ADAPTER}.weight"].float().flatten()
                rows = weight.flatten(1)
                weight = (rows * (norms / rows.norm(dim=1))[:, None]).view(weight.shape)
            whole[f"{layer}.weight"] = weight
        return whole

    def _about(self, network: Network, part: str) -> dict[str, Any]:
        """peft's settings that give this adapter back in one part of a pipeline."""
        folded = self.form == "folded"
        names = [
            layer.removeprefix(f"{part}.") for layer in layers(network.state_dict()) if layer.startswith(f"{part}.")
        ]
        return {
            "r": self.rank,
            "lora_alpha": self.rank if folded else self.alpha,
            "target_modules": names,
            "use_dora": self.dora,
            "use_rslora": self.rslora and not folded,
        }

    def _check_targets(self, network: nn.Module) -> None:
        """Raise UserError for each target that names nothing: peft only minds if all of them do."""
        names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        if isinstance(self.targets, str):
            lost = [] if any(re.fullmatch(self.targets, name) for name in names) else [self.targets]
        else:
            lost = [t for t in self.targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if lost:
            ends = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in names})
            raise UserError(
                f"adapter.targets: {', '.join(lost)} names none of the network's {len(names)} layers. They end in "
                f"{', '.join(ends[:20])}{', …' if len(ends) > 20 else ''}"
            )


def published(
    adapter_type: str = "lora",
    r: int = 64,
    lora_alpha: float = 64,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | str = TARGETS,
    weights: str | None = None,
    export: Literal["lora", "folded", "merged"] | None = None,
) -> LoRA:
    """A `LoRA` by peft's names, as published recipes spell it. Raises UserError for another adapter_type."""
    if adapter_type != "lora":
        raise UserError(f"adapter.adapter_type is lora, the only adapter that there is; got {adapter_type!r}.")
    return LoRA(r, lora_alpha, target_modules, lora_dropout, weights=weights, export=export)


def is_file(path: Path) -> bool:
    """Whether a path is an adapter's file, or a folder with one."""
    if path.is_dir():
        return (path / FILE).is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return any(_is_adapters(name) for name in tensor_files.shapes(path))


def layers(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers that have an adapter, by the names in a network's state."""
    end = f".lora_A.{ADAPTER}.weight"
    return [name.removesuffix(end) for name in state if name.endswith(end)]


def _name(target: str) -> str:
    return f"{target}.0" if target.rpartition(".")[2] == "to_out" else target


def _is_adapters(name: str) -> bool:
    return LORA in name


def _stored(name: str) -> str:
    """A parameter's name in the file: without the adapter's name, and magnitudes as peft calls them there."""
    return name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector").replace(
        f".{ADAPTER}.weight", ".weight"
    )


def _scale(about: Mapping[str, Any], rank: int) -> float:
    """The scale that a file's header says; without one, readers take alpha to be the rank."""
    found = {key.rpartition(".")[2]: value for key, value in about.items()}
    divisor = math.sqrt(rank) if found.get("use_rslora") else rank
    return float(found.get("lora_alpha", divisor)) / divisor
