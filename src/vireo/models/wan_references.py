"""Wan with reference images: a subject's picture steers a text-to-video model through dual-path cross-attention.

Around diffusers' WanTransformer3DModel (Wan 2.1, https://github.com/Wan-Video/Wan2.1), which is only called: its blocks
get processors (`wan_attention`), and every block's cross-attention a second path. The published recipe is
https://github.com/Edmund-a7/longlive_modify (branch feature/multi-reference-image), on LongLive
(https://github.com/NVlabs/LongLive), whose frames see only those before them.

B batch, C latent channels, t h w latent grid, N references, L CLIP tokens of one, D width.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vireo import lora, tensor_files
from vireo.errors import UserError
from vireo.models import wan_attention, wan_weights
from vireo.models.network import LORA, Network
from vireo.models.saved_networks import DTYPES
from vireo.models.wan_attention import CausalPositions, CausalSelfAttention, Context, DualCrossAttention, KeyValueCache

CLIP_WIDTH = 1280  # of ViT-H/14's tokens
NEW = ("clip_proj.", "vae_proj.", ".k_vae.", ".v_vae.", ".norm_k_vae.", ".clip_gate")
ADAPTER = "references.safetensors"
PUBLISHED = "model.pt"
Init = Literal["identity", "published"]


class Projection(nn.Module):
    """Tokens of the references to the transformer's width: (…, width) to (…, D).

    positions: add to tokens on a grid, (…, h, w, width), where they are in it, times a factor that begins at zero.
    """

    def __init__(self, width: int, out: int, positions: bool = False) -> None:
        super().__init__()
        self.position_scale = nn.Parameter(torch.zeros(1)) if positions else None
        gelu = nn.GELU(approximate="tanh")
        self.proj = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, out), gelu, nn.Linear(out, out), nn.LayerNorm(out)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        projected = self.proj(tokens)
        if self.position_scale is None:
            return projected
        return projected + self.position_scale * grid_positions(*projected.shape[-3:]).to(projected)


def grid_positions(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of rows and columns, float32 (height, width, channels); channels are a multiple of 4.

    Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), a half of the channels for each axis.
    """
    rates = 10000 ** -(torch.arange(channels // 4) / (channels // 4))
    axes = [torch.arange(size)[:, None] * rates for size in (height, width)]
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=-1) for angles in axes)
    grid = (height, width, channels // 2)
    return torch.cat([rows[:, None].expand(grid), columns[None].expand(grid)], dim=-1)


class WanReferences(Network):
    """Predicts the flow of noisy latents from a text and reference images.

    transformer: folder of a diffusers pipeline of Wan 2.1 text-to-video, or its `transformer/`.
    generator: a file with the base weights in Wan's own names that take the place of the folder's: LongLive's
        `longlive_base.pt`, a native Wan `.safetensors`. generator_key: what they are called in a file that holds
        several ("generator_ema"); None takes generator, generator_ema or model, the first of these that there is.
    generator_lora: LongLive's LoRA, merged into them; lora_alpha: of it. See `wan_weights`.
    mode: "bidirectional", every frame sees every other, as Wan; "causal", groups of `group_frames` latent frames see
        themselves and those before, as LongLive, of which `window_frames` in all, the first `sink_frames` counted in
        (null: all). For training and for roll-outs alike.
    init: "identity", the output is the base's until something was learnt: gates and values of latents begin at zero,
        the projections' last linear layers at a thousandth of Xavier's size.
        "published" has gates of 1, which stay, and projections whose last linear layer is zero: it disturbs the base.
    clip_dim: width of the CLIP tokens.
    vae_pos_embed: tell tokens of the references' latents where in the picture they are; as published they are a bag.
    dtype: of the weights as they are loaded; what learns is float32 (`FreezePolicy`), and a network in half precision
        computes under autocast in it.
    export_layout: what `export` writes: "adapter", what is not the base's, or "published", {"generator": everything}.
    gradient_checkpointing: compute the blocks twice in exchange for most of their activations' memory.

    Raises UserError for weights that do not suit.
    """

    exports_adapter = True

    def __init__(
        self,
        transformer: str,
        generator: str | None = None,
        generator_key: str | None = None,
        generator_lora: str | None = None,
        lora_alpha: float = 256,
        mode: Literal["bidirectional", "causal"] = "bidirectional",
        group_frames: int = 3,
        window_frames: int | None = 12,
        sink_frames: int = 3,
        init: Init = "identity",
        clip_dim: int = CLIP_WIDTH,
        vae_pos_embed: bool = False,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        export_layout: Literal["adapter", "published"] = "adapter",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        known = {"mode": ("bidirectional", "causal"), "export_layout": ("adapter", "published"), "dtype": DTYPES}
        for key, value in (("mode", mode), ("export_layout", export_layout), ("dtype", dtype)):
            if value not in known[key]:
                raise UserError(f"model.network.{key} is one of {', '.join(known[key])}, got {value!r}.")
        self.export_layout, self.dtype = export_layout, DTYPES[dtype]
        self._source = (transformer, generator, generator_key, generator_lora, lora_alpha, self.dtype)
        self._frames = (group_frames, window_frames, sink_frames) if mode == "causal" else None
        self.transformer, self.clip_proj, self.vae_proj = self._start(clip_dim, vae_pos_embed)
        self._seen: Tensor | None = None
        self._replaced: set[str] = set()  # parameters of the base that are not its files' any more
        self._beginning: Callable[[], Mapping[str, Tensor]] = dict
        initialize(self, init)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.train()

    def _start(self, clip_dim: int, vae_pos_embed: bool) -> tuple[Any, Projection, Projection]:
        transformer = wan_weights.load_transformer(*self._source)
        projections = add_references(transformer, clip_dim, vae_pos_embed)
        if self._frames is not None:
            make_causal(transformer, *self._frames)
        return transformer, *projections

    def base(self) -> Any:
        """The transformer that training began with, loaded anew; without references it is the base.

        What `init_from` brought in place of the base's parameters is part of it.
        """
        transformer = self._start(CLIP_WIDTH, vae_pos_embed=False)[0]
        if self.initialized:
            begun = {_inner(name): value for name, value in self._beginning().items()}
            transformer.load_state_dict({n: begun[n] for n in self._replaced & begun.keys()}, strict=False)
        return transformer.to(self.transformer.device).eval().requires_grad_(False)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        reference_clip: Tensor | None = None,
        reference_latents: Tensor | None = None,
        reference_mask: Tensor | None = None,
        reference_scale: float = 1.0,
        cache: KeyValueCache | None = None,
        keep: bool = False,
    ) -> Tensor:
        """The prediction, (B, C, t, h, w).

        noisy: (B, C, t, h, w). timesteps: 1000 sigma, (B,) or, one for each latent frame, (B, t).
        prompt_embeds: (B, tokens, text width), zero beyond the text's end.
        reference_clip: (B, N, L, clip_dim). reference_latents: (B, C, N, h', w'), normalised as the video's. Either may
        be missing. reference_mask: bool (B, N), false for padding; a row of nothing else is the base's.
        reference_scale: factor of what the references add, for sampling.
        cache: of a roll-out; `noisy` are then the frames after those that it knows. keep: put these frames into it.
        """
        self._check(noisy, timesteps, cache)
        clip, latents = reference_clip, reference_latents
        if cache is not None and cache.context:
            clip = latents = None  # their keys are known
        patch, half = self.transformer.config.patch_size, self.dtype != torch.float32
        seen: list[Tensor] = []
        with torch.autocast(noisy.device.type, self.dtype) if half else nullcontext():
            context = Context(
                clip=None if clip is None else self.clip_proj(clip.flatten(1, 2)),  # (B, N L, D)
                latents=None if latents is None else self.vae_proj(latents.movedim(1, -1)).flatten(1, 3),
                present=reference_mask,
                scale=reference_scale,
                frame_tokens=(noisy.shape[-2] // patch[1]) * (noisy.shape[-1] // patch[2]),
                cache=cache,
                seen=seen if self.training else None,
            )
            with self._rolling(cache, keep):
                prediction = self.transformer(noisy, timesteps, prompt_embeds, context, return_dict=False)[0]
        if seen:
            self._seen = torch.stack(seen).mean(dim=0)
        return prediction

    def figures(self) -> dict[str, Tensor]:
        """clip_gate: mean of |gate| over the blocks; vae_over_fused: of the size of what latents add, in proportion."""
        return {} if self._seen is None else dict(zip(("clip_gate", "vae_over_fused"), self._seen, strict=True))

    def begin_with(self, names: Collection[str], read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Note which of the base's parameters are no longer those of its files: exports have them too."""
        self._replaced |= {_inner(name) for name in names if LORA not in name and not is_new(_inner(name))}
        self._beginning = read

    def constants(self) -> set[str]:
        """Gates, where all are 1: they are the published formula then, in which there is nothing to learn."""
        gates = {name: parameter for name, parameter in self.named_parameters() if name.endswith("clip_gate")}
        return set(gates) if all(bool(gate == 1) for gate in gates.values()) else set()

    def check_trained(self) -> None:
        """As for every network; and of references that have no effect yet something has to learn."""
        super().check_trained()
        new = [(name, p) for name, p in self.named_parameters() if is_new(name.removeprefix("transformer."))]
        if not any(p.requires_grad or (".v_vae." in name and p.any()) for name, p in new):
            raise UserError(
                "freeze_policy: references begin with no effect (v_vae is 0) and nothing of their modules learns. "
                "Choose freeze-policy=new_modules, with a LoRA new_modules_adapter, or start from trained ones with "
                "init_from."
            )

    @contextmanager
    def _rolling(self, cache: KeyValueCache | None, keep: bool) -> Iterator[None]:
        """Let the positions know of the cache, if there is one, for the length of a forward."""
        if cache is None:
            yield
            return
        positions = self.transformer.rope
        positions.cache, positions.keep = cache, keep
        try:
            yield
        finally:
            positions.cache, positions.keep = None, False

    def _check(self, noisy: Tensor, timesteps: Tensor, cache: KeyValueCache | None) -> None:
        frames = noisy.shape[2]
        if self._frames is None:
            if cache is not None:
                raise UserError(
                    "A roll-out needs frames that see only those before them: set model.network.mode=causal, and take "
                    "weights that were trained so (LongLive's), or sample with model=opens2v_wan."
                )
        elif frames % self._frames[0]:
            raise UserError(
                f"{frames} latent frames cannot be cut into groups of model.network.group_frames={self._frames[0]}."
            )
        if timesteps.ndim == 2 and timesteps.shape[1] != frames:
            raise UserError(f"{timesteps.shape[1]} timesteps for {frames} latent frames: one for each is expected.")

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
        """`references.safetensors`: the new modules and whatever else is not the base's, since it was trained, here or
        before (`init_from`); named as in the transformer.

        Beside it a LoRA's own file; with `adapter.export=merged` its layers are in `references.safetensors`.
        In the published layout `model.pt`, {"generator": …} with Wan's own names and everything in it, LoRA merged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        learns = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        beside: list[Path] = []
        if self.adapter is not None and (self.adapter.merges or self.export_layout == "published"):
            whole = dict(self.whole(state))
        else:
            whole = {_layers(name): value for name, value in state.items() if LORA not in name}
            learns = [name for name in learns if LORA not in name]
            if self.adapter is not None:
                beside = self.adapter.save(self, folder, state)
        inner = {_inner(name): value.contiguous() for name, value in whole.items()}
        if self.export_layout == "published":
            return [wan_weights.save_published(folder / PUBLISHED, inner)]
        changed = self._replaced | {_inner(name) for name in learns}
        chosen = {name: value for name, value in inner.items() if is_new(name) or name in changed}
        save_file(chosen, folder / ADAPTER, metadata={"format": "pt"})
        return [folder / ADAPTER, *beside]

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take in an export, of either layout, or a checkpoint of the published recipe: a file or the folder with it.

        All new modules must be there; of the base what is there, all of it or what was trained. A published checkpoint
        knows no gates: they are 1 then, which is its formula, and stay. A LoRA beside them is taken in where there is
        an adapter.
        """
        source = (
            path if path.is_file() else next((path / n for n in (ADAPTER, PUBLISHED) if (path / n).is_file()), path)
        )
        found = wan_weights.read(source)
        own = {_inner(name): v for name, v in self.state_dict().items() if LORA not in name}
        gates = {name for name in own if name.endswith("clip_gate")}
        if not gates & found.keys():
            found |= {name: torch.ones_like(own[name]) for name in gates}
        needed = own.keys() if source.suffix in tensor_files.PICKLED else {name for name in own if is_new(name)}
        wan_weights.compare(found, own, needed, source)
        others = {n for n, value in found.items() if not torch.equal(own[n].float(), value.to(own[n].dtype).float())}
        self.begin_with(others, partial(wan_weights.read, source))
        for name, value in found.items():
            own[name].copy_(value)
        if (path / lora.FILE).is_file():
            if self.adapter is None:
                raise UserError(
                    f"{path} has a LoRA as well: say adapter=lora, with the adapter.rank and targets of its training."
                )
            self.adapter.load(self, path)


# ---------------------------------------------------------------------------------------------------------------------
# What a Wan transformer gets


def is_new(name: str) -> bool:
    """Whether a parameter is one of a reference's modules and not of Wan."""
    return any(part in f".{name}" if part[0] == "." else name.startswith(part) for part in NEW)


def add_references(
    transformer: Any, clip_dim: int = CLIP_WIDTH, vae_pos_embed: bool = False
) -> tuple[Projection, Projection]:
    """Give every block of a WanTransformer3DModel its second path, in place; returns clip_proj and vae_proj.

    The transformer then takes a `Context` as encoder_hidden_states_image, with its text left out. Called as ever, it
    computes what it did. Raises UserError for an image-to-video transformer, which has image tokens of its own.
    """
    config = transformer.config
    if config.added_kv_proj_dim is not None or config.image_dim is not None:
        raise UserError(
            "model.network.transformer is an image-to-video model, with image tokens of its own (image_dim, "
            "added_kv_proj_dim). Use a text-to-video one, such as Wan2.1-T2V-1.3B-Diffusers."
        )
    for number, block in enumerate(transformer.blocks):
        wan_attention.add_modules(block.attn2)
        block.attn2.set_processor(DualCrossAttention(number))
    embedder = transformer.condition_embedder
    embedder.image_embedder = nn.Identity()  # lets the context through
    embedder.register_forward_hook(_with_text)
    width = config.num_attention_heads * config.attention_head_dim
    with transformer.proj_out.weight.device:
        return Projection(clip_dim, width), Projection(config.in_channels, width, vae_pos_embed)


def make_causal(transformer: Any, group: int, window: int | None, sink: int) -> None:
    """Let groups of latent frames see only themselves and what is before them, in place; see `CausalPositions`."""
    if group < 1 or sink < 0 or (window is not None and window < sink + group):
        raise UserError(
            "model.network wants group_frames >= 1 and window_frames (null for all) of at least sink_frames + "
            f"group_frames; got {group}, {window} and sink_frames={sink}."
        )
    if transformer.config.patch_size[0] != 1:
        raise UserError(
            f"causal frames need patches of one frame, this transformer's are {transformer.config.patch_size}"
        )
    transformer.rope = CausalPositions(transformer.rope, group, window, sink)
    for number, block in enumerate(transformer.blocks):
        block.attn1.set_processor(CausalSelfAttention(number))


@torch.no_grad()
def initialize(network: nn.Module, init: Init) -> None:
    """Initial values of the new modules of a `WanReferences`, drawn from torch's default generator, in place.

    Linear layers are Xavier-uniform (Glorot and Bengio 2010) with biases of 0; `WanReferences` says what the two starts
    set otherwise. Raises UserError for another `init`.
    """
    if init not in ("identity", "published"):
        raise UserError(f"model.network.init is identity or published, got {init!r}")
    for name, module in network.named_modules():
        if not is_new(f"{name}.") or not isinstance(module, nn.Linear):
            continue
        nn.init.zeros_(module.bias)
        # One zero factor a path: with two, the gradients of both are zero for good.
        if name.endswith("v_vae") or (init == "published" and name.endswith("proj.3")):
            nn.init.zeros_(module.weight)
        else:
            # LayerNorm takes the size of a projection's last weight away; what is learnt soon outweighs a small draw.
            nn.init.xavier_uniform_(module.weight, gain=1e-3 if name.endswith("proj.3") else 1.0)
    for name, parameter in network.named_parameters():
        if name.endswith("clip_gate"):
            parameter.fill_(float(init == "published"))


def _layers(name: str) -> str:
    """A parameter's name as if there were no LoRA around its layer; of the LoRA's own, the layer's weight."""
    return re.sub(r"\.lora_.*", ".weight", name).replace(".base_layer.", ".")


def _inner(name: str) -> str:
    """A parameter's name in files: as in the transformer, or of a projection in front of it."""
    return _layers(name).removeprefix("transformer.")


def _with_text(module: nn.Module, arguments: Any, outputs: tuple) -> tuple:
    """After the condition embedder: the context gets its text, takes its place, and timesteps go to all tokens."""
    time, modulation, text, context = outputs
    if context is None:
        return outputs
    if time.ndim == 3:  # one a frame, (B, t, D)
        time, modulation = (x.repeat_interleave(context.frame_tokens, dim=1) for x in (time, modulation))
    return time, modulation, context._replace(text=text), None
