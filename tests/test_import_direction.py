"""Lower layers never import higher ones, and Hydra stays where configs are."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "vireo"
HYDRA = ("config", "launch", "submitted", "verbs", "train")
FILES = sorted(path for path in SRC.rglob("*.py") if "conf" not in path.relative_to(SRC).parts[:1])


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def layer(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_downwards(path):
    own, names = layer(path), imports(path)
    if own not in HYDRA:
        assert not {n for n in names if n.split(".")[0] in ("hydra", "omegaconf")}, "Hydra below the launcher"
    parts = {"models", "losses", "data", "sampling"}
    low = {"diffusion", "video_io", "randomness", "pixels", "errors", "distributed", "metrics", "schedules", "cache"}
    low |= {"json_files", "tensor_files", "orphans", "comparison", "digests", "peak_memory", "optical_flow"}
    high = {"strategies", "training", "worker", "launch", "verbs", "cli", "objects", "config", "validation", "report"}
    high |= {"cache_filling", "cache_manifests"}
    used = {name.split(".")[1] for name in names if name.startswith("vireo.") and name.count(".") >= 1}
    if own in parts:
        siblings = used & parts - {own}
        allowed = {"sampling": {"models"}}.get(own, set())
        assert siblings <= allowed, f"{own} imports {siblings}"
    if own == "diffusion":
        assert used <= {"diffusion", "errors"}, "formulas know nothing of training"
    if own in parts | low:
        assert not used & high, f"{own} imports {used & high}"


def test_the_loop_knows_no_recipe():
    text = (SRC / "training.py").read_text().lower()
    for word in ("taehv", "seraena", "ip2p", "diffueraser", "opens2v", "cogvideo", "isinstance"):
        assert word not in text
