"""CogVideoX as a network that learns: diffusers' transformer, fed as its inference pipelines feed it.

2B, 5B, 5B-I2V, 1.5-5B and 1.5-5B-I2V (Yang et al. 2024, https://arxiv.org/abs/2408.06072) differ in what their
config.json says, and in nothing else: `in_channels` (twice as many where a picture is a condition), `patch_size_t`,
`use_rotary_positional_embeddings`, `use_learned_positional_embeddings`, `ofs_embed_dim`.

B batch, C latent channels, t h w latent grid, L tokens, D width of the text encoder.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vireo import lora
from vireo.errors import UserError
from vireo.models import saved_networks
from vireo.models.network import Network
from vireo.models.transformer_blocks import checkpoint_every, compile_each

POSITIONS = "patch_embed.pos_embedding"  # 5B-I2V's table
OFS = 2.0  # what 1.5's picture models were trained with, https://github.com/zai-org/CogVideo


class CogVideoX(Network):
    """Predicts velocities of noisy video latents from a text and, if its channels say so, from the first picture.

    transformer: a pipeline's folder or its `transformer/`, as diffusers saves it.
    dtype: of the weights as they are loaded and exported; what learns is float32 in between (`FreezePolicy`). Half of
        it computes under autocast: the caller's, or else its own dtype.
    compat: positions of rotary embeddings. "pipeline": as diffusers' pipelines have them, so that what is trained at
        any size is what is sampled. "upstream": whole numbers, as the published trainer has them for all models; at the
        native size both agree.
    gradient_checkpointing: 0: off; 1: every block is computed again in the backward pass; k: every k-th block.
    compile: whether torch.compile makes kernels for a block, which serve all of them.
    learned_positions: False takes away the table of positions that 5B-I2V has for one size alone, and leaves its rotary
        embeddings: then it takes any size, but begins worse. The exported config says so, and pipelines follow it.

    Raises UserError for folders that do not suit.
    """

    exports_adapter = True
    positions_removed = False

    def __init__(
        self,
        transformer: str,
        dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
        compat: Literal["pipeline", "upstream"] = "pipeline",
        gradient_checkpointing: int = 1,
        compile: bool = False,
        learned_positions: bool = True,
    ) -> None:
        super().__init__()
        if dtype not in saved_networks.DTYPES or compat not in ("pipeline", "upstream") or gradient_checkpointing < 0:
            raise UserError(
                f"model.network: dtype is one of {', '.join(saved_networks.DTYPES)}, compat pipeline or upstream, "
                f"gradient_checkpointing 0 or more; got {dtype}, {compat} and {gradient_checkpointing}."
            )
        self.dtype, self.compat = saved_networks.DTYPES[dtype], compat
        self.transformer: Any = _load(transformer, "model.network.transformer", self.dtype)
        if not learned_positions and self.transformer.config.use_learned_positional_embeddings:
            _remove_learned_positions(self.transformer)
            self.positions_removed = True
        self.config = self.transformer.config
        self.rotary_tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        if gradient_checkpointing:
            checkpoint_every(gradient_checkpointing, self.transformer, self.transformer.transformer_blocks)
        if compile:
            compile_each(self.transformer.transformer_blocks)
        self.train()

    def forward(
        self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, image_latents: Tensor | None = None
    ) -> Tensor:
        """The predicted velocity, (B, C, t, h, w).

        noisy: (B, C, t, h, w), where t is a multiple of `patch_size_t`. timesteps: int64 (B,). prompt_embeds:
        (B, L, D). image_latents: (B, C, 1, h, w), scaled, for the first of the t frames; the network sees zeros at the
        others. Raises UserError for shapes that do not fit the checkpoint.
        """
        frames = self._with_image(noisy, image_latents).transpose(1, 2)  # (B, t, C or 2 C, h, w)
        self._check(frames, prompt_embeds)
        kind = noisy.device.type
        as_called = self.dtype == torch.float32 or torch.is_autocast_enabled(kind)
        with nullcontext() if as_called else torch.autocast(kind, self.dtype):
            prediction = self.transformer(
                hidden_states=frames,
                encoder_hidden_states=prompt_embeds,
                timestep=timesteps,
                ofs=None if self.config.ofs_embed_dim is None else noisy.new_full((1,), OFS),
                image_rotary_emb=self._rotary(frames) if self.config.use_rotary_positional_embeddings else None,
                return_dict=False,
            )[0]
        return prediction.transpose(1, 2)

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
        """A folder `transformer` as diffusers saves it, or, where an adapter learns, what the adapter writes."""
        if self.adapter is not None and not self.adapter.merges:
            if self.positions_removed:
                raise UserError(
                    "a LoRA's file cannot say that its base has lost its learnt positions, and a pipeline would keep "
                    "them: with model.network.learned_positions=false set adapter.export=merged."
                )
            return self.adapter.save(self, folder, state)
        own = saved_networks.below("transformer.", self.whole(state))
        saved_networks.save(self.transformer, {n: v.to(self.dtype) for n, v in own.items()}, folder / "transformer")
        return [folder / "transformer"]

    def load(self, path: Path) -> None:
        """Take in a pipeline's folder, its `transformer/`, or, where an adapter learns, the adapter's file."""
        if lora.is_file(path):
            if self.adapter is None:
                raise UserError(f"{path} is a LoRA: say adapter=lora, with its adapter.rank and targets.")
            self.adapter.load(self, path)
            return
        part = saved_networks.find(path, "transformer", "init_from")
        own = {name.replace(".base_layer.", "."): value for name, value in self.transformer.state_dict().items()}
        stored = saved_networks.tensors(part)
        own = {name: value for name, value in own.items() if ".lora_" not in name}
        if self.positions_removed:
            stored.pop(POSITIONS, None)
        odd = sorted(own.keys() ^ stored.keys()) or [n for n in own if own[n].shape != stored[n].shape]
        if odd:
            raise UserError(f"{part.folder} does not fit this network, for instance {odd[0]}: is it another model?")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(stored[name])

    def _with_image(self, noisy: Tensor, image_latents: Tensor | None) -> Tensor:
        """(B, C, t, h, w), or (B, 2 C, t, h, w) for networks that see a picture."""
        takes_image = self.config.in_channels == 2 * self.config.out_channels
        if takes_image != (image_latents is not None):
            has = "takes a picture" if takes_image else "takes no picture"
            raise UserError(
                f"This transformer {has} (in_channels={self.config.in_channels}), so model.inputs must "
                f"{'have' if takes_image else 'not have'} image_latents: choose another model option or other weights."
            )
        if image_latents is None:
            return noisy
        zeros = torch.zeros_like(noisy[:, :, 1:])
        return torch.cat([noisy, torch.cat([image_latents.to(noisy.dtype), zeros], dim=2)], dim=1)

    def _check(self, frames: Tensor, prompt_embeds: Tensor) -> None:
        config = self.config
        if prompt_embeds.shape[1] != config.max_text_seq_length:
            # There is no mask: padding is attended to, so another length is another input, or fits no position table.
            raise UserError(
                f"The transformer reads {config.max_text_seq_length} text tokens, padding included, and was given "
                f"{prompt_embeds.shape[1]}: model.encoder must pad to exactly that length."
            )
        if frames.shape[1] % (config.patch_size_t or 1):
            raise UserError(f"{frames.shape[1]} latent frames are no multiple of patch_size_t={config.patch_size_t}.")
        height, width = frames.shape[-2:]
        native = (config.sample_height, config.sample_width)
        if config.use_learned_positional_embeddings and (height, width) != native:
            raise UserError(
                f"This transformer has a learnt table of positions for {native[0] * 8}x{native[1] * 8} pixels and no "
                f"other size; got {height * 8}x{width * 8}. Set height and width to it, or "
                "model.network.learned_positions=false."
            )

    def _rotary(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of this size, float32 (tokens, head width), made once and kept on the device."""
        p, p_t = self.config.patch_size, self.config.patch_size_t or 1
        grid = (frames.shape[1] // p_t, frames.shape[3] // p, frames.shape[4] // p)
        if (key := (*grid, frames.device)) not in self.rotary_tables:
            fitted = self.config.patch_size_t is None and self.compat == "pipeline"
            base = (self.config.sample_height // p, self.config.sample_width // p) if fitted else None
            self.rotary_tables[key] = rotary_table(self.config.attention_head_dim, grid, base, frames.device)
        return self.rotary_tables[key]


def rotary_table(
    head_dim: int, grid: tuple[int, int, int], base: tuple[int, int] | None, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings for video tokens, float32 (t h w, head_dim) each.

    grid: tokens along time, height and width. base: None, for positions 0, 1, 2, … (CogVideoX 1.5), or the height and
    width in tokens that the model was trained at, into which the grid's height and width are fitted (1.0).
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid
    options: Any = (
        {"crops_coords": None, "grid_type": "slice", "max_size": (height, width)}
        if base is None
        else {"crops_coords": fitted_region((height, width), base)}
    )
    tables: Any = get_3d_rotary_pos_embed(head_dim, grid_size=grid[1:], temporal_size=frames, device=device, **options)
    return tables


def fitted_region(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The box (top, left), (bottom, right) that a grid (height, width) fills in `base` when it keeps its shape.

    As tall or as wide as the base, and in the middle; rounded as diffusers' pipelines round.
    """
    (height, width), (most_height, most_width) = grid, base
    if height / width > most_height / most_width:
        box = (most_height, round(most_height / height * width))
    else:
        box = (round(most_width / width * height), most_width)
    top, left = round((most_height - box[0]) / 2.0), round((most_width - box[1]) / 2.0)
    return (top, left), (top + box[0], left + box[1])


def _remove_learned_positions(transformer: Any) -> None:
    """As if the checkpoint had never had any, in place."""
    del transformer.patch_embed.pos_embedding
    transformer.patch_embed.use_learned_positional_embeddings = False
    transformer.register_to_config(use_learned_positional_embeddings=False)


def _load(path: str, key: str, dtype: torch.dtype) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    part = saved_networks.find(path, "transformer", key)
    if part.config.get("_class_name") != "CogVideoXTransformer3DModel":
        raise UserError(
            f"{part.folder} holds a {part.config.get('_class_name')}, not a CogVideoXTransformer3DModel. Set {key} to "
            "the folder of a CogVideoX pipeline."
        )
    return saved_networks.load(part, CogVideoXTransformer3DModel, dtype)
