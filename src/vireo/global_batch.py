"""The samples of one step, which stay the same when a run goes on with another number of processes."""

from vireo.errors import UserError


def accumulation(wanted: int, batch_size: int, processes: int) -> int:
    """Micro-batches of `batch_size` on each process that make a global batch of `wanted` samples.

    Raises UserError with what would do if they cannot.
    """
    if wanted % (batch_size * processes):
        raise UserError(
            f"this run has a global batch of {wanted}, which {processes} processes with batch_size={batch_size} "
            f"cannot share equally; {_what_would_do(wanted, batch_size, processes)}"
        )
    return wanted // (batch_size * processes)


def _what_would_do(wanted: int, batch_size: int, processes: int) -> str:
    ways = []
    if wanted % batch_size == 0:
        numbers = [str(number) for number in _divisors(wanted // batch_size)]
        ways.append(f"launcher.processes={' or '.join(numbers)} can (on all machines together)")
    if wanted % processes == 0:
        size = max(size for size in _divisors(wanted // processes) if size <= batch_size)
        ways.append(f"with {processes}, batch_size={size} allow_changes=[batch_size] can")
    return "; ".join(ways) or f"a number that divides {wanted} can, with batch_size=1 allow_changes=[batch_size]"


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
