"""Train a recipe: `python train.py experiment=<name>` (the same as `vireo train experiment=<name>`).

Compose the config, validate it, hand it to the launcher; `python train.py --help` lists the choices.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # runs from a fresh clone, installed or not

from vireo.cli import train  # noqa: E402

if __name__ == "__main__":
    sys.exit(train())
