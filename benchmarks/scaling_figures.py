"""python benchmarks/scaling_figures.py

The tables of docs/scaling.md: arithmetic with the assumptions below, not a measurement. Change them and run it anew.
"""

from typing import NamedTuple

RATE = 200e12  # FLOP/s that a GPU really does in bf16
INSIDE = 200e9  # bytes/s that a GPU sends to the others of its node
ADAPTER = 25e9  # bytes/s of a network adapter (200 Gbit/s)
PCIE = 20e9  # bytes/s between a GPU and its host
NODE = 8  # GPUs


class Recipe(NamedTuple):
    """trained, frozen: parameters. own: those of a learner that the loss owns. flop: of one clip's step."""

    name: str
    trained: float
    frozen: float
    flop: float
    batch: int
    accumulation: int
    own: float = 0.0


RECIPES = (
    Recipe("TAEHV + Seraena", 11.3155e6, 0, 3 * 96.7e9, 2, 2, own=7.4915e6),
    Recipe("IP2P video", 859.751e6, 0, 3 * 180.6e9, 2, 8),
    Recipe("DiffuEraser, stage 1", 1745.59e6, 0, 3 * 10 * 1.61e12, 1, 1),
    Recipe("DiffuEraser, stage 2", 453.209e6, 1745.59e6, 2 * 22 * 1.61e12, 1, 1),
    Recipe("OpenS2V, Wan 1.3B", 148.420e6, 1418.997e6, 2 * 42.7e12, 1, 1),
    Recipe("CogVideoX 2B, LoRA 128", 58.982e6, 1693.784e6, 2 * 133e12, 1, 1),
    Recipe("CogVideoX 2B, full", 1693.784e6, 0, 3 * 133e12, 1, 1),
    Recipe("CogVideoX 5B, LoRA 128", 132.121e6, 5570.283e6, 2 * 361e12, 1, 1),
    Recipe("CogVideoX 5B, full", 5570.283e6, 0, 3 * 361e12, 1, 1),
)
STRATEGIES = ("ddp", "zero2", "zero2_offload", "zero3, fsdp", "fsdp_offload")


def sent(recipe: Recipe, strategy: str, gpus: int) -> float:
    """Bytes that each GPU sends in an optimizer step."""
    share, trained, steps = (gpus - 1) / gpus, 4 * recipe.trained, recipe.accumulation
    weights = trained + 2 * recipe.frozen
    own = 2 * share * 4 * recipe.own * steps
    if strategy == "ddp":
        return 2 * share * trained + own
    if strategy.startswith("zero2"):
        return share * trained * (steps + 1) + own
    return share * steps * (2 * weights + trained) + own


def over_pcie(recipe: Recipe, strategy: str, gpus: int) -> float:
    """Bytes between each GPU and its host in an optimizer step."""
    trained, weights = 4 * recipe.trained / gpus, (4 * recipe.trained + 2 * recipe.frozen) / gpus
    if strategy == "zero2_offload":
        return trained * (recipe.accumulation + 1)
    return recipe.accumulation * (2 * weights + trained) if strategy == "fsdp_offload" else 0


def held(recipe: Recipe, strategy: str, gpus: int) -> float:
    """Bytes of weights, gradients and moments on each GPU, averages and activations apart."""
    trained, frozen, own = recipe.trained, 2 * recipe.frozen, 16 * recipe.own
    match strategy:
        case "ddp":
            return 16 * trained + frozen + own
        case "zero2":
            return 4 * trained + 16 * trained / gpus + frozen + own
        case "zero2_offload":
            return 4 * trained + frozen + own
        case "fsdp_offload":
            return own
    return (16 * trained + frozen) / gpus + own


def seconds(recipe: Recipe, strategy: str, gpus: int, adapters: int = NODE) -> tuple[float, float]:
    """Of arithmetic, and of communication if nothing of it is hidden. adapters: of a node."""
    volume = sent(recipe, strategy, gpus)
    moving = volume / INSIDE + over_pcie(recipe, strategy, gpus) / PCIE
    if gpus > NODE:
        moving += volume / adapters / ADAPTER
    return recipe.accumulation * recipe.batch * recipe.flop / RATE, moving


def table(title: str, columns: tuple[str, ...], cell) -> None:
    print(f"\n{title}\n\n| recipe | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for recipe in RECIPES:
        print(f"| {recipe.name} | {' | '.join(cell(recipe, column) for column in columns)} |")


def efficiency(recipe: Recipe, strategy: str, gpus: int, adapters: int = NODE) -> str:
    arithmetic, moving = seconds(recipe, strategy, gpus, adapters)
    return f"{arithmetic / (arithmetic + moving):.2f}"


def main() -> None:
    gigabytes = [lambda r, s, n=n: f"{held(r, s, n) / 1e9:.2g}" for n in (8, 64)]
    table("GB on each of 8 GPUs", STRATEGIES, gigabytes[0])
    table("GB on each of 64 GPUs", STRATEGIES, gigabytes[1])
    table("GB that each of 8 GPUs sends in a step", STRATEGIES, lambda r, s: f"{sent(r, s, 8) / 1e9:.2g}")
    table("efficiency on 8 GPUs", STRATEGIES, lambda r, s: efficiency(r, s, 8))
    table("efficiency on 64 GPUs, an adapter for each", STRATEGIES, lambda r, s: efficiency(r, s, 64))
    table("efficiency on 64 GPUs, one adapter a node", STRATEGIES, lambda r, s: efficiency(r, s, 64, 1))
    columns = ("seconds of arithmetic a step", "clips/s of a GPU", "clips/s of 8", "clips/s of 64")

    def needed(recipe: Recipe, column: str) -> str:
        arithmetic = seconds(recipe, "ddp", 1)[0]
        clips = recipe.batch * recipe.accumulation / arithmetic
        return f"{dict(zip(columns, (arithmetic, clips, 8 * clips, 64 * clips), strict=True))[column]:.2g}"

    table("what the data path has to give", columns, needed)


if __name__ == "__main__":
    main()
