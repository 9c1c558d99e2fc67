"""One process of a run, with RANK and its like in the environment where there are several.

It builds the Model, Dataset and Loss objects of the resolved config, takes up the newest good checkpoint and calls
the loop (training.py). What happens at a step's boundary (validate, save, export) is decided here.
"""

import contextlib
import logging
import math
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from vireo import (
    cache_filling,
    checkpoint,
    config,
    digests,
    distributed,
    faults,
    global_batch,
    hangs,
    incidents,
    memory,
    objects,
    processes,
    report,
    run_folder,
    tracking,
    weights,
)
from vireo.cache import Cache
from vireo.console import Console
from vireo.data.stream import Slices, Stream, collate, loader, to_device
from vireo.ema import ExponentialMovingAverage
from vireo.errors import UserError
from vireo.freezing import parameter_table
from vireo.hangs import Watchdog
from vireo.randomness import Draws
from vireo.training import Progress, train
from vireo.validation import SEED, validate

log = logging.getLogger(__name__)


class Run:
    """The objects of one process of a run, and what is done with them between steps."""

    def __init__(self, settings: dict[str, Any], folder: Path, stop: faults.StopRequest) -> None:
        self.settings, self.folder, self.stop = settings, folder, stop
        self.strategy = objects.strategy(settings)
        self.device = self.strategy.device
        _check_agreement(settings)
        if settings["cache"]["verify"] == "bytes":
            digests.distrust()
        self.dataset, self.held_out = objects.dataset(settings, "train"), objects.dataset(settings, "validation")
        self.encoder, self.loss, self.sampler = (
            objects.encoder(settings),
            objects.loss(settings),
            objects.sampler(settings),
        )
        self.encoder.to(self.device)
        self.cache = self._filled_cache()  # before the network takes its memory
        self.network, self.policy = objects.network(settings), objects.freeze_policy(settings)
        self.policy(self.network)
        groups = self.policy.groups(self.network, settings["lr"])
        self.optimizer = objects.optimizer(settings)(groups, lr=settings["lr"])
        self.learns = parameter_table(self.network)
        self.found = self._find_checkpoint()
        self.frozen = weights.frozen_digest(self.network)
        if self.found is not None:  # weights are loaded before they are spread over the processes
            weights.check_frozen(self.found, self.frozen)
            weights.load_trained(self.network, self.found.tensors("network"), self.found.folder)
        self.sizes = self._sizes()
        self.wrapped = self.strategy.prepare(self.network, self.optimizer)
        self.policy.train_mode(self.network)
        self.loss.to(self.device)
        parts, decay = self.strategy.parts(), settings["ema"]["decay"]
        self.average = ExponentialMovingAverage(parts, decay, self.strategy.refresh)
        self.save_failures = faults.SaveFailures(settings["faults"]["max_consecutive_save_failures"])
        self.accumulation = settings["gradient_accumulation"]
        self.best: dict[str, Any] | None = None
        self.tracker_id: str | None = None
        self.figures: dict[str, float] = {}
        self.saved_at = time.monotonic()
        self.owes_validation = False  # of the step that it goes on from, since a stop did not wait for it
        self.memory_creep = memory.Creep()
        self.watchdog = Watchdog(hangs.file_of(folder, distributed.rank()), settings["launcher"]["timeout"])
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.saving: tuple[int, Future | None] | None = None

    @property
    def global_batch(self) -> int:
        return self.settings["batch_size"] * self.accumulation * distributed.world_size()

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: `steps`, or `epochs` passes over the dataset, rounded up."""
        epochs = self.settings["epochs"]
        return math.ceil(epochs * len(self.dataset) / self.global_batch) if epochs else self.settings["steps"]

    def _sizes(self) -> dict[str, int]:
        """Bytes by part that one process alone would hold before its first activation; asked before `prepare`."""
        trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        return memory.estimate(
            self.network,
            self.optimizer,
            trained if self.settings["ema"]["decay"] else {},
            self.encoder.weight_bytes(),
            self.loss.state_dict(),
            half_precision=self.strategy.precision != "fp32",
        )

    def _find_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The newest good checkpoint, the same one on every rank; None is a fresh start."""
        found = None
        if distributed.is_main():
            checkpoint.clean(self.folder)
            found = checkpoint.latest(self.folder)
            damaged = checkpoint.set_damaged_aside(self.folder, found)
            metrics = self.folder / "metrics.jsonl"
            if damaged and found is None and metrics.exists():
                log.error("none of %d checkpoints is good: the run begins anew, its old figures are kept", len(damaged))
                metrics.replace(metrics.with_suffix(".jsonl.damaged"))
        return distributed.gather(found)[0]

    def resume(self) -> Progress:
        """Take up the rest of the checkpoint that was found, beside its weights."""
        found = self.found
        if found is None:
            return Progress(0, 0, 0)
        self._keep_global_batch(found.state["global_batch"])
        self.strategy.load_moments(found.tensors("optimizer"))
        self.loss.load_state_dict(found.tensors("loss"))
        if self.average:
            self.average.load(self.strategy.scatter(found.tensors("ema")))
        self.strategy.load_state(found.state["strategy"])
        self.best, self.tracker_id = found.state["best"], found.state["tracker_id"]
        self.owes_validation = found.state.get("owes_validation", False)
        log.info("resumed from %s: step %d of %d", found.folder, found.step, self.steps)
        state = found.state
        return Progress(found.step, state["position"], state["skipped"], state["usual_loss"], state["losses_seen"])

    def _keep_global_batch(self, wanted: int) -> None:
        """On another number of processes the accumulation changes, so that each step sees the same samples."""
        accumulation = global_batch.accumulation(wanted, self.settings["batch_size"], distributed.world_size())
        if wanted != self.global_batch:
            log.info("gradient_accumulation is %d now, the global batch stays %d", accumulation, wanted)
            self.accumulation = accumulation

    def _filled_cache(self) -> Cache | None:
        """The encoding cache with all that this run needs, if it is to have one. Raises faults.Stopped on request."""
        cache, settings = objects.cache(self.settings, self.encoder), self.settings["cache"]
        if cache is None:
            return None
        filled = cache_filling.fill(
            cache,
            {"train": self.dataset, "validation": self.held_out},
            self.encoder,
            config.cache_name(self.settings),
            batch_size=settings["batch_size"],
            workers=self.settings["loader"]["workers"],
            timeout=self.settings["loader"]["timeout"],
            thorough=settings["verify"] == "bytes",
            stop=self.stop,
        )
        if filled.stopped:
            raise faults.Stopped("stopped on request before the first step; the same command goes on from here")
        return cache

    def train(self) -> int:
        """From the newest checkpoint to the end of the run; returns the exit code."""
        settings, progress = self.settings, self.resume()
        if distributed.is_main():
            self._check_space()  # before anything is written
            path = self.folder / "metrics.jsonl"
            metrics_file = tracking.MetricsFile(path, progress.step, validated=not self.owes_validation)
            self.log = tracking.Log(metrics_file, objects.tracker(settings))
            started = self.log.start(
                folder=self.folder,
                name=self.folder.name,
                config=config.public(settings),
                notes=settings["notes"],
                tags=settings["tags"],
                run_id=self.tracker_id,
                step=progress.step,
            )
            self.tracker_id = started or self.tracker_id  # where it does not start today, a later start goes on with it
            self.console = Console(self.steps, progress.step, self.global_batch)
            log.info("what learns:\n%s", self.learns)
            log.info(
                "memory on each device:\n%s",
                memory.table(self.strategy.on_device(self.sizes), memory.available(self.device)),
            )
            if not len(self.held_out):
                log.warning("no clip is held out, so nothing is validated and no checkpoint is the best one")
        if progress.step == 0:
            self._try_export()
            self._check_network()
            if settings["validation"]["at_start"] and len(self.held_out):
                self._report_held_out(0, self.validate(0))
        elif self.owes_validation and self._judge(progress.step):
            self._keep_best()
        return self.finish(self.advance(progress))

    def advance(self, progress: Progress) -> Progress:
        """Make steps from `progress` until the run's end or a stop; returns where it got to."""
        settings = self.settings
        with contextlib.closing(self.watchdog):
            return train(
                self.wrapped,
                self.encoder,
                self.loss,
                self.batches(progress),
                self.optimizer,
                objects.schedule(settings),
                self.strategy,
                self.average,
                seed=settings["seed"],
                progress=progress,
                steps=self.steps,
                batch_size=settings["batch_size"],
                accumulation=self.accumulation,
                max_grad_norm=settings["max_grad_norm"],
                log_every=settings["logging"]["every"],
                max_consecutive_skips=settings["faults"]["max_consecutive_skips"],
                max_loss_rise=settings["faults"]["max_loss_rise"],
                room=self._room(),
                bad_files=faults.BadFiles(
                    max(1, int(self.dataset.max_bad_fraction * len(self.dataset))),
                    run_folder.bad_samples_file(self.folder, distributed.rank()),
                ),
                stop=self.stop,
                watchdog=self.watchdog,
                report=self.report,
                record=self.record,
                at_boundary=self.at_boundary,
            )

    def _room(self) -> faults.Room:
        """As much as an earlier start found to fit. The main process reads it: others may see an older file."""
        path = run_folder.room_file(self.folder)
        rows = distributed.gather(faults.rows_that_fit(path) if distributed.is_main() else None)[0]
        if distributed.is_main() and rows is not None and rows < self.settings["batch_size"]:
            log.info(
                "samples are taken %d at a time, since memory ran out with more in an earlier start; the gradient "
                "stays the same. To try whole batches again, delete %s or change the config",
                rows,
                path,
            )
        return faults.Room(path, rows)

    def _check_space(self) -> None:
        """Refuse (UserError) to train what cannot be saved; say so where it cannot be kept as often as asked."""
        kept = ("trained weights", "buffers", "optimizer moments", "average of the weights", "loss's own")
        size = sum(self.sizes.get(name, 0) for name in kept)
        free = shutil.disk_usage(self.folder).free
        wanted = (self.settings["checkpoint"]["keep_last"] + 1) * size + checkpoint.MARGIN
        if free < size + checkpoint.MARGIN:
            raise UserError(
                f"{self.folder}: {memory.readable(free)} free, but a checkpoint of this run takes "
                f"{memory.readable(size)}. Free some space, or move outputs with paths.outputs=…"
            )
        if free < wanted:
            log.warning(
                "%s free in %s; checkpoint.keep_last=%d and one being written take %s. When it is full, a save fails, "
                "the last good checkpoint stays, and the run goes on",
                memory.readable(free),
                self.folder,
                self.settings["checkpoint"]["keep_last"],
                memory.readable(wanted),
            )

    def record(self, incident: incidents.Incident) -> None:
        """Keep a step that was turned away; called on every rank, done on the main one."""
        if distributed.is_main():
            with run_folder.dispensable(f"what was wrong with step {incident.step}"):
                incidents.write(self.folder, incident)

    def batches(self, progress: Progress) -> Iterator[dict[str, Any]]:
        """This rank's micro-batches from `progress` to the end of the run."""
        slices = Slices(
            progress.position,
            progress.step,
            self.steps,
            self.settings["batch_size"],
            self.accumulation,
            distributed.rank(),
            distributed.world_size(),
        )
        stream = Stream(self.dataset, self.settings["seed"], cache=self.cache)
        return iter(loader(stream, slices, **self.settings["loader"], pin=self.device.type == "cuda"))

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Write and show figures; called on every rank, done on the main one."""
        if distributed.is_main():
            figures = {**figures, **self.memory_creep.look(step, self.device)}
            self.log.metrics(step, figures)
            self.console.show(step, figures)

    def at_boundary(self, progress: Progress, last: bool) -> bool:
        """After every step, on every rank: validate and save when it is time. Whether a stop was asked for meanwhile.

        A stop has little time to save in, so it does not wait for a validation, which is made when the run goes on;
        that of the last step is always made.
        """
        saving, done, improved = self.settings["checkpoint"], progress.step == self.steps, False
        if distributed.is_main():
            self.console.step(progress.step)
        due = len(self.held_out) and (done or _due(progress.step, self.settings["validation"]["every"]))
        self.owes_validation = bool(due)
        if due and (done or not last):
            with contextlib.suppress(faults.Stopped):
                improved = self._judge(progress.step)
        last |= self.owes_validation
        overdue = saving["every_minutes"] and time.monotonic() - self.saved_at > 60 * saving["every_minutes"]
        # Clocks differ between ranks; the main process's decides.
        overdue = distributed.gather(bool(overdue))[0] if saving["every_minutes"] else False
        if progress.step + 1 == self.settings["preempt_at"]:
            self.stop.ask()  # all ranks hear of it in the next step, which is then the last one of this process
        if last or overdue or _due(progress.step, saving["every"]) or (improved and saving["keep_best"]):
            self.watchdog.between_steps()
            self.save(progress, final=last)
            if improved:
                self._keep_best()
        return self.owes_validation

    def _judge(self, step: int) -> bool:
        """Validate and report; whether it is the best so far. Raises faults.Stopped where a stop was asked for."""
        self.watchdog.between_steps()
        self.figures = self.validate(step)
        self.owes_validation = False
        improved = self._note_best(step)
        self._report_held_out(step, self.figures)
        return improved

    @property
    def _judged_clips(self) -> int:
        """How many held-out clips a validation looks at. Figures of another number cannot be compared."""
        return min(self.settings["validation"]["clips"], len(self.held_out))

    def _report_held_out(self, step: int, figures: Mapping[str, float]) -> None:
        self.report(step, {**figures, report.CLIPS: self._judged_clips} if figures else figures)

    def _note_best(self, step: int) -> bool:
        """Whether this validation is the best so far, by `validation.metric`."""
        settings = self.settings["validation"]
        if not self.figures:  # held-out prompts without videos: there is nothing to compare with
            return False
        name = f"validation/{settings['metric']}"
        if "validation/loss" not in self.figures:  # no held-out clip could be read this time
            return False
        if name not in self.figures:
            raise UserError(
                f"validation.metric={settings['metric']} is not measured; there are "
                f"{', '.join(sorted(n.removeprefix('validation/') for n in self.figures))}"
            )
        judged = {"clips": self._judged_clips, "metric": settings["metric"]}
        if self.best is not None and any(self.best.get(key, now) != now for key, now in judged.items()):
            of = ", ".join(f"{key} {self.best.get(key, now)} before, {now} now" for key, now in judged.items())
            log.info(
                "the best validation so far, of step %d, judged otherwise (%s): it begins anew", self.best["step"], of
            )
            self.best = None
        value, sign = self.figures[name], 1 if settings["higher_is_better"] else -1
        if not math.isfinite(value) or (self.best is not None and sign * value <= sign * self.best["value"]):
            return False
        self.best = {"step": step, "value": value, **judged}
        return True

    def validate(self, step: int) -> dict[str, float]:
        """Figures of the held-out clips with the averaged weights, named "validation/…"; the same on every rank."""
        settings = self.settings["validation"]
        folder = self.folder / "samples" / f"step_{step:08d}"
        of_training = self.encoder.loaded_parts()
        self.network.eval()
        with self.average.applied():
            figures = validate(
                self.wrapped,
                self.encoder,
                self.loss,
                self.sampler,
                Stream(self.held_out, SEED, shuffle=False, cache=self.cache, keep_fields=True),
                clips=settings["clips"],
                batch_size=self.settings["batch_size"],
                device=self.device,
                folder=folder,
                fps=settings["fps"],
                gif=settings["gif"],
                stop=lambda: self._asked_between_clips(step),
            )
        self.policy.train_mode(self.network)
        self.encoder.free(but=of_training)  # with a cache, only sampling needs the VAE
        if distributed.is_main():
            for path in sorted(folder.glob("*.png")):
                self.log.picture(step, f"validation/{path.stem}", path)
        return {f"validation/{name}": value for name, value in figures.items()}

    def _asked_between_clips(self, step: int) -> bool:
        """Whether to give a validation up; called after each clip."""
        self.watchdog.between_steps()
        return bool(self.stop) and step < self.steps

    def save(self, progress: Progress, final: bool) -> None:
        """Write a checkpoint, in the background if asked; a final save that fails ends the run with it."""
        self._settle_save()
        began = time.monotonic()
        parts = {
            "network": weights.trained_state(self.network, self.strategy.full_state()),
            "optimizer": self.strategy.moments(),
            "loss": self.loss.state_dict(),
            "ema": self.strategy.gather(self.average.average),
        }
        if distributed.is_main():
            # Copied now: training goes on while the file is written.
            copies = {part: {n: t.detach().to("cpu", copy=True) for n, t in ts.items()} for part, ts in parts.items()}
            about = {
                **progress._asdict(),
                "global_batch": self.global_batch,
                "world_size": distributed.world_size(),
                "strategy": self.strategy.state(),
                "best": self.best,
                "frozen": self.frozen,
                "tracker_id": self.tracker_id,
                "owes_validation": self.owes_validation,
            }
            self.saving = (progress.step, self.writer.submit(self._write, progress.step, copies, about, began))
        else:
            self.saving = (progress.step, None)
        self.saved_at = time.monotonic()
        if final or not self.settings["checkpoint"]["background"]:
            self._settle_save(final)

    def _write(
        self, step: int, parts: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any], began: float
    ) -> None:
        saving = self.settings["checkpoint"]
        checkpoint.save(self.folder, step, parts, about)
        log.info("step %d: a checkpoint was saved in %.1f s", step, time.monotonic() - began)
        best = int(about["best"]["step"]) if about["best"] and saving["keep_best"] else None
        checkpoint.retain(self.folder, saving["keep_last"], saving["keep_every"], best)

    def _settle_save(self, final: bool = False) -> None:
        """Wait for the save under way; every rank learns whether it worked."""
        if self.saving is None:
            return
        (step, written), self.saving = self.saving, None
        # A full disk is an OSError, a RuntimeError or a SafetensorError, by the writer; all are faults of the save.
        problem = written.exception() if written is not None else None
        error = distributed.gather(f"{type(problem).__name__}: {problem}" if problem else None)[0]
        self.save_failures.see(step, error)
        if final and error is not None:
            raise faults.TooManyFaults(f"the final checkpoint could not be saved: {error}")

    def export(self, folder: Path) -> list[Path]:
        """Write what the ecosystem reads, with the averaged weights where there are any; every rank calls this."""
        return self._exported(self.network.export, folder) or []

    def _exported(self, export: Callable[[Path, Mapping[str, Tensor]], Any], folder: Path) -> Any:
        with self.average.applied():  # a state on the CPU shares the network's memory, so it is written in here
            state = self.strategy.full_state()
            return export(folder, state) if distributed.is_main() else None

    def _keep_best(self) -> None:
        """Export the averaged weights as the best ones, if that is wanted."""
        if self.settings["checkpoint"]["keep_best"]:
            self._exported(self._export_best, self.folder / "export" / "best")

    def _export_best(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """A failure is told, and the run goes on, as after a failed save; `vireo export` makes it of the checkpoint."""
        try:
            self.network.export(folder, state)
        except Exception as error:  # a full disk, as each writer says it
            log.error("%s could not be written: %s: %s", folder, type(error).__name__, error)

    def _try_export(self) -> None:
        """An export that would fail after days fails now."""
        trial = self.folder / "export" / ".trial"
        self._exported(self.network.try_export, trial)
        if distributed.is_main():
            shutil.rmtree(trial)

    def _check_network(self) -> None:
        """Let the encoder judge the network on a few samples; every rank sees the same ones."""
        stream = Stream(self.dataset, SEED, shuffle=False, cache=self.cache, keep_fields=True)
        places = range(min(self.settings["batch_size"], len(self.dataset)))
        batch = collate(stream.samples([(place, 0) for place in places]))
        draws = Draws(SEED, batch["position"], self.device)
        self.network.eval()
        self.encoder.check_network(self.wrapped, self.encoder(to_device(batch, self.device), draws))
        self.policy.train_mode(self.network)

    def finish(self, progress: Progress) -> int:
        """Export and mark the run as finished, or say how to go on."""
        with _needed("the export"):
            exported = self.export(self.folder / "export") if progress.step == self.steps else []
        if not distributed.is_main():
            return faults.EXIT_FINISHED if progress.step == self.steps else faults.EXIT_STOPPED
        self.console.close()
        if progress.step < self.steps:
            self.log.finish()
            log.info("stopped on request at step %d; the same command goes on from here", progress.step)
            return faults.EXIT_STOPPED
        self.log.finish()
        self.sampler.run_exported(self.folder / "export")  # before the run counts as finished
        with run_folder.dispensable("the picture of the curves"):
            report.curves(self.folder)
        marker = {"step": progress.step, "figures": self.figures, "best": self.best}
        with _needed("the note that the run is finished"):
            run_folder.write_json(self.folder / "finished", marker)
        log.info(report.where_to_look(self.folder, exported, self.figures))
        return faults.EXIT_FINISHED


@contextlib.contextmanager
def _needed(what: str) -> Iterator[None]:
    """Around writing without which a run is not finished: a disk that refuses it is a TooManyFaults.

    Other exceptions pass, since theirs is a traceback that someone has to see.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # as Python's own files say it, and safetensors'
        raise faults.TooManyFaults(
            f"{what} could not be written: {type(error).__name__}: {error}. The final checkpoint is there: the same "
            "command writes what is lacking"
        ) from error


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _deadline(hours: float | None) -> float | None:
    """When so many hours of the command that this process works for are over, whatever was started again meanwhile."""
    if hours is None:
        return None
    return float(os.environ.get(processes.STARTED) or time.time()) + 3600 * hours


