"""What breaks a worker on purpose, for workers that cannot wait for the imports of `runs`."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


def die_at(step: int, micro: int = 0) -> Callable[[], None]:
    """Sabotage: SIGKILL in the middle of a step."""
    return lambda: _in_step(step, micro, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang_at(step: int) -> Callable[[], None]:
    """Sabotage: the process stands still in the middle of a step."""
    return lambda: _in_step(step, 0, _stand_still)


def fail_at(step: int) -> Callable[[], None]:
    """Sabotage: an error that nobody expects, in the middle of a step."""
    return lambda: _in_step(step, 0, lambda: 1 / 0)


def fill_the_disk_at(step: int) -> Callable[[], None]:
    """Sabotage: in a step, the file system of the run is filled to its last byte by `filler` in the run's folder."""

    def fill():
        with open(Path(sys.argv[-1]).parent / "filler", "wb", buffering=0) as file:
            for size in (2**20, 4096):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError as error:
                    print(error)

    return lambda: _in_step(step, 0, fill)


def out_of_memory_in_forward(step: int) -> Callable[[], None]:
    """Sabotage: from a step on, memory is too little for the forward pass of more than one sample."""

    def arm() -> None:
        import torch

        from vireo import training

        forward, to_device = training._forward, training.to_device

        def noted(*arguments):
            noted.step = arguments[4].step
            return forward(*arguments)

        def tight(batch, device):
            if noted.step >= step and len(batch["position"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory (on purpose)")
            return to_device(batch, device)

        training._forward, training.to_device = noted, tight

    return arm


def out_of_memory_in_backward(step: int) -> Callable[[], None]:
    """Sabotage: from a step on, memory is too little for the backward pass of more than one sample, in whose
    collectives other processes are."""

    def arm() -> None:
        import torch

        from vireo import training

        forward = training._forward

        def hooked(network, encoder, loss, batch, draws, strategy):
            objective = forward(network, encoder, loss, batch, draws, strategy)
            if draws.step >= step and len(batch["position"]) > 1:
                objective.total.register_hook(_no_memory)
            return objective

        def _no_memory(gradient):
            raise torch.OutOfMemoryError("CUDA out of memory (on purpose)")

        training._forward = hooked

    return arm


def _stand_still() -> None:
    time.sleep(3600)


def _in_step(step: int, micro: int, act: Callable[[], object]) -> None:
    from vireo import training

    original = training.seed_default

    def disturbed(seed, purpose, position):
        if position[:2] == (step, micro):
            act()
        original(seed, purpose, position)

    training.seed_default = disturbed


def command(python: list[str], sabotage: str, step: int, parent: str, resolved: str) -> list[str]:
    """The command of a worker with the named sabotage in a step, in place of vireo's own."""
    return [*python, "-c", "from tests import sabotage; sabotage.work()", sabotage, str(step), parent, resolved]


def work() -> None:
    """What that process does."""
    from vireo import orphans

    name, step, parent, resolved = sys.argv[1:]
    orphans.die_with_parent(int(parent))

    from vireo import worker
    from vireo.console import set_up_logging

    set_up_logging(Path(resolved).parent / "train.log")
    globals()[name](int(step))()
    sys.exit(worker.main(Path(resolved)))
