import torch
from tests.caching import Latents, NeverLoaded

from vireo.models.encoders import NoEncoder
from vireo.randomness import Draws

B, N = 3, 2


def batch():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (B, N, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return {"frames": frames, "target": frames[:, 0], "prompt": ["a", "bc", "def"]}


def test_missing_outputs_are_computed_then_the_batch_is_conditioned():
    made = Latents()(batch(), Draws(0, range(B)))
    assert made["frame_moments"].shape == (B, N, 4, 4, 4) and made["target_moments"].shape == (B, 4, 4, 4)
    assert torch.equal(made["frame_moments"][:, 0], made["target_moments"]) and made["latents"].shape == (B, 2, 4, 4)


def test_outputs_that_are_there_are_not_computed():
    """And their fields need not be."""
    known = {name: value for name, value in Latents()(batch(), Draws(0, range(B))).items() if name in Latents.outputs}
    again = NeverLoaded()(known, Draws(0, range(B)))
    assert all(torch.equal(again[name], value) for name, value in known.items())


def test_a_text_that_all_samples_share_is_encoded_once():
    encoder = Latents()
    first, second = encoder(batch(), Draws(0, range(B))), encoder(batch(), Draws(0, range(B, 2 * B)))
    null = first["null_prompt_embeds"]
    assert torch.equal(null, encoder.encode("prompt_embeds", [""]).expand(B, -1, -1)) and null.stride(0) == 0
    assert torch.equal(second["null_prompt_embeds"], null)
    assert encoder.encoded.count(("null_prompt_embeds", 1)) == 1


def test_freed_parts_are_loaded_again():
    encoder = Latents()
    before = encoder(batch(), Draws(0, range(B)))
    encoder.free()
    assert encoder.loads == 1
    after = encoder(batch(), Draws(0, range(B)))
    assert encoder.loads == 2 and torch.equal(before["null_prompt_embeds"], after["null_prompt_embeds"])


def test_parts_may_stay_when_others_are_freed():
    encoder = Latents()
    encoder(batch(), Draws(0, range(B)))
    assert encoder.loaded_parts() == {"loaded", "_of_text"}
    encoder.free(but=["loaded"])
    assert encoder.loaded_parts() == {"loaded"} and encoder.loads == 1


def test_without_an_encoder_a_batch_stays_as_it_is():
    given = batch()
    assert NoEncoder()(given, Draws(0, range(B))) == given
    NoEncoder().free()
