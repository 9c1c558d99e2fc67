import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small: threads would only wait for one another

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
