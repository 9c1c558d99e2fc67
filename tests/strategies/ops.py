"""DeepSpeed's compiled part, which tests of ZeRO need."""

import os
import subprocess
import sys

import pytest

BUILD = """
from vireo.errors import UserError
from vireo.strategies import zero_ops
try:
    zero_ops.prepare()
except UserError as error:
    print(error)
    raise SystemExit(3)
"""


def skip_without_ops() -> None:
    """Compile DeepSpeed's part for CPUs if that has not been done; skip where it cannot be."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", BUILD]
    try:
        built = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired:
        pytest.skip("DeepSpeed's part for CPUs was not compiled within 400 s")
    if built.returncode == 3:
        pytest.skip(built.stdout.strip())
    assert built.returncode == 0, built.stderr
