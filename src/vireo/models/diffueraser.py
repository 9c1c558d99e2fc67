"""DiffuEraser: a UNet of Stable Diffusion 1.5 that fills holes in videos, told by a BrushNet what lies around them.

Two stages: UNet and BrushNet learn from single frames; then AnimateDiff's motion modules are put into the UNet and
learn alone, from clips.

Li et al. 2025 (https://arxiv.org/abs/2501.10018, https://github.com/lixiaowen-xw/DiffuEraser).

B batch, T frames, h w latent grid, L tokens, D width of the text encoder.
"""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.models import saved_networks
from vireo.models.brushnet import BrushNetModel
from vireo.models.network import Network
from vireo.models.saved_networks import Part
from vireo.models.unet_walk import walk

log = logging.getLogger(__name__)

UNET, BRUSHNET, ADAPTER = "unet_main", "brushnet", "motion_adapter"  # folders
MOTION = ".motion_modules."


class DiffuEraser(Network):
    """Predicts, from noisy latents of frames, latents of the masked frames, masks and a text, the noise (or velocity).

    released: the folder with `unet_main` and `brushnet`: the published one or an export's `finetuned-stage…`. null
        where neither is taken from it.
    base: a pipeline of Stable Diffusion 1.5, or its `unet/`; for unet_init "base".
    motion_adapter: a folder of AnimateDiff's; for motion_init "adapter". Adapters without a middle block are welcome.
    unet_init: where the spatial part of the UNet comes from: "released" or "base".
    brushnet_init: "released", or "from_unet": a copy of the UNet whose output is zero.
    motion_init: "none" for a UNet that sees single frames, "adapter", or "released" (the published fine-tuned ones).
    gradient_checkpointing: compute each layer twice in exchange for most of the activations' memory.

    All weights are float32; lower precision is autocast's affair. Raises UserError for folders that do not suit.
    """

    def __init__(
        self,
        released: str | None,
        base: str | None = None,
        motion_adapter: str | None = None,
        unet_init: Literal["released", "base"] = "released",
        brushnet_init: Literal["released", "from_unet"] = "released",
        motion_init: Literal["none", "adapter", "released"] = "none",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("unet_init", unet_init, ("released", "base")),
            ("brushnet_init", brushnet_init, ("released", "from_unet")),
            ("motion_init", motion_init, ("none", "adapter", "released")),
        ):
            if value not in known:
                raise UserError(f"model.network.{name} is one of {', '.join(known)}; got {value!r}.")
        self.gradient_checkpointing, self.motion_init = gradient_checkpointing, motion_init
        unet = _spatial(_find(released, UNET, "released") if unet_init == "released" else _find(base, "unet", "base"))
        if brushnet_init == "from_unet":
            self.brushnet = BrushNetModel.from_unet(unet)
        else:
            self.brushnet = _brushnet(_find(released, BRUSHNET, "released"))
        self.unet: Any = unet
        if motion_init == "adapter":
            part = _find(motion_adapter, ADAPTER, "motion_adapter")
            self.unet = _with_motion(unet, part.config, saved_networks.tensors(part), part.folder)
        elif motion_init == "released":
            part = _find(released, UNET, "released")
            motion = _motion(saved_networks.tensors(part))
            self.unet = _with_motion(unet, adapter_config(part.config), motion, part.folder)
        self.train()

    @property
    def moves(self) -> bool:
        """Whether the UNet has motion modules."""
        return isinstance(self.unet, UNetMotionModel)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, masked_latents: Tensor, keep: Tensor, prompt_embeds: Tensor
    ) -> Tensor:
        """The prediction, (B, 4, T, h, w).

        noisy, masked_latents: (B, 4, T, h, w). keep: (B, 1, T, h, w), 1 where a frame is kept, 0 in the hole.
        timesteps: int64 (B,), one for all frames of a clip. prompt_embeds: (B, L, D).
        """
        num_frames = noisy.shape[2]
        if self.moves and num_frames > self.unet.config.motion_max_seq_length:
            raise UserError(
                f"The motion modules know {self.unet.config.motion_max_seq_length} places in time, so a clip of "
                f"{num_frames} frames is too long: num_frames must not be more."
            )
        rows = noisy.transpose(1, 2).flatten(0, 1)  # (B * T, 4, h, w)
        condition = torch.cat([masked_latents, keep], dim=1).transpose(1, 2).flatten(0, 1).to(rows.dtype)
        given = (timesteps, prompt_embeds)
        residuals = self.brushnet(rows, *given, condition, num_frames, self.gradient_checkpointing)
        x = walk(
            self.unet,
            self.unet.conv_in(rows),
            *given,
            num_frames,
            residuals=residuals,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        prediction = self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(x)))
        return prediction.unflatten(0, (-1, num_frames)).transpose(1, 2)

    def called_in_parts(self) -> list[nn.Module]:
        return [block for net in (self.unet, self.brushnet) for block in (*net.down_blocks, *net.up_blocks)]

    def check_trained(self) -> None:
        """As for every network; and new motion modules in a UNet that no first stage has trained are warned of."""
        super().check_trained()
        if self.motion_init == "adapter" and not self.initialized:
            log.warning(
                "stage 2 starts from a UNet and a BrushNet that no stage 1 of yours has trained: say "
                "init_from=<stage 1's run or export>, or experiment=diffueraser, which trains both"
            )

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
        """`finetuned-stage1/{unet_main,brushnet}`, or, with motion modules, `finetuned-stage2/…` and `motion_adapter`.

        Either stage's folder can stand in the place of the published one.
        """
        state = self.whole(state)
        unet = saved_networks.below("unet.", state)
        written = [folder / f"finetuned-stage{2 if self.moves else 1}"]
        saved_networks.save(self.unet, unet, written[0] / UNET)
        saved_networks.save(self.brushnet, saved_networks.below("brushnet.", state), written[0] / BRUSHNET)
        if self.moves:
            with torch.device("meta"):
                adapter = MotionAdapter.from_config(adapter_config(self.unet.config))
            saved_networks.save(adapter, _motion(unet), folder / ADAPTER)
            written.append(folder / ADAPTER)
        return written

    def load(self, path: Path) -> None:
        """Take in an export, its `finetuned-stage…`, or the published folder.

        Motion modules are left out where this network has none, and stay what they are where the folder has none.
        """
        folder = _stage(path)
        part = saved_networks.find(folder, UNET, "init_from")
        state = saved_networks.tensors(part)
        if not self.moves:
            state = _without_motion(state)
        elif not _motion(state):
            state |= _motion(self.unet.state_dict())
        saved_networks.load_strictly(self.unet, state, part.folder)
        part = saved_networks.find(folder, BRUSHNET, "init_from")
        saved_networks.load_strictly(self.brushnet, saved_networks.tensors(part), part.folder)


