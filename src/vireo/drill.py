"""Faults on purpose: what happens in a run that is killed, starved or fed with rubbish, compared with one that is not.

Every fault is made for real in the processes of a run of a few steps; then the same command is given again, as a
person or a batch system would. Used by `vireo drill` on a user's own composition, and by the tests on every recipe.
"""

import json
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vireo import checkpoint, config, faults
from vireo.config.instantiation import locate
from vireo.errors import UserError

STEPS, EVERY, AT = 6, 2, 3  # of a drill: its length, from save to save, and the step (from 0) in which the fault comes
# Figures that two equal runs differ in.
UNEQUAL = ("seconds_per_step", "data_wait", "host_memory", "device_allocated", "device_reserved", "device_memory")
CLOSE = 1e-3  # relative, of losses, where the arithmetic is another one

# What a drill changes in a composition.
SHORT = (
    f"steps={STEPS}", "epochs=null", f"checkpoint.every={EVERY}", "checkpoint.every_minutes=null",
    "checkpoint.keep_last=3", "checkpoint.keep_best=false", "validation.every=null", "validation.at_start=false",
    "validation.clips=1", "logging.every=1", "tracker=none", "preempt_at=null", "max_hours=null", "resume=auto",
)  # fmt: skip


class Fault(NamedTuple):
    """title: its name on the command line. what: what is done, for people. arm: breaks something in a process that is
    about to run. code: of the run that it hits. then: what the same command given again must lead to, "same" (equal to
    an undisturbed run, bit by bit on the CPU), "close" (equal but for rounding) or "finite". between: what is done to
    the run's folder before that. loader: changed keys of that node. needs: of the settings, or why it makes no sense.
    """

    title: str
    what: str
    arm: Callable[[], None]
    code: int
    then: str = "same"
    between: Callable[[Path], None] | None = None
    loader: Mapping[str, float] = {}
    needs: Callable[[Mapping[str, Any]], str | None] = lambda settings: None
    figure: str | None = None  # of the logged ones, that must count the fault


class Result(NamedTuple):
    """How one fault went. survived: None if it was not tried. detail: why not, or what was compared."""

    title: str
    what: str
    survived: bool | None
    detail: str
    seconds: float


def settings_of(words: Collection[str], outputs: Path) -> dict[str, Any]:
    """The composition that `words` name, cut to a drill's length; its cache stays where it is.

    Raises UserError for a chain, whose own composition is none of its stages'.
    """
    whole = config.settings(list(words))
    if whole["chain"]:
        stages = config.stages(whole["chain"], list(words))
        raise UserError(
            f"experiment={whole['experiment']} is a chain of {len(stages)} stages, and a drill is of one run. Drill "
            "each by itself:\n" + "\n".join(f"  vireo drill {shlex.join(of_stage)}" for of_stage in stages.values())
        )
    cache = [f"cache.folder={whole['cache']['folder']}"] if whole["cache"]["enabled"] else []
    return config.settings([*words, *SHORT, *cache, "run=undisturbed", f"paths.outputs={outputs}"])


def drill(
    settings: Mapping[str, Any],
    start: Callable[[Path, Fault | None], int],
    exact: bool,
    only: Collection[str] = (),
    undisturbed: Path | None = None,
) -> Iterator[Result]:
    """Try each fault, or those in `only`, on a composition from `settings_of`.

    start: runs all processes on a run's folder, with a fault in them, and returns the worst exit code. exact: whether
    the device gives the same bits twice. undisturbed: the folder of such a run, if it is there already.
    Raises RuntimeError if the composition does not even run undisturbed.
    """
    if undisturbed is None:
        undisturbed = _make(settings, "undisturbed")
        code = start(undisturbed, None)
        if code != faults.EXIT_FINISHED:
            raise RuntimeError(f"without any fault the run ends with exit code {code}; see {undisturbed}/train.log")
    for fault in FAULTS:
        if only and fault.title not in only:
            continue
        if fault.then == "close" and not locate(settings["loss"]["_target_"]).is_local:
            fault = fault._replace(then="finite")  # a loss that learns itself takes smaller batches for other ones
        began, senseless = time.monotonic(), fault.needs(settings)
        problem = senseless or _survives(fault, settings, start, exact, undisturbed)
        survived = None if senseless else problem is None
        yield Result(fault.title, fault.what, survived, problem or PROVEN[fault.then], time.monotonic() - began)


PROVEN = {
    "same": "goes on, equal to an undisturbed run",
    "close": "goes on, losses those of an undisturbed run",
    "finite": "goes on, counted, all weights finite",
}


def _make(settings: Mapping[str, Any], name: str, loader: Mapping[str, float] = {}) -> Path:  # noqa: B006 - never written to
    own = {**settings, "run": name, "loader": {**settings["loader"], **loader}}
    folder = config.run_folder(own)
    folder.mkdir(parents=True)
    config.save_resolved(own, folder / "resolved.yaml")
    return folder


