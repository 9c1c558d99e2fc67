"""vireo replay run=<run> [step=500]

Make a step that was turned away again, one sample at a time: which sample, which term of the loss, which parameters.
The steps between the newest checkpoint before it and the step are made anew, so they take their time once more; nothing
is written into the run. Without step=, the last one that was turned away (<run>/incidents lists them).
"""

from collections.abc import Sequence

from vireo.errors import UserError
from vireo.verbs import arguments


def main(words: Sequence[str]) -> int:
    given = arguments.read(words, ("step",))
    if given.folder is None:
        raise UserError("vireo replay needs run=<run> (`vireo runs` lists them)")
    from vireo import incidents, report
    from vireo.replay import SHOWN, replay

    known = incidents.steps(given.folder)
    step = arguments.whole(given.own, "step", known[-1] if known else None)
    if step is None or step not in known:
        asked = "no step of it" if step is None else f"step {step} of it"
        rest = f"; there are {', '.join(map(str, known))}" if known else ""
        raise UserError(f"{given.folder}: {asked} was turned away and kept in {incidents.FOLDER}/{rest}")
    incident = incidents.read(given.folder, step)
    print(f"step {step} of {given.folder}, {incident.diagnosis()}", flush=True)
    samples = replay(given.settings, given.folder, incident)
    rows = [
        {"position": s.position, "sample": s.name, **s.terms, "gradient norm": s.gradient_norm, "finite": s.finite}
        for s in samples
    ]
    print(report.table(rows))
    broken = [sample for sample in samples if not sample.finite]
    if not broken:
        print(
            "Every sample alone is finite. The run's own verdict came from another device or precision, from samples "
            "that only together overflow, or from a guard such as faults.max_loss_rise."
        )
    for sample in broken:
        parameters = ", ".join(sample.parameters[:SHOWN]) or "none"
        more = f" and {len(sample.parameters) - SHOWN} more" if len(sample.parameters) > SHOWN else ""
        print(f"{sample.name}: gradients that are not finite: {parameters}{more}")
    return 0
