import pytest

from vireo import devices
from vireo.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """machine(cores, gpus): what this machine seems to have."""

    def pretend(cores: int, gpus: str, threads: str | None = None) -> None:
        monkeypatch.setattr(devices, "cores", lambda: cores)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if threads is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)

    return pretend


def test_gpus_are_divided_without_overlap(machine):
    machine(16, "0,2,5,GPU-8f3a")
    assert devices.visible_gpus() == ["0", "2", "5", "GPU-8f3a"]
    shares = [devices.share(slot, 2, "auto") for slot in (0, 1)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shares] == ["0,2", "5,GPU-8f3a"]
    assert [one["OMP_NUM_THREADS"] for one in shares] == ["4", "4"]
    assert [devices.share(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "2", "5,GPU-8f3a"]
    with pytest.raises(UserError, match="launcher.jobs=5, but 4 GPUs"):
        devices.share(0, 5)


def test_threads_are_divided_on_a_cpu(machine):
    machine(8, "")
    assert devices.share(1, 2) == {"OMP_NUM_THREADS": "4"}
    assert devices.share(0, 2, 2) == {"OMP_NUM_THREADS": "2"}
    assert devices.share(0, 20) == {"OMP_NUM_THREADS": "1"}
    assert devices.share(0, 1) == {}


def test_threads_that_were_set_stay(machine):
    machine(8, "-1", threads="3")
    assert devices.share(0, 2) == {}
