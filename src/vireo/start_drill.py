"""A worker of a drill: `python -m vireo.start_drill <parent's number> <run>/resolved.yaml [<fault>]`.

What it says goes to `console.txt` beside the config, since a drill is many runs.
"""

import contextlib
import sys
from pathlib import Path

from vireo import orphans

if __name__ == "__main__":
    orphans.die_with_parent(int(sys.argv[1]))

    from vireo import drill, worker
    from vireo.console import set_up_logging

    resolved = Path(sys.argv[2])
    with (
        open(resolved.with_name("console.txt"), "a") as console,
        contextlib.redirect_stdout(console),
        contextlib.redirect_stderr(console),
    ):
        set_up_logging(resolved.parent / "train.log")
        for title in sys.argv[3:]:
            next(fault for fault in drill.FAULTS if fault.title == title).arm()
        code = worker.main(resolved)
    sys.exit(code)
