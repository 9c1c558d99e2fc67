"""Where Hydra finds the YAML files, and what they may use: the schema and vireo's resolvers."""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from vireo.config.schema import Config

NAME = "config"  # of the primary config file


@functools.cache
def conf_dir() -> Path:
    """The folder of the YAML files: that of the checkout, or the copy inside an installed vireo."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / f"{NAME}.yaml").is_file():
            return folder.resolve()
    raise FileNotFoundError(f"vireo's configs are neither in {package / 'conf'} nor in {package.parents[1] / 'conf'}")


def register() -> None:
    """Tell Hydra the schema and the resolvers that the YAML files use. Calling it twice does no harm."""
    from vireo.config import describe

    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("mini_world", mini_world, replace=True)
    OmegaConf.register_new_resolver("default_processes", default_processes, replace=True)
    OmegaConf.register_new_resolver("vireo_help", describe.help_section, replace=True)
    OmegaConf.register_new_resolver("vireo_direction", direction, replace=True)
    OmegaConf.register_new_resolver("srun_arguments", srun_arguments, replace=True)


def default_processes(otherwise: int | str) -> int | str:
    """`${default_processes:1}`: what VIDEO_TRAIN_PROCESSES says, a number or auto."""
    said = os.environ.get("VIDEO_TRAIN_PROCESSES") or otherwise
    return int(said) if str(said).isdigit() else said


def srun_arguments(container: str | None, further: Sequence[str]) -> list[str]:
    """`${srun_arguments:…}`: srun ends a job of which one machine has failed, and starts it inside an image."""
    image = [f"--container-image={container}"] if container else []
    return ["--kill-on-bad-exit=1", *image, *further]


def mini_world(part: str) -> str:
    """`${mini_world:data}`: a folder of the embedded world, whether it has been made already or not."""
    from vireo.mini import world

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(cache / "vireo" / f"mini-{world.version()}" / part)


def direction(higher_is_better: bool) -> str:
    """`${vireo_direction:${validation.higher_is_better}}`: what Optuna calls it."""
    return "maximize" if higher_is_better else "minimize"


@contextmanager
def searching(main: Path | None = None, further: Path | None = None) -> Iterator[None]:
    """Hydra looks for YAML files in `main` (default: conf/), then in `further`; inside a Hydra app where that looks."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    version.setbase("1.3")
    path = create_config_search_path(str(main or conf_dir()))
    if further is not None:
        path.prepend("command-line", f"file://{further}", SearchPathQuery(provider="schema"))
    Hydra.create_main_hydra2(task_name="train", config_search_path=path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