def spatial_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a UNet2DConditionModel from its own, or from that of a UNetMotionModel around one."""
    if "down_block_types" not in config or not any("Motion" in kind for kind in config["down_block_types"]):
        return dict(config)
    blocks = ("down_block_types", "up_block_types")
    renamed = {name: [kind.replace("Motion", "2D") for kind in config[name]] for name in blocks}
    left_out = ("_class_name", "mid_block_type", "num_attention_heads")
    rest = {name: value for name, value in config.items() if name not in left_out}
    # Stable Diffusion 1.5 calls the number of heads attention_head_dim.
    return {**rest, **renamed, "attention_head_dim": config["num_attention_heads"]}


def motion_config(unet: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the UNetMotionModel that a UNet2DConditionModel and a MotionAdapter make, from theirs."""
    blocks = ("down_block_types", "up_block_types")
    return {
        **{name: value for name, value in unet.items() if name != "_class_name"},
        **{name: [kind.replace("2D", "Motion") for kind in unet[name]] for name in blocks},
        "num_attention_heads": unet["attention_head_dim"],
        "temporal_transformer_layers_per_block": adapter["motion_transformer_layers_per_block"],
        "temporal_transformer_layers_per_mid_block": adapter["motion_transformer_layers_per_mid_block"],
        "motion_num_attention_heads": adapter["motion_num_attention_heads"],
        "motion_max_seq_length": adapter["motion_max_seq_length"],
        "use_motion_mid_block": adapter["use_motion_mid_block"],
    }


