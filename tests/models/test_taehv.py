"""The network against the reference's numbers, and the ways to run it against one another."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.golden.fill import fill, noise

from vireo.errors import UserError
from vireo.models.taehv import TAEHV, MemBlock, TGrow, TPool
from vireo.models.taehv_variants import VARIANTS, lengths

GOLDEN = Path(__file__).parents[1] / "golden" / "taehv"
CLIPS = ["taew2_1", "taecvx_even", "taecvx_odd", "taew2_2", "taeltx_2", "taew2_2_super", "taeh3", "preview_no_upscale"]
SMALL = {"encoder_width": 8, "decoder_widths": (16, 8, 8, 8), "num_memblocks": 1}
BASE, LTX = (1_470_928, 9_844_611), (1_565_568, 10_194_160)
PARAMETERS = {  # of encoder and decoder
    "taehv": BASE,
    "taew2_1": BASE,
    "taecvx": BASE,
    "taeos1_3": BASE,
    "taew2_2": (1_494_576, 9_923_532),
    "taew2_2_super": (1_494_576, 18_993_420),
    "taehv1_5": (1_485_344, 9_886_668),
    "taehv1_5_super": (1_485_344, 18_985_228),
    "taeltx_2": LTX,
    "taeltx2_3": LTX,
    "taeltx2_3_wide": (1_565_568, 28_607_536),
    "taeh3": (1_480_728, 9_868_236),
}


def golden(name):
    """The description, the inputs in this project's layout, and the reference's outputs."""
    described = json.loads((GOLDEN / f"{name}.json").read_text())
    inputs = {
        key: eval(entry["expr"], {"noise": noise, "shape": entry["shape"]})
        for key, entry in described["inputs"].items()
    }
    inputs["latent"] = inputs["latent"].transpose(1, 2)
    return described, inputs, load_file(GOLDEN / f"{name}.safetensors")


def network_of(described):
    flags = described.get("constructor", {})
    arguments = {}
    if flags:  # two flags for time stand for the last two stages
        arguments["decoder_time_upscale"] = (False, *flags["decoder_time_upscale"])
        arguments["decoder_space_upscale"] = flags["decoder_space_upscale"]
    return fill(TAEHV(described["variant"], **arguments))


def small(variant="taew2_1", seed=0, **arguments):
    torch.manual_seed(seed)
    return TAEHV(variant, **{**SMALL, **arguments})


def clip(variant, frames, batch=2, seed=0):
    side = 2 * VARIANTS[variant].spatial_downscale
    return torch.rand(batch, frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_golden_numbers(name):
    described, inputs, reference = golden(name)
    network = network_of(described)
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert list(shapes.items()) == list(described["state_dict"].items())

    def close(found, key):
        torch.testing.assert_close(found, reference[key], atol=described["atol"], rtol=0)

    for mode in ("parallel", "chunked"):
        latents = network.encode(inputs["video"], mode, chunk=3)
        close(latents.transpose(1, 2), "encode")
        close(network.decode(latents, mode, chunk=3), "roundtrip")
        close(network.decode(inputs["latent"], mode, chunk=3), "decode")
        raw = network._run(network.decoder, inputs["latent"].transpose(1, 2), 3 if mode == "chunked" else None, {})
        close(torch.cat(list(raw), dim=1), "decode_raw")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_gradients(checkpointing):
    described, inputs, reference = golden("gradients_taew2_1")
    network = network_of(described)
    network.gradient_checkpointing = checkpointing
    output = network(inputs["video"], inputs["latent"])
    latent_loss = F.mse_loss(output.latents, inputs["latent"])
    reconstruction = F.mse_loss(output.frames, inputs["video"][:, : output.frames.shape[1]])
    torch.testing.assert_close(latent_loss, reference["loss_encoder"], rtol=1e-5, atol=0)
    torch.testing.assert_close(reconstruction, reference["loss_reconstruction"], rtol=1e-5, atol=0)

    (latent_loss + reconstruction).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    norms = torch.stack([gradients[name].norm() for name in described["grad_order"]])
    torch.testing.assert_close(norms, reference["grad_l2"], rtol=1e-3, atol=0)
    torch.testing.assert_close(norms.norm(), reference["grad_total"], rtol=1e-3, atol=0)
    for key in (key for key in reference if key.startswith("grad.")):
        error = (gradients[key.removeprefix("grad.")] - reference[key]).abs().max()
        assert error <= 1e-3 * reference[key].abs().max(), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts(variant):
    with torch.device("meta"):
        network = TAEHV(variant)
    counts = [sum(p.numel() for p in part.parameters()) for part in (network.encoder, network.decoder)]
    assert tuple(counts) == PARAMETERS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pieces_give_what_the_whole_gives(variant):
    network = small(variant, num_memblocks=2)
    frames = clip(variant, 23)
    latents = network.encode(frames)
    decoded = network.decode(latents, clamp=False)
    assert (latents.shape[2], decoded.shape[1]) == lengths(variant, 23)
    for mode, chunk in [("sequential", 1), ("chunked", 3), ("chunked", 5), ("chunked", 100)]:
        torch.testing.assert_close(network.encode(frames, mode, chunk), latents, atol=3e-6, rtol=0)
        torch.testing.assert_close(network.decode(latents, mode, chunk, clamp=False), decoded, atol=3e-6, rtol=0)


@pytest.mark.parametrize("variant", ["taecvx", "taew2_2_super", "taeltx_2"])
@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_no_layer_sees_more_than_a_chunk(variant, chunk):
    network = small(variant)
    seen = []
    for layer in [*network.encoder, *network.decoder]:
        per_image = 1 if isinstance(layer, (MemBlock, TPool, TGrow)) else 0
        layer.register_forward_pre_hook(lambda _, inputs, dim=per_image: seen.append(inputs[0].shape[dim]))
    network.decode(network.encode(clip(variant, 25, batch=1), "chunked", chunk), "chunked", chunk)
    assert max(seen) == chunk


def test_a_frame_is_not_influenced_by_later_ones():
    network = small("taew2_1").eval()
    frames = clip("taew2_1", 9, batch=1)
    changed = frames.clone()
    changed[:, 5:] = 0
    latents, other = network.encode(frames), network.encode(changed)
    assert torch.equal(latents[:, :, :1], other[:, :, :1])
    assert not torch.equal(latents[:, :, 1:], other[:, :, 1:])
    torch.testing.assert_close(network.decode(latents)[:, :1], network.decode(latents[:, :, :1]))


def test_forward_decodes_own_given_or_mixed_latents():
    network = small()
    frames = clip("taew2_1", 9)
    own = network.encode(frames)
    given = torch.randn_like(own)
    from_own, from_given = network.decode(own, clamp=False), network.decode(given, clamp=False)

    assert torch.equal(network(frames).latents, own)
    assert torch.equal(network(frames).frames, from_own)
    assert torch.equal(network(frames, given).frames, from_given)
    assert torch.equal(network(latents=given).frames, from_given)
    assert network(latents=given).latents is None
    assert network(frames, decode=False).frames is None
    mixed = network(frames, given, use_given=torch.tensor([True, False])).frames
    torch.testing.assert_close(mixed, torch.stack([from_given[0], from_own[1]]))


@pytest.mark.parametrize("detach", [False, True])
def test_detach_keeps_the_decoders_gradient_out_of_the_encoder(detach):
    network = small()
    network(clip("taew2_1", 5), detach=detach).frames.square().sum().backward()
    learns = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert learns == ({"decoder"} if detach else {"encoder", "decoder"})


def test_only_decode_clamps():
    network = small()
    with torch.no_grad():
        network.decoder[-1].bias.fill_(2.0)
    output = network(clip("taew2_1", 5))
    assert output.frames.min() > 1
    assert torch.equal(network.decode(output.latents), torch.ones_like(output.frames))


def test_gradient_checkpointing_recomputes_memblocks():
    network = small(gradient_checkpointing=True)
    runs = []
    network.encoder[4].conv.register_forward_hook(lambda *_: runs.append(1))
    network(clip("taew2_1", 5)).frames.sum().backward()
    assert len(runs) == 2


def test_moves_and_changes_dtype():
    network = small().to(torch.float64)
    assert network(clip("taew2_1", 5).double()).frames.dtype == torch.float64


@pytest.mark.parametrize("init", ["he", "torch"])
def test_training_starts_around_mid_grey(init):
    output = small("taecvx", init=init, num_memblocks=3)(clip("taecvx", 9))
    assert output.frames.mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.isfinite(output.latents).all()


def test_he_keeps_the_size_of_the_signal_and_torchs_own_does_not():
    frames = torch.rand(1, 9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    released = {"encoder_width": 64, "num_memblocks": 3}
    assert 0.3 < small("taecvx", init="he", **released).encode(frames).std() < 2
    assert small("taecvx", init="torch", **released).encode(frames).std() < 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variant": "taew21"}, "Did you mean 'taew2_1'"),
        ({"decoder_widths": (8, 8)}, "four decoder_widths"),
        ({"decoder_time_upscale": (False, False)}, "three flags"),
        ({"num_memblocks": 0}, "no size below 1"),
        ({"init": "xavier"}, "'he' or 'torch'"),
    ],
)
def test_impossible_networks(arguments, words):
    with pytest.raises(UserError, match=words):
        TAEHV(**{"variant": "taew2_1", **arguments})


def test_impossible_calls():
    network = small("taecvx")
    with pytest.raises(UserError, match=r"multiples of 8, got \(1, 9, 3, 20, 16\)"):
        network(torch.zeros(1, 9, 3, 20, 16))
    with pytest.raises(UserError, match="C = 16"):
        network(latents=torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(UserError, match="another variant or length of clip"):
        network(clip("taecvx", 9), torch.zeros(2, 16, 2, 2, 2))
    with pytest.raises(UserError, match="parallel, sequential, chunked"):
        network(clip("taecvx", 9), mode="stream")
    with pytest.raises(UserError, match="num_frames to 1 or 8"):  # 5 frames would come back as 8
        network(clip("taecvx", 5))
    assert network(clip("taecvx", 12)).frames.shape[1] == 9  # the published length: three frames do not come back
    with pytest.raises(ValueError, match="frames to encode or latents"):
        network()


@pytest.mark.full
def test_compiles_without_a_graph_break():
    network = small("taecvx")
    frames = clip("taecvx", 9)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(frames).frames, network(frames).frames)