def _survives(
    fault: Fault,
    settings: Mapping[str, Any],
    start: Callable[[Path, Fault | None], int],
    exact: bool,
    undisturbed: Path,
) -> str | None:
    """What went wrong; None if nothing did."""
    folder = _make(settings, fault.title, fault.loader)
    code = start(folder, fault)
    if code != fault.code:
        return f"ended with exit code {code}, {fault.code} was expected; see {folder}/train.log"
    if fault.between is not None:
        fault.between(folder)
    if not (folder / "finished").exists():
        code = start(folder, None)
        if code != faults.EXIT_FINISHED:
            return f"given again, the command ends with exit code {code}; see {folder}/train.log"
    if fault.figure is not None and not _logged(folder)[-1][fault.figure]:
        return f"{fault.figure} in {folder}/metrics.jsonl does not count it"
    if fault.then == "finite":
        return _not_finite(folder)
    return difference(undisturbed, folder, exact and fault.then == "same")


def difference(one: Path, two: Path, exact: bool) -> str | None:
    """The first thing in which two finished runs differ: logged figures or tensors of the last checkpoint."""
    first, second = _logged(one), _logged(two)
    if len(first) != len(second):
        return f"{len(second)} steps were logged, {len(first)} in an undisturbed run"
    for a, b in zip(first, second, strict=True):
        for name in a.keys() | b.keys():
            x, y = a.get(name), b.get(name)
            is_loss = name == "loss" or name == "step"
            same = x == y if exact else not is_loss or math.isclose(x or 0, y or 0, rel_tol=CLOSE)
            if name not in UNEQUAL and not same:
                return f"{name} of step {a['step']} is {y}, {x} in an undisturbed run"
    return _unequal_tensors(one, two) if exact else None


