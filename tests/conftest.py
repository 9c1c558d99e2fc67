import logging
import os
import subprocess

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small: threads would only wait for one another

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
    # A forked child has to make torch's thread pool anew, and must not do so from several threads at once, as
    # transformers does when it loads weights.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@pytest.fixture(autouse=True)
def logging_of_its_own():
    """What a test logs to is gone with it: its captured stderr is closed, and later tests would log into that."""
    before = list(logging.root.handlers)
    yield
    for handler in [handler for handler in logging.root.handlers if handler not in before]:
        logging.root.removeHandler(handler)


@pytest.fixture
def disturbed(monkeypatch):
    """disturbed(sabotage, *steps): of a run's processes, the last one of the first start is disturbed in the first of
    these steps (by one of `tests.sabotage`), of the second start in the second, …; later starts are left alone."""
    from tests import sabotage
    from vireo import processes

    def arm(name, *steps):
        left, start = list(steps), subprocess.Popen

        def popen(command, env=None, **options):
            is_last = env is not None and int(env.get("RANK", "0")) == int(env.get("WORLD_SIZE", "1")) - 1
            if "vireo.start_worker" in command and is_last and left:
                command = sabotage.command(command[:2], name, left.pop(0), *command[-2:])
            return start(command, env=env, **options)

        monkeypatch.setattr(processes.subprocess, "Popen", popen)

    return arm
