"""Clips in pieces of any size against the same clips whole."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.golden.fill import fill, noise

from vireo.errors import UserError
from vireo.models.taehv import TAEHV
from vireo.models.taehv_streaming import DecoderStream, EncoderStream
from vireo.models.taehv_variants import VARIANTS, lengths

GOLDEN = Path(__file__).parents[1] / "golden" / "taehv"
CLOSE = {"atol": 3e-6, "rtol": 0}


def small(variant="taew2_1", **arguments):
    torch.manual_seed(0)
    return TAEHV(variant, encoder_width=8, decoder_widths=(16, 8, 8, 8), num_memblocks=1, **arguments)


def clip(variant, frames, batch=2):
    side = VARIANTS[variant].spatial_downscale
    return torch.rand(batch, frames, 3, side, 2 * side, generator=torch.Generator().manual_seed(frames))


def cut(length, sizes):
    """sizes, repeated as long as they fit, then what is left."""
    parts = []
    while sum(parts) < length:
        parts += [min(size, length - sum(parts)) for size in sizes[len(parts) % len(sizes) :][:1]]
    return parts


def encode(stream, frames, sizes):
    return torch.cat([*map(stream.push, frames.split(sizes, dim=1)), stream.finish()], dim=2)


def decode(stream, latents, sizes):
    pushed = [stream.push(piece) for piece in latents.split(sizes, dim=2)]
    finished = stream.finish()
    return torch.cat([*pushed, finished] if stream.expected else [finished, *pushed], dim=1)


# At least one of the sizes is not 0, so that a cut ends.
SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=12, deadline=None)
@given(length=st.integers(1, 45), sizes=SIZES, latent_sizes=SIZES, chunk=st.integers(1, 6), known=st.booleans())
@torch.no_grad()
def test_any_pieces_give_what_the_whole_gives(variant, length, sizes, latent_sizes, chunk, known):
    network, frames = small(variant), clip(variant, length)
    latents = network.encode(frames)
    count = latents.shape[2]
    whole = network.decode(latents, clamp=False)
    torch.testing.assert_close(encode(EncoderStream(network, chunk), frames, cut(length, sizes)), latents, **CLOSE)
    stream = DecoderStream(network, count if known else None, chunk=chunk, clamp=False)
    torch.testing.assert_close(decode(stream, latents, cut(count, latent_sizes)), whole, **CLOSE)


@pytest.mark.parametrize("name", ["taecvx_odd", "taecvx_even", "taeh3", "taew2_2"])
@torch.no_grad()
def test_golden_numbers(name):
    described = json.loads((GOLDEN / f"{name}.json").read_text())
    inputs = {
        key: eval(entry["expr"], {"noise": noise, "shape": entry["shape"]})
        for key, entry in described["inputs"].items()
    }
    reference, network = load_file(GOLDEN / f"{name}.safetensors"), fill(TAEHV(described["variant"]))
    latents = encode(EncoderStream(network), inputs["video"], 5)
    torch.testing.assert_close(latents.transpose(1, 2), reference["encode"], atol=described["atol"], rtol=0)
    frames = decode(DecoderStream(network), inputs["latent"].transpose(1, 2), 2)
    torch.testing.assert_close(frames, reference["decode"], atol=described["atol"], rtol=0)


@pytest.mark.parametrize(("frames", "decoded"), [(1, 1), (5, 8), (8, 8), (9, 9), (12, 9), (13, 16), (17, 17)])
def test_cogvideox_trims_an_odd_number_of_latents_only(frames, decoded):
    network = small("taecvx")
    latents = network.encode(clip("taecvx", frames))
    count = latents.shape[2]
    known, unknown = DecoderStream(network, count), DecoderStream(network)
    pieces = latents.split(1, dim=2)
    shown = [known.push(piece).shape[1] for piece in pieces]
    withheld = [unknown.push(piece).shape[1] for piece in pieces]
    assert shown == [decoded - 4 * (count - 1), *[4] * (count - 1)]
    assert withheld == [1, *[4] * (count - 1)]
    assert known.finish().shape[1] == 0
    assert unknown.finish().shape[1] == (0 if count % 2 else 3)


def test_latents_come_as_soon_as_their_frames_are_there():
    network = small("taew2_1")
    stream = EncoderStream(network)
    frames = clip("taew2_1", 9).split(1, dim=1)
    assert [stream.push(frame).shape[2] for frame in frames] == [0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert stream.finish().shape[2] == 1


@pytest.mark.parametrize(("frames", "latents"), [(17, 2), (22, 7), (39, 12)])
def test_h3_holds_three_latents_back_and_drops_them(frames, latents):
    network = small("taeh3")
    stream = EncoderStream(network)
    pushed = [stream.push(frame) for frame in clip("taeh3", frames).split(1, dim=1)]
    assert sum(piece.shape[2] for piece in [*pushed, stream.finish()]) == latents == lengths("taeh3", frames).latents


@pytest.mark.parametrize("variant", ["taew2_1", "taecvx", "taeltx_2", "taeh3"])
@pytest.mark.parametrize("size", [1, 7])
def test_what_is_kept_does_not_grow_with_the_clip(variant, size):
    network = small(variant)
    encoder, decoder = EncoderStream(network), DecoderStream(network)
    kept = {}
    for pushed, frames in enumerate(clip(variant, 170).split(size, dim=1), 1):
        decoder.push(encoder.push(frames))
        kept[pushed * size] = bytes_of(encoder) + bytes_of(decoder)
    early = max(amount for frames, amount in kept.items() if frames <= 85)
    assert max(kept.values()) == early


@pytest.mark.parametrize("variant", ["taew2_1", "taeh3"])
def test_a_long_piece_is_not_kept_alive(variant):
    network, frames = small(variant), clip(variant, 36)
    kept = []
    for size in (1, 36):
        encoder, decoder = EncoderStream(network), DecoderStream(network)
        for piece in frames.split(size, dim=1):
            decoder.push(encoder.push(piece))
        kept.append(bytes_of(encoder) + bytes_of(decoder))
    assert kept[0] == kept[1]


def bytes_of(stream):
    """What a stream keeps alive: whole storages, since a view of one frame would hold on to its piece."""
    found = [value for value in vars(stream).values() if isinstance(value, torch.Tensor)]
    found += stream.memory.values()
    return sum(tensor.untyped_storage().nbytes() for tensor in found)


def test_no_layer_sees_more_than_a_chunk():
    network = small("taeltx_2")
    seen = []
    for layer in [*network.encoder, *network.decoder]:
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    encoder, decoder = EncoderStream(network, chunk=2), DecoderStream(network, chunk=2)
    decoder.push(encoder.push(clip("taeltx_2", 40, batch=1)))
    assert max(seen) == 2


@pytest.mark.parametrize("variant", ["taecvx", "taeh3"])
@torch.no_grad()
def test_streams_share_a_network_and_begin_again(variant):
    network = small(variant)
    one, two = (EncoderStream(network) for _ in range(2))
    first, second = clip(variant, 22), clip(variant, 19)
    found = {one: [], two: []}
    for a, b in zip(first.split(5, dim=1), second.split(4, dim=1), strict=True):
        found[one].append(one.push(a))
        found[two].append(two.push(b))
    for stream, frames in ((one, first), (two, second)):
        torch.testing.assert_close(torch.cat([*found[stream], stream.finish()], 2), network.encode(frames), **CLOSE)
    other = clip(variant, 25, batch=1)  # of another shape
    torch.testing.assert_close(encode(one, other, 3), network.encode(other), **CLOSE)

    latents = network.encode(other)
    stream = DecoderStream(network)
    for _ in range(2):
        torch.testing.assert_close(decode(stream, latents, 2), network.decode(latents), **CLOSE)


@torch.no_grad()
def test_a_preview_streams():
    network = small("taecvx", decoder_time_upscale=(False, False, False), decoder_space_upscale=(False, False, True))
    latents = network.encode(clip("taecvx", 16))
    assert DecoderStream(network).push(latents[:, :, :0]).shape == (2, 0, 3, 2, 4)
    torch.testing.assert_close(decode(DecoderStream(network), latents, 3), network.decode(latents), **CLOSE)


@pytest.mark.parametrize("clamp", [True, False])
def test_clamping_is_a_choice_and_no_gradient_is_kept(clamp):
    network = small()
    with torch.no_grad():
        network.decoder[-1].bias.fill_(2.0)
    latents = EncoderStream(network).push(clip("taew2_1", 4))
    frames = DecoderStream(network, clamp=clamp).push(latents)
    assert (frames.max() > 1) == (not clamp)
    assert not latents.requires_grad and not frames.requires_grad


def test_impossible_streams():
    network = small("taecvx")
    frames = clip("taecvx", 8)
    latents = network.encode(frames).detach()
    with pytest.raises(UserError, match="chunk must be at least 1"):
        EncoderStream(network, chunk=0)
    with pytest.raises(UserError, match="num_latents=0"):
        DecoderStream(network, 0)
    for stream in (EncoderStream(network), DecoderStream(network)):
        with pytest.raises(UserError, match="was pushed"):
            stream.finish()
    with pytest.raises(UserError, match="multiples of 8"):
        EncoderStream(network).push(frames[..., :7])
    with pytest.raises(UserError, match="C = 16"):
        DecoderStream(network).push(latents[:, :4])
    encoder = EncoderStream(network)
    encoder.push(frames)
    with pytest.raises(UserError, match=r"so far were \(2, 3, 8, 16\).* this one is \(1, 3, 8, 16\)"):
        encoder.push(frames[:1])
    decoder = DecoderStream(network, 3)
    decoder.push(latents)
    with pytest.raises(UserError, match="num_latents=3, but 2 were pushed"):
        decoder.finish()
    with pytest.raises(UserError, match="num_latents=3, but 4 were pushed"):
        decoder.push(latents)
