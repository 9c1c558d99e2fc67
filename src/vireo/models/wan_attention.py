"""Attention of Wan's blocks with reference images, and of latent frames that see only those before them.

Both are processors in diffusers' sense: functions that its attention modules call with themselves. What they need
beside tokens travels through diffusers' own arguments: `Context` in the place of the text, `Positions` in that of the
rotary embedding. So no state is kept in modules, and a block that is computed twice gives the same.

B batch, L tokens of the video, T tokens of the text, N references, H heads, K width of a head, D = H K.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vireo.errors import UserError

KeysValues = tuple[Tensor, Tensor]  # (B, tokens, H, K) each


class ContextKeys(NamedTuple):
    """Keys and values of the text, of the references' CLIP tokens and of their latents, in one block."""

    text: KeysValues
    clip: KeysValues | None
    latents: KeysValues | None


class KeyValueCache:
    """What the frames of a roll-out still need of those before them; empty at its start.

    frames: numbers of the latent frames whose keys and values are kept, ascending. next_frame: the first new one.
    own: keys (rotated to their place in the whole video) and values of these frames' tokens, by block.
    context: keys and values of text and references by block; they depend on no timestep, so they are computed once.
    """

    def __init__(self) -> None:
        self.frames: list[int] = []
        self.next_frame = 0
        self.own: dict[int, KeysValues] = {}
        self.context: dict[int, ContextKeys] = {}


class Context(NamedTuple):
    """What cross-attention attends to.

    text: (B, T, D). clip, latents: the references' projected tokens, (B, N x tokens of one, D), or None.
    present: bool (B, N), the references that are no padding; None: all are. scale: factor of their influence.
    frame_tokens: tokens of one latent frame of the video. cache: of a roll-out. seen: a list, to which every block adds
    its |gate| and the size of what latents add over that of the rest, (2,); None: nothing is measured.
    """

    text: Tensor | None = None
    clip: Tensor | None = None
    latents: Tensor | None = None
    present: Tensor | None = None
    scale: float = 1.0
    frame_tokens: int = 1
    cache: KeyValueCache | None = None
    seen: list[Tensor] | None = None


class Positions(NamedTuple):
    """Where the video's tokens are, and what each group of frames sees.

    cos, sin: (1, L, 1, K). pieces: for each group its tokens, and one or two slices of the tokens that are known (those
    in the cache, then these). kept: slices of known tokens that are put into the cache; None puts nothing.
    """

    cos: Tensor
    sin: Tensor
    pieces: list[tuple[slice, list[slice]]]
    cache: KeyValueCache | None = None
    kept: list[slice] | None = None