def adapter_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the MotionAdapter that is inside a UNetMotionModel."""
    return {
        "block_out_channels": config["block_out_channels"],
        "motion_layers_per_block": config["layers_per_block"],
        "motion_transformer_layers_per_block": config.get("temporal_transformer_layers_per_block", 1),
        "motion_transformer_layers_per_mid_block": config.get("temporal_transformer_layers_per_mid_block", 1),
        "motion_num_attention_heads": config["motion_num_attention_heads"],
        "motion_norm_num_groups": config["norm_num_groups"],
        "motion_max_seq_length": config["motion_max_seq_length"],
        "use_motion_mid_block": config["use_motion_mid_block"],
    }


def _find(path: str | None, name: str, key: str) -> Part:
    if path is None:
        raise UserError(f"model.network.{key} must name a folder with {name}: it was chosen as a start, and is null.")
    part = saved_networks.find(path, name, f"model.network.{key}")
    log.info("%s from %s", name, part.folder)
    return part


def _stage(path: Path) -> Path:
    """The folder with `unet_main` and `brushnet`: the path, or the last stage in it."""
    for folder in (path, *sorted(path.glob("finetuned-stage*"), reverse=True)):
        if (folder / UNET).is_dir() and (folder / BRUSHNET).is_dir():
            return folder
    raise UserError(
        f"init_from={path} has no {UNET}/ and {BRUSHNET}/, nor has a finetuned-stage… folder in it. Name an export of "
        "this recipe or the published folder."
    )


def _motion(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if MOTION in name}


def _without_motion(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if MOTION not in name}


def _spatial(part: Part) -> Any:
    """The 2D UNet of a folder; of a motion UNet what is left without its motion modules."""
    _check_class(part, "UNet2DConditionModel", "UNetMotionModel")
    state = _without_motion(saved_networks.tensors(part))
    return _filled(_empty(UNet2DConditionModel, spatial_config(part.config)), state, part.folder)


def _brushnet(part: Part) -> Any:
    _check_class(part, "BrushNetModel")
    return _filled(_empty(BrushNetModel, part.config), saved_networks.tensors(part), part.folder)


def _with_motion(unet: Any, config: Mapping[str, Any], motion: Mapping[str, Tensor], source: Path) -> Any:
    """A UNetMotionModel of a 2D UNet's weights and a MotionAdapter's."""
    made = _empty(UNetMotionModel, motion_config(unet.config, _empty(MotionAdapter, config).config))
    return _filled(made, {**unet.state_dict(), **motion}, source)


def _check_class(part: Part, *kinds: str) -> None:
    if part.config.get("_class_name") not in kinds:
        raise UserError(f"{part.folder} holds a {part.config.get('_class_name')}; expected a {' or a '.join(kinds)}.")


def _empty(kind: Any, config: Mapping[str, Any]) -> Any:
    """A network without memory for weights; what only other loaders know of its config is left out."""
    known = inspect.signature(kind.__init__).parameters
    with torch.device("meta"):
        return kind.from_config({name: value for name, value in config.items() if name in known})


def _filled(network: Any, state: Mapping[str, Tensor], source: Path) -> Any:
    """The network with these weights, float32; strictly."""
    floats = {name: value.float() for name, value in state.items()}
    saved_networks.load_strictly(network, floats, source, assign=True)
    return network
