"""Which of DiffuEraser's stages has motion modules, and from where; judged before torch is imported."""

from vireo.errors import UserError

OF_STAGE = {1: ("none",), 2: ("adapter", "released")}


def check_motion_init(motion_init: str, stage: int) -> None:
    """Raise UserError for motion modules in the first stage, which learns from single frames, or none in the second.

    A key that is given to the whole chain goes to both stages.
    """
    if motion_init in OF_STAGE[stage]:
        return
    learns = "learns from single frames" if stage == 1 else "trains nothing but motion modules"
    raise UserError(
        f"model.network.motion_init={motion_init}, but stage {stage} of DiffuEraser {learns}: "
        f"{' or '.join(OF_STAGE[stage])} is expected. Published motion modules are for stage 2: "
        "chain.stage2.model.network.motion_init=released in a chain, which gives plain keys to both stages"
    )