def _check_agreement(settings: dict[str, Any]) -> None:
    """All processes have the same config and the same sources, or this raises UserError: one machine may have another
    checkout, and what differs a little would train on for days.
    """
    facts = distributed.gather((socket.gethostname(), config.text_hash(settings), config.source_hash()))
    if len({fact[1:] for fact in facts}) > 1:
        lines = "\n".join(
            f"  rank {rank} on {host}: config {of_config}, sources {of_sources}"
            for rank, (host, of_config, of_sources) in enumerate(facts)
        )
        raise UserError(f"the processes do not run the same:\n{lines}\nIs there another vireo on one of the machines?")


def main(path: Path, text: str | None = None) -> int:
    """Run one process on a resolved config; returns its exit code.

    text: what `path` holds, for a process that was told it.
    """
    code = _main(path, text)
    failed = code not in (faults.EXIT_FINISHED, faults.EXIT_STOPPED)
    if failed:
        processes.note_failure(int(os.environ.get("RANK", "0")))
    if not distributed.close(after_fault=failed):
        os._exit(code)  # whoever waits for this process must learn of the failure
    # torchrun, in whose hands this is, would take a requested stop for a failure, and start again after it.
    return 0 if code == faults.EXIT_STOPPED and "TORCHELASTIC_RUN_ID" in os.environ else code


def _main(path: Path, text: str | None) -> int:
    tracking.silence_telemetry()
    folder = path.parent
    try:
        settings = config.load_resolved(path) if text is None else config.from_text(text)
        with faults.stop_on_signals(_deadline(settings["max_hours"])) as stop:
            return Run(settings, folder, stop).train()
    except UserError as mistake:
        log.error("%s", mistake)
        return faults.EXIT_MISTAKE
    except faults.Stopped as stopped:
        log.info("%s", stopped)
        return faults.EXIT_STOPPED
    except faults.TooManyFaults as fault:
        log.error("%s", fault)
        return faults.EXIT_FAULT
    except Exception as error:
        log.error("%s", traceback.format_exc())
        if faults.is_out_of_memory(error):
            log.error("out of memory. %s", faults.LEVERS)
        return faults.EXIT_FAULT