def _logged(folder: Path) -> list[dict[str, Any]]:
    """Rows of training steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def _unequal_tensors(one: Path, two: Path) -> str | None:
    a, b = checkpoint.latest(one), checkpoint.latest(two)
    if a is None or b is None or a.step != b.step:
        return f"the last checkpoints are {a and a.folder} and {b and b.folder}"
    for part in ("network", "optimizer", "ema", "loss"):
        first, second = a.tensors(part), b.tensors(part)
        unequal = [name for name in first if name not in second or not first[name].equal(second[name])]
        if unequal or first.keys() != second.keys():
            return f"{part} differs in {len(unequal)} of {len(first)} tensors, for instance {unequal[:1]}"
    return None


def _not_finite(folder: Path) -> str | None:
    found = checkpoint.latest(folder)
    if found is None:
        return f"{folder} has no good checkpoint"
    broken = [name for name, value in found.tensors("network").items() if not bool(value.isfinite().all())]
    return f"weights that are not finite: {broken[:3]}" if broken else None


# ------------------------------------------------------------ what is broken, in each process before it runs


def _at_step(step: int, act: Callable[[], None]) -> None:
    """Act in the middle of a step, after its data has come."""
    from vireo import training

    seed_default = training.seed_default

    def disturbed(seed: object, purpose: str, position: Any) -> None:
        if position[:2] == (step, 0):
            act()
        seed_default(seed, purpose, position)

    training.seed_default = disturbed


def _signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _kill_in_a_save() -> None:
    checkpoint._flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # files are written, nothing is renamed yet


def _fill_the_disk() -> None:
    flush, calls = checkpoint._flush, []

    def full(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        flush(path)

    checkpoint._flush = full


def _poison() -> None:
    """The loss of the last rank is not finite in one step."""
    from vireo import distributed, training

    forward = training._forward

    def poisoned(network: Any, encoder: Any, loss: Any, batch: Any, draws: Any, strategy: Any) -> Any:
        objective = forward(network, encoder, loss, batch, draws, strategy)
        if draws.step == AT and distributed.rank() == distributed.world_size() - 1 and objective is not None:
            return objective._replace(total=objective.total * float("nan"))
        return objective

    training._forward = poisoned


def _take_memory() -> None:
    """The last rank has room for half a batch, from one step on."""
    import torch

    from vireo import distributed, training

    to_device, here = training.to_device, {"step": -1}

    def tight(batch: dict[str, Any], device: Any) -> dict[str, Any]:
        if here["step"] >= AT and distributed.rank() == distributed.world_size() - 1 and len(batch["position"]) > 1:
            raise torch.OutOfMemoryError("out of memory (a drill)")
        return to_device(batch, device)

    training.to_device = tight
    _at_step(AT, lambda: here.update(step=AT))


def _take_memory_in_backward() -> None:
    """Memory runs out in a backward pass of the last rank, when others are in its collectives."""
    import torch

    from vireo import distributed, training

    forward = training._forward

    def full(gradient: Any) -> None:
        raise torch.OutOfMemoryError("out of memory (a drill)")

    def hooked(network: Any, encoder: Any, loss: Any, batch: Any, draws: Any, strategy: Any) -> Any:
        objective = forward(network, encoder, loss, batch, draws, strategy)
        is_last = distributed.rank() == distributed.world_size() - 1
        if objective is not None and draws.step == AT and is_last and len(batch["position"]) > 1:
            objective.total.register_hook(full)
        return objective

    training._forward = hooked


def _break_a_file() -> None:
    """One entry cannot be read, the first time that it is asked for."""
    from vireo.data.stream import Stream

    draw = Stream._draw

    def broken(self: Stream, position: int, step: int, attempt: int = 0, bad: Any = ()) -> Any:
        if step == AT and position % 2 == 0 and attempt == 0:
            bad, attempt = [*bad, ("a file (a drill)", "damaged")], 1
        return draw(self, position, step, attempt, bad)

    Stream._draw = broken  # type: ignore[method-assign]


def _in_a_loader_worker(act: Callable[[], None]) -> Callable[[], None]:
    def arm() -> None:
        import torch.utils.data

        from vireo.data.stream import Stream

        samples = Stream.__getitems__

        def disturbed(self: Stream, places: Any) -> Any:
            if places[0][1] == AT and torch.utils.data.get_worker_info() is not None:
                act()
            return samples(self, places)

        Stream.__getitems__ = disturbed  # type: ignore[method-assign]

    return arm


def _damage_the_newest(folder: Path) -> None:
    newest = checkpoint.folder_of(folder, checkpoint.steps(folder)[-1]) / "network.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1  # which a safetensors file does not notice by itself
    newest.write_bytes(data)


def _needs_samples(settings: Mapping[str, Any]) -> str | None:
    return "batch_size is 1, there is nothing smaller to try" if settings["batch_size"] < 2 else None


def _needs_what_can_be_tried_again(settings: Mapping[str, Any]) -> str | None:
    if too_few := _needs_samples(settings):
        return too_few
    if settings["launcher"]["processes"] == 1:
        return None
    strategy, loss = (locate(settings[node]["_target_"]) for node in ("strategy", "loss"))
    zero = settings["strategy"].get("config", {}).get("zero_optimization", {})
    if strategy.forward_is_local is False or zero.get("stage") == 3 or not loss.is_local:
        return "other processes wait within this forward pass: they end, and start again in smaller pieces"
    return None


def _needs_workers(settings: Mapping[str, Any]) -> str | None:
    return "loader.workers is 0" if not settings["loader"]["workers"] else None


KILLED = 128 + signal.SIGKILL
FAULTS = (
    Fault("kill", f"SIGKILL in step {AT}", lambda: _at_step(AT, _signal(signal.SIGKILL)), KILLED),
    Fault("kill-save", "SIGKILL while the first checkpoint is written", _kill_in_a_save, KILLED),
    Fault("stop", f"SIGTERM in step {AT}", lambda: _at_step(AT, _signal(signal.SIGTERM)), faults.EXIT_STOPPED),
    Fault("disk-full", "no space for the first checkpoint", _fill_the_disk, faults.EXIT_FINISHED),
    Fault(
        "damage",
        "a byte of the newest checkpoint is flipped",
        lambda: _at_step(STEPS - 1, _signal(signal.SIGKILL)),
        KILLED,
        between=_damage_the_newest,
    ),
    Fault(
        "not-finite",
        f"the loss of one process is NaN in step {AT}",
        _poison,
        faults.EXIT_FINISHED,
        then="finite",
        figure="skipped_steps",
    ),
    Fault(
        "memory",
        f"one process has room for half a batch from step {AT} on",
        _take_memory,
        faults.EXIT_FINISHED,
        then="close",
        needs=_needs_what_can_be_tried_again,
        figure="memory_retries",
    ),
    Fault(
        "memory-backward",
        f"one process has none left in the backward pass of step {AT}",
        _take_memory_in_backward,
        faults.EXIT_FAULT,
        then="close",
        needs=_needs_samples,
    ),
    Fault(
        "bad-file",
        f"files of step {AT} cannot be read",
        _break_a_file,
        faults.EXIT_FINISHED,
        then="finite",
        figure="bad_files",
    ),
    Fault(
        "kill-loader",
        "a loader worker is killed",
        _in_a_loader_worker(_signal(signal.SIGKILL)),
        faults.EXIT_FAULT,
        needs=_needs_workers,
    ),
    Fault(
        "hang-loader",
        "a loader worker gives nothing any more",
        _in_a_loader_worker(lambda: time.sleep(3600)),
        faults.EXIT_FAULT,
        loader={"timeout": 5.0},
        needs=_needs_workers,
    ),
)
