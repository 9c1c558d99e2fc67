"""The command line: `python train.py …` and `vireo <verb> …`."""

import importlib
import sys
from collections.abc import Sequence

from vireo import faults
from vireo.errors import UserError

VERBS = {
    "train": "train a recipe (the same as python train.py)",
    "check": "look at this machine, or at a recipe's config and data",
    "prepare": "convert a recipe's raw data, fill its cache, or write the demonstration's data",
    "sample": "show what a trained network makes of held-out clips",
    "evaluate": "measure a trained network, or foreign weights, beside naive baselines",
    "export": "write what the ecosystem reads, from any checkpoint",
    "replay": "make a step that was turned away again, one sample at a time",
    "drill": "kill, starve and confuse a composition on purpose, and see whether it survives",
    "runs": "list the runs below outputs",
    "report": "a sweep's table and curves, or a run's, as they are now",
}


def vireo() -> int:
    """Console script `vireo`: the first word is the verb, the rest are key=value."""
    words = sys.argv[1:]
    verb = words[0] if words else "--help"
    if verb == "train":
        sys.argv = ["vireo train", *words[1:]]
        return train()
    if verb not in VERBS:
        lines = "\n".join(f"  vireo {name:<9} {about}" for name, about in VERBS.items())
        print(
            f"vireo trains video models.\n\n{lines}\n\n"
            "`vireo <verb> --help` says more; `vireo train --help` lists the recipes."
        )
        return faults.EXIT_FINISHED if verb in ("--help", "-h", "help") else faults.EXIT_MISTAKE
    return run_verb(verb, words[1:])


def run_verb(verb: str, words: Sequence[str]) -> int:
    """Run one verb; a user's mistake is printed without a traceback."""
    module = importlib.import_module(f"vireo.verbs.{verb}")
    if set(words) & {"--help", "-h"}:
        print(module.__doc__)
        return faults.EXIT_FINISHED
    try:
        return module.main(words)
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return faults.EXIT_MISTAKE


def train() -> int:
    """`python train.py …` and `vireo train …`: one run, or a sweep; a user's mistake is printed without a traceback."""
    from vireo import launch

    # deepspeed's launcher appends a rank, which stands in the environment anyway and which Hydra would not understand.
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank"))]
    try:
        return launch.main(sys.argv[1:])
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return faults.EXIT_MISTAKE
