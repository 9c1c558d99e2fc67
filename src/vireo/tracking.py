"""Where a run's figures go: `metrics.jsonl` always, TensorBoard or Weights & Biases beside it.

A tracker must never stop training: the first call that fails is reported, and the tracker is left out from then on.
No tracker reads or stores a key; wandb takes its own from the environment or its login.
"""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class MetricsFile:
    """One JSON object a line: {"step": …, metrics…}. Rows after a resumed step are removed, so no step stands twice.

    Rows that cannot be written, since the disk is full, wait until they can. validated: whether the resumed step's
    validation is part of what is resumed; else its row is removed too.
    """

    def __init__(self, path: Path, resume_step: int, validated: bool = True) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step else []
        if not validated:
            kept = [row for row in kept if row["step"] < resume_step or "loss" in row]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the length of the run
        self.waiting = b""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        told = bool(self.waiting)
        self.waiting += json.dumps({"step": step, **metrics}).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not told:
                log.error("%s: %s; figures wait until there is space", self.path, error.strerror)

    def close(self) -> None:
        self.file.close()
        if self.waiting:
            log.error("%s lacks its last %d rows", self.path, self.waiting.count(b"\n"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut off is left out. Missing file: no rows."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Tracker(ABC):
    """A place that shows figures and pictures while a run goes on."""

    @abstractmethod
    def start(
        self,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        notes: str,
        tags: Sequence[str],
        run_id: str | None,
        step: int,
    ) -> str | None:
        """Begin, or go on with the run `run_id` after `step`; returns the id for checkpoints, None to keep what is.

        The folder's tracker may have been another before, whose id this is.
        """

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    @abstractmethod
    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a PNG file."""

    @abstractmethod
    def finish(self) -> None: ...


class TensorBoard(Tracker):
    """Event files below `<run>/tensorboard`; look with `tensorboard --logdir outputs`."""

    def start(
        self,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        notes: str,
        tags: Sequence[str],
        run_id: str | None,
        step: int,
    ) -> str | None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the checkpoint is logged again; the old points are taken out.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if step == 0:
            about = f"{notes}\n\ntags: {', '.join(tags)}\n\n```json\n{json.dumps(config, indent=1)}\n```"
            self.writer.add_text("run", about)
        return None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def finish(self) -> None:
        self.writer.close()


class Wandb(Tracker):
    """Weights & Biases. mode: online, offline (needs no account; `wandb sync` later) or disabled.

    The run's id is kept in checkpoints, so a resumed run goes on in the same curve. Steps are an axis of our own:
    wandb drops what is logged again below its own last step.
    """

    def __init__(self, project: str = "vireo", entity: str | None = None, mode: str = "offline") -> None:
        self.project, self.entity, self.mode = project, entity, mode

    def start(
        self,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        notes: str,
        tags: Sequence[str],
        run_id: str | None,
        step: int,
    ) -> str | None:
        import wandb

        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,  # type: ignore[arg-type]
            dir=str(folder),
            name=name,
            config=dict(config),
            notes=notes or None,
            tags=list(tags),
            id=run_id,
            resume="allow",
            settings=wandb.Settings(disable_git=True, x_disable_stats=True, silent=True),
        )
        self.run.define_metric("train_step")
        self.run.define_metric("*", step_metric="train_step")
        return self.run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"train_step": step, **metrics})

    def picture(self, step: int, name: str, path: Path) -> None:
        import wandb

        self.run.log({"train_step": step, name: wandb.Image(str(path))})

    def finish(self) -> None:
        self.run.finish()


class Log:
    """All places at once; made on the main process only."""

    def __init__(self, metrics_file: MetricsFile, tracker: Tracker | None) -> None:
        self.metrics_file = metrics_file
        self.tracker = tracker

    def start(self, **about: Any) -> str | None:
        """Begin the tracker; arguments as for `Tracker.start`."""
        return self._try("start", **about)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics_file.log(step, metrics)
        self._try("log", step, metrics)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._try("picture", step, name, path)

    def finish(self) -> None:
        self._try("finish")
        self.metrics_file.close()

    def _try(self, call: str, *args: Any, **kwargs: Any) -> Any:
        if self.tracker is None:
            return None
        try:
            return getattr(self.tracker, call)(*args, **kwargs)
        except Exception as error:  # anything a service can raise; training goes on without it
            log.error("tracker %s failed in %s and is switched off: %s", type(self.tracker).__name__, call, error)
            self.tracker = None
            return None


def silence_telemetry() -> None:
    """Libraries must not report what a user runs; set before they are imported."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY", "DIFFUSERS_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
