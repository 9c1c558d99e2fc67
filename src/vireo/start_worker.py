"""The first lines of a worker process: `python -m vireo.start_worker <parent's number> <run>/resolved.yaml`.

Importing torch takes seconds, in which the parent may be killed; so the worker is tied to it before.
"""

import sys
from pathlib import Path

from vireo import orphans

if __name__ == "__main__":
    orphans.die_with_parent(int(sys.argv[1]))

    from vireo import worker
    from vireo.console import set_up_logging

    resolved = Path(sys.argv[2])
    set_up_logging(resolved.parent / "train.log")
    sys.exit(worker.main(resolved))
