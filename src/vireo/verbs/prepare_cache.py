"""`vireo prepare … cache=fill|status|verify|prune`: the encodings of frozen networks that a recipe trains on."""

import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vireo import config
from vireo.console import set_up_logging
from vireo.errors import UserError
from vireo.verbs.arguments import Arguments

if TYPE_CHECKING:
    from vireo.cache import Cache
    from vireo.cache_manifests import Manifest
    from vireo.data.stream import Dataset
    from vireo.models.encoders import Encoder

ACTIONS = ("fill", "status", "verify", "prune")
SHOWN = 3  # names beside a reason
MIB = 2**20


def main(arguments: Arguments, action: str) -> int:
    """Do one of ACTIONS for the config; 2 if `verify` finds damaged entries, else 0.

    The cache need not be switched on in the config. Raises UserError for another action.
    """
    if action not in ACTIONS:
        raise UserError(f"cache={action}: expected one of {', '.join(ACTIONS)}")
    settings = {**arguments.settings, "cache": {**arguments.settings["cache"], "enabled": True}}
    if settings["size"] == "mini":
        from vireo.mini import world

        world.ensure()
    from vireo import digests

    if settings["cache"]["verify"] == "bytes":
        digests.distrust()
    return {"fill": _fill, "status": _status, "verify": _verify, "prune": _prune}[action](settings)


def _made(settings: dict[str, Any]) -> "tuple[Encoder, dict[str, Dataset], Cache]":
    """Encoder, datasets by split, and the encoder's cache."""
    from vireo import objects

    encoder = objects.encoder(settings)
    cache = objects.cache(settings, encoder)
    assert cache is not None
    return encoder, {split: objects.dataset(settings, split) for split in ("train", "validation")}, cache


def _fill(settings: dict[str, Any]) -> int:
    from vireo import cache_filling, faults
    from vireo.verbs import trained

    encoder, datasets, cache = _made(settings)
    encoder.to(trained.device())
    set_up_logging()
    began = time.monotonic()
    with faults.stop_on_signals() as stop:
        filled = cache_filling.fill(
            cache,
            datasets,
            encoder,
            config.cache_name(settings),
            batch_size=settings["cache"]["batch_size"],
            workers=settings["loader"]["workers"],
            timeout=settings["loader"]["timeout"],
            thorough=settings["cache"]["verify"] == "bytes",
            stop=stop,
        )
    print(
        f"{filled.entries} entries, {filled.encoded} of them new, in {time.monotonic() - began:.0f} s: {cache.folder}"
    )
    if filled.stopped:
        print("stopped on request; the same command goes on from here")
        return faults.EXIT_STOPPED
    return faults.EXIT_FINISHED


def _status(settings: dict[str, Any]) -> int:
    from vireo import cache_filling, cache_manifests, report

    _, datasets, cache = _made(settings)
    thorough = settings["cache"]["verify"] == "bytes"
    entries = cache_filling.wanted(cache, datasets)
    missing = cache.missing(entries, thorough)
    manifests = cache_manifests.read(cache.folder)
    rows = []
    for output in sorted({one.output for one in entries.values()}):
        keys = [key for key, one in entries.items() if one.output == output]
        sizes = [cache.path(output, entries[key].source).stat().st_size for key in keys if key not in missing]
        rows.append(
            {"output": output, "needed": len(keys), "there": len(sizes), "missing": len(keys) - len(sizes),
             "MiB": round(sum(sizes) / MIB, 1)}
        )  # fmt: skip
    print(f"{settings['experiment']} ({settings['size']}): {cache.folder}")
    print(report.table(rows) if rows else "there is nothing to cache: the encoder has no outputs of files or texts")
    reasons = cache_manifests.reasons(cache_filling.listed(cache, missing), manifests)
    names: dict[str, list[str]] = defaultdict(list)
    for key, reason in reasons.items():
        names[reason].append(missing[key].name)
    for reason, count in Counter(reasons.values()).most_common():
        shown = ", ".join(names[reason][:SHOWN]) + (", …" if count > SHOWN else "")
        print(f"  {count} missing, {reason}: {shown}")
    _print_manifests(cache.folder, manifests)
    return 0


def _print_manifests(folder: Path, manifests: "list[Manifest]") -> None:
    """Who needs what of the folder, and how much of it nobody needs."""
    from vireo import cache, report

    sizes = {path.stem: path.stat().st_size for path in cache.entries(folder)}
    users = Counter(key for manifest in manifests for key in manifest.entries)
    rows = []
    for manifest in manifests:
        own = sum(sizes.get(key, 0) for key in manifest.entries if users[key] == 1)
        there = sum(key in sizes for key in manifest.entries)
        days = (time.time() - manifest.file.stat().st_mtime) / 86400
        rows.append(
            {"composition": manifest.file.stem, "entries": there, "MiB of its own": round(own / MIB, 1),
             "days unused": round(days, 1)}
        )  # fmt: skip
    if rows:
        print(f"\n{report.table(rows)}")
    unused = [size for key, size in sizes.items() if key not in users]
    print(f"{len(sizes)} entries, {sum(sizes.values()) / MIB:.1f} MiB; {len(unused)} of them nobody asks for any more")


def _verify(settings: dict[str, Any]) -> int:
    from vireo import cache

    folder, damaged, good = Path(settings["cache"]["folder"]).expanduser().absolute(), 0, []
    for path in sorted(cache.entries(folder)):
        try:
            good.append(cache.verify(path))
        except FileNotFoundError:  # pruned in the meantime
            continue
        except cache.Damaged as damage:
            damaged += 1
            print(f"{path}: {damage}")
    print(f"{len(good)} entries are good ({sum(good) / MIB:.1f} MiB), {damaged} are damaged: {folder}")
    if damaged:
        print("damaged ones count as missing; cache=fill cache.verify=bytes makes them anew")
    return 2 if damaged else 0


def _prune(settings: dict[str, Any]) -> int:
    from vireo import cache_filling, cache_manifests

    _, datasets, cache = _made(settings)
    entries = cache_filling.listed(cache, cache_filling.wanted(cache, datasets))
    cache_manifests.write(cache.folder, config.cache_name(settings), entries)
    pruned = cache_manifests.prune(cache.folder)
    print(f"removed {pruned.removed} entries ({pruned.removed_bytes / MIB:.1f} MiB): {cache.folder}")
    print(f"kept {pruned.kept} ({pruned.kept_bytes / MIB:.1f} MiB) that this or another composition needs")
    return 0