class DualCrossAttention:
    """Text and references, in two softmaxes that share the query and the output projection.

    A_text + gate (A_text_and_clip - A_text) + A_latents: with a gate of 1 the published formula, with one of 0 and
    values of latents that are zero exactly Wan's own cross-attention. Beside diffusers' parts, the attention module has
    clip_gate, k_vae, v_vae and norm_k_vae (`add_modules`).

    block: number of the block.
    """

    _attention_backend: Any = None  # diffusers sets both by these names
    _parallel_config: Any = None

    def __init__(self, block: int) -> None:
        self.block = block

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Context,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """(B, L, D) to (B, L, D). A plain tensor in the place of the context is a text without references."""
        _check(self, attn)
        context = encoder_hidden_states
        if not isinstance(context, Context):
            context = Context(text=context)
        query = _heads(attn.norm_q(attn.to_q(hidden_states)), attn)
        text, clip, latents = self._keys(attn, context)
        found = self._attend(query, text)
        rows = None if context.present is None else context.present.any(dim=1).view(-1, 1, 1)
        terms = []
        if clip is not None:
            both = torch.cat([text[0], clip[0]], dim=1), torch.cat([text[1], clip[1]], dim=1)
            mask = _mask(context.present, clip[0].shape[1], before=text[0].shape[1])
            gate = context.scale * attn.clip_gate
            terms.append(gate.to(found.dtype) * (self._attend(query, both, mask) - found))
        if latents is not None:
            mask = _mask(context.present, latents[0].shape[1])
            terms.append(context.scale * self._attend(query, latents, mask))
        if context.seen is not None and len(terms) == 2:
            context.seen.append(_sizes(attn.clip_gate, found + terms[0], terms[1]))
        for term in terms:
            found = found + (term if rows is None else torch.where(rows, term, torch.zeros_like(term)))
        return attn.to_out[1](attn.to_out[0](found))

    def _keys(self, attn: Any, context: Context) -> ContextKeys:
        known = context.cache.context if context.cache is not None else {}
        if self.block not in known:
            text = self._project(context.text, attn, attn.to_k, attn.norm_k, attn.to_v)
            clip = self._project(context.clip, attn, attn.to_k, attn.norm_k, attn.to_v)
            latents = self._project(context.latents, attn, attn.k_vae, attn.norm_k_vae, attn.v_vae)
            assert text is not None
            known[self.block] = ContextKeys(text, clip, latents)
        return known[self.block]

    def _project(
        self, tokens: Tensor | None, attn: Any, key: nn.Module, norm: nn.Module, value: nn.Module
    ) -> KeysValues | None:
        if tokens is None:
            return None
        return _heads(norm(key(tokens)), attn), _heads(value(tokens), attn)

    def _attend(self, query: Tensor, known: KeysValues, mask: Tensor | None = None) -> Tensor:
        return _attend(query, known, mask, self._attention_backend)


class CausalSelfAttention:
    """Each group of latent frames sees itself and what `Positions` says of the frames before it.

    Groups attend one after the other to slices of the keys: nothing is masked, so no matrix of L x L is needed, every
    kernel of attention can be used, and what is not seen costs nothing. block: number of the block.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, block: int) -> None:
        self.block = block

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: Positions | None = None,
    ) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        _check(self, attn)
        positions = rotary_emb
        assert positions is not None
        query = rotate(_heads(attn.norm_q(attn.to_q(hidden_states)), attn), positions.cos, positions.sin)
        keys = rotate(_heads(attn.norm_k(attn.to_k(hidden_states)), attn), positions.cos, positions.sin)
        known = keys, _heads(attn.to_v(hidden_states), attn)
        if positions.cache is not None:
            if self.block in positions.cache.own:
                earlier = positions.cache.own[self.block]
                known = torch.cat([earlier[0], known[0]], dim=1), torch.cat([earlier[1], known[1]], dim=1)
            if positions.kept is not None:
                positions.cache.own[self.block] = _cut(known, positions.kept)
        found = [
            _attend(query[:, group], _cut(known, seen), None, self._attention_backend)
            for group, seen in positions.pieces
        ]
        return attn.to_out[1](attn.to_out[0](torch.cat(found, dim=1)))


class CausalPositions(nn.Module):
    """In the place of a Wan transformer's `rope`: rotations, and which frames each group of frames sees.

    rope: diffusers', with patches of one frame. group: latent frames that see one another. window: how many frames a
    group sees at most, its own and the first `sink` ones counted in; None: all. A group's end is where it is counted
    back from.

    `cache` and `keep` are set for the length of one forward by the network, since diffusers calls this with the noisy
    latents alone.
    """

    def __init__(self, rope: nn.Module, group: int, window: int | None, sink: int) -> None:
        super().__init__()
        self.rope, self.group, self.window, self.sink = rope, group, window, sink
        self.cache: KeyValueCache | None = None
        self.keep = False

    def forward(self, hidden_states: Tensor) -> Positions:
        """hidden_states: (B, C, t, h, w), of which only the shape counts."""
        count, height, width = hidden_states.shape[2:]
        first = self.cache.next_frame if self.cache else 0
        whole = hidden_states.new_empty(1).expand(1, 1, first + count, height, width)
        cos, sin = self.rope(whole)  # of all frames from the video's first
        tokens = cos.shape[1] // (first + count)
        known = [*(self.cache.frames if self.cache else []), *range(first, first + count)]
        pieces = []
        for start in range(0, count, self.group):
            end = min(start + self.group, count)
            seen = _slices(known, self.visible(known, first + end), tokens)
            pieces.append((slice(start * tokens, end * tokens), seen))
        kept = None
        if self.cache is not None and self.keep:
            self.cache.next_frame = first + count
            # Of the frames that are known now, those that the next group will see.
            self.cache.frames = self.visible(known, first + count + self.group)
            kept = _slices(known, self.cache.frames, tokens)
        return Positions(cos[:, first * tokens :], sin[:, first * tokens :], pieces, self.cache, kept)

    def visible(self, known: list[int], end: int) -> list[int]:
        """Of the known frames those that a group sees which ends before frame `end`."""
        since = 0 if self.window is None else end - (self.window - self.sink)
        return [frame for frame in known if frame < end and (frame < self.sink or frame >= since)]


def add_modules(attn: Any) -> None:
    """Give a cross-attention its path for latents and its gate, on its device and in its dtype."""
    like = {"device": attn.to_k.weight.device, "dtype": attn.to_k.weight.dtype}
    attn.k_vae = nn.Linear(attn.to_k.in_features, attn.to_k.out_features, **like)
    attn.v_vae = nn.Linear(attn.to_k.in_features, attn.to_k.out_features, **like)
    attn.norm_k_vae = nn.RMSNorm(attn.to_k.out_features, eps=attn.norm_k.eps, **like)
    attn.clip_gate = nn.Parameter(torch.zeros(1, **like))  # FSDP does not shard scalars


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) of (B, L, H, K), in float32.

    cos, sin: (1, L, 1, K), each angle twice, as diffusers has them; neighbouring channels form a pair.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def _attend(query: Tensor, known: KeysValues, mask: Tensor | None, backend: Any) -> Tensor:
    """(B, L, H, K) to (B, L, D)."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    found = dispatch_attention_fn(query, *known, attn_mask=mask, dropout_p=0.0, is_causal=False, backend=backend)
    return found.flatten(2, 3).type_as(query)


