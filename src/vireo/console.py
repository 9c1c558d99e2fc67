"""What a person sees of a run: log lines, and a progress bar where there is a terminal."""

import logging
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from vireo.run_folder import dispensable, log_file


def set_up_logging(path: Path | None = None, shared_console: bool = False) -> None:
    """Messages of level INFO to the console and, in a run, to its log file.

    path: the run's `train.log`, which is rank 0's. Any other rank has `logs/rank_<n>.log` instead of a console; only
    where a launcher gives all ranks one console (shared_console) does it write its errors there too.
    """
    rank = int(os.environ.get("RANK", "0"))
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    handlers: list[logging.Handler] = [console] if rank == 0 or shared_console else []
    if path is not None:
        path = log_file(path.parent, rank)
        path.parent.mkdir(exist_ok=True)
        file = LogFile(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logging.getLogger("vireo").setLevel(logging.INFO)


class LogFile(logging.FileHandler):
    """A log file that says once, on the console, that it cannot be written (a full disk), and goes on when it can.

    What it could not write is lost; rank 0 has said it on the console too.
    """

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Called within the handling of the error."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)  # a mistake in the program
        elif not self.failed:
            self.failed = True
            text = f"{self.baseFilename} cannot be written: {error.strerror}; lines are lost until there is space"
            with dispensable("that"):
                print(text, file=sys.stderr, flush=True)


class Console:
    """Progress of a run: a bar on a terminal, a line at each logged step elsewhere."""

    def __init__(self, steps: int, start: int, global_batch: int) -> None:
        self.steps, self.global_batch = steps, global_batch
        self.bar = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, file=sys.stdout)

    def step(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the figures of a step: loss, rate, speed, memory and time left, or a validation's results."""
        if "loss" not in figures:
            self.write(f"step {step:>7}  held-out clips  {_validation(figures) or 'have no videos to compare with'}")
            return
        seconds = figures["seconds_per_step"]
        text = (
            f"loss {figures['loss']:.4g}  lr {figures['lr']:.3g}  {seconds:.3g} s/step  "
            f"{self.global_batch / seconds:.3g} samples/s  {memory()}"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self.write(f"step {step:>7} of {self.steps}  {text}  {_duration(seconds * (self.steps - step))} left")

    def write(self, text: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.clear()
        logging.getLogger(__name__).info("%s", text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _validation(figures: Mapping[str, float]) -> str:
    """The prediction's figures, with the baselines' PSNRs beside its own."""
    own = {name.removeprefix("validation/"): value for name, value in figures.items() if name.count("/") == 1}
    others = {
        parts[1]: value
        for name, value in figures.items()
        if (parts := name.split("/"))[-1] == "psnr" and len(parts) == 3
    }
    beside = "".join(f", {title} {value:.2f}" for title, value in others.items())
    texts = [f"psnr {own.pop('psnr'):.2f} dB{f' ({beside[2:]})' if beside else ''}"] if "psnr" in own else []
    return "  ".join([*texts, *(f"{name} {value:.4g}" for name, value in own.items())])


def memory() -> str:
    """Peak memory so far: of the GPU where there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
