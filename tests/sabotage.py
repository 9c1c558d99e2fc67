"""What breaks a worker on purpose, for workers that cannot wait for the imports of `runs`."""

import os
import signal
from collections.abc import Callable


def die_at(step: int, micro: int = 0) -> Callable[[], None]:
    """Sabotage: SIGKILL in the middle of a step."""

    def arm() -> None:
        from vireo import training

        original = training.seed_default

        def deadly(seed, purpose, position):
            if position[:2] == (step, micro):
                os.kill(os.getpid(), signal.SIGKILL)
            original(seed, purpose, position)

        training.seed_default = deadly

    return arm
