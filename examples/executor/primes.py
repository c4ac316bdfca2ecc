"""Count of the primes below a million, in twenty calls. `count` takes any executor of
concurrent.futures. The last lines of this program pass the executor of a grid to `count`."""

from concurrent.futures import Executor, as_completed

from batchlab import Grid


def primes(start: int, stop: int) -> int:
    """Return the number of primes from `start` up to, but not including, `stop`."""
    sieve = bytearray([1]) * (stop - start)
    for factor in range(2, int(stop**0.5) + 1):
        first = max(factor * factor, -(-start // factor) * factor) - start
        sieve[first::factor] = bytes(len(range(first, len(sieve), factor)))
    return sum(sieve) - sum(start <= number < stop for number in (0, 1))


def count(executor: Executor, limit: int, step: int) -> int:
    calls = [executor.submit(primes, start, start + step) for start in range(0, limit, step)]
    return sum(call.result() for call in as_completed(calls))


if __name__ == "__main__":
    with Grid("local") as grid, grid.executor() as executor:
        print(count(executor, 1_000_000, 50_000))
