"""Which clip lengths suit Wan's latents; judged before torch is imported."""

from vireo.errors import UserError

LATENT = 4  # frames of a latent; the first frame has one of its own


def check_length(num_frames: int, group_frames: int | None = None) -> None:
    """Raise UserError unless clips have 4 n + 1 frames, and their latents fill whole groups.

    Wan's VAE would silently leave out the rest. group_frames: latent frames of a group of a causal network; None: any.
    """
    group = group_frames or 1
    latents, rest = divmod(num_frames - 1, LATENT)
    if num_frames >= 1 and not rest and (latents + 1) % group == 0:
        return
    step = LATENT * group
    first = step - LATENT + 1  # the frames of one group
    near = max(0, (num_frames - first) // step)
    legal = [first + step * number for number in range(max(0, near - 1), near + 3)]
    groups = f" in groups of {group} (model.network.group_frames)" if group > 1 else ""
    raise UserError(
        f"num_frames={num_frames} is no clip of Wan: its latents stand for 1 + 4 + 4 + … frames{groups}, so num_frames "
        f"is {', '.join(map(str, legal))} and so on."
    )
