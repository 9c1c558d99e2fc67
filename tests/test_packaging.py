"""The wheel holds what it needs and runs from an empty folder; versions are stated in one place."""

import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (copy / name).symlink_to((ROOT / name).readlink())
            else:
                (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(folder),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("vireo-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_configs_and_weights(installed):
    shipped = {
        path.relative_to(installed / "vireo" / "conf") for path in (installed / "vireo" / "conf").rglob("*.yaml")
    }
    own = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml") if path.name != "default.yaml"}
    assert own == shipped
    for path in (ROOT / "src" / "vireo" / "mini" / "weights").rglob("*.safetensors"):
        assert (installed / path.relative_to(ROOT / "src")).read_bytes() == path.read_bytes()
    assert not list(installed.glob("tests")) and not list(installed.glob("conf"))


def test_the_wheel_runs_from_an_empty_folder(installed, tmp_path):
    code = (
        "import sys; from vireo.cli import vireo; sys.argv = ['vireo', 'train', '--cfg', 'job', '-p', 'model']; vireo()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and "vireo.models.taehv.TAEHV" in ran.stdout, ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_torch_is_fixed_in_one_place_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert any(line.startswith("torch==") for line in lines)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "torch>=2.6" in setup["options"]["install_requires"]
    assert setup["options"]["python_requires"] == ">=3.10"
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert "-c constraints.txt" in pip and not any("torch" in line for line in pip)
    for name in ("Makefile", "environment.yml", ".ci/run"):
        assert not re.search(r"torch[=<>~]=", (ROOT / name).read_text()), name


def test_no_second_opencv():
    """opencv-python and opencv-python-headless overwrite each other; only the headless one, and only from pip."""
    for name in ("setup.cfg", "environment.yml"):
        assert not re.search(r"opencv(?!-python-headless)", (ROOT / name).read_text()), name
