"""How long a clip AnimateDiff's motion modules take; judged before torch is imported."""

from vireo.errors import UserError


def check_num_frames(num_frames: int, most: int = 32) -> None:
    """Raise UserError for more frames than there are places in time; the published modules have 32."""
    if num_frames > most:
        raise UserError(
            f"{num_frames} frames are too many: the motion modules know {most} places in time. Use at most {most}."
        )
