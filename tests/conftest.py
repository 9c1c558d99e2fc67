import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small: threads would only wait for one another

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
    # A forked child has to make torch's thread pool anew, and must not do so from several threads at once, as
    # transformers does when it loads weights.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