def _heads(x: Tensor, attn: Any) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


def _mask(present: Tensor | None, tokens: int, before: int = 0) -> Tensor | None:
    """Which tokens count, bool (B, 1, 1, before + tokens), of references of which some are padding.

    None where all do: with one reference a row is used as a whole or not at all. Rows without any reference see all of
    them, since a softmax over nothing is not a number; the caller does not use what they get.
    """
    if present is None or present.shape[1] == 1:
        return None
    seen = present | ~present.any(dim=1, keepdim=True)
    seen = seen.repeat_interleave(tokens // present.shape[1], dim=1)
    return torch.cat([seen.new_ones(len(seen), before), seen], dim=1)[:, None, None]


@torch.no_grad()
def _sizes(gate: Tensor, fused: Tensor, added: Tensor) -> Tensor:
    """|gate| and |added| / |fused|, float32 (2,)."""
    return torch.stack([gate.float().abs().mean(), added.float().norm() / fused.float().norm()])


def _slices(known: list[int], chosen: list[int], tokens: int) -> list[slice]:
    """Where the chosen frames' tokens are among those of the known ones, as few slices."""
    places = [known.index(frame) for frame in chosen]
    return [slice(start * tokens, end * tokens) for start, end in _runs(places)]


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as half-open ranges."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[start], numbers[place - 1] + 1
            start = place


def _cut(known: KeysValues, where: list[slice]) -> KeysValues:
    keys, values = ([tensor[:, some] for some in where or [slice(0)]] for tensor in known)
    return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, dim=1), torch.cat(values, dim=1))


def _check(processor: Any, attn: Any) -> None:
    if attn.fused_projections or processor._parallel_config is not None:
        raise UserError(
            "The attention of a Wan transformer with reference images or causal frames has neither fused projections "
            "(fuse_qkv_projections) nor context parallelism: switch it off."
        )
