"""Which picture sizes suit the latents of an image VAE; judged before torch is imported."""

from vireo.errors import UserError


def check_size(height: int, width: int, multiple: int = 8) -> None:
    """Raise UserError unless both sides are multiples of what one latent stands for, 8 pixels in Stable Diffusion."""
    odd = [f"{name}={value}" for name, value in (("height", height), ("width", width)) if value % multiple]
    if odd:
        nearest = sorted({max(multiple, v // multiple * multiple + s) for v in (height, width) for s in (0, multiple)})
        raise UserError(
            f"{' and '.join(odd)} cannot be encoded: one latent stands for {multiple}x{multiple} pixels. Use multiples "
            f"of {multiple}, such as {' or '.join(map(str, nearest))}."
        )
