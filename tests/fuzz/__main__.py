"""``python -m tests.fuzz``: tries a million inputs on everything that natsrt reads from the wire."""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from tests.fuzz import trial, worker
from tests.fuzz.readers import READERS, Reader
from tests.fuzz.trial import Outcome

_SHARE_OF_WORKER = 20
"""One input of this many goes to the running worker, which takes longer for each."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1)
@click.option("--inputs", default=1_000_000, show_default=True, help="Number of inputs, of all readers together.")
@click.option("--seed", default=None, type=int, help="Try the inputs of an earlier run again. Default: any.")
@click.option("--save/--no-save", default=True, help="Keep what breaks a reader in tests/fuzz/found.")
@click.option("--list", "listing", is_flag=True, help="Only list the readers.")
def main(names: tuple[str, ...], inputs: int, seed: int | None, save: bool, listing: bool) -> None:
    """Try inputs on the readers NAMES, all if there are none. The exit code is 1 if one of them breaks."""
    everything = [*READERS, worker.NAME]
    if unknown := [name for name in names if name not in everything]:
        raise click.UsageError(f"no reader {unknown[0]!r}; there are {', '.join(everything)}")
    if listing:
        print("\n".join(everything))
        return
    logging.disable(logging.WARNING)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    chosen = [READERS[name] for name in names or READERS if name in READERS]
    print(f"seed {seed}")
    for_worker = 0
    if worker.NAME in names or not names:
        for_worker = inputs // _SHARE_OF_WORKER if chosen else inputs
    broken = _try_all(chosen, inputs - for_worker, seed, save)
    if for_worker:
        broken += _try_worker(for_worker, seed)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB at most; {broken or 'no'} findings")
    sys.exit(1 if broken else 0)


def _try_all(readers: Sequence[Reader], inputs: int, seed: int, save: bool) -> int:
    broken = 0
    for reader in readers:
        began = time.monotonic()
        outcome = trial.run(reader, inputs // len(readers), seed)
        _report(reader.name, outcome, time.monotonic() - began)
        broken += len(outcome.findings)
        for problem, given in outcome.findings.items():
            short = trial.shortened(reader, given, problem)
            kept = f" in {trial.save(reader, short, Path(__file__).parent / 'found')}" if save else ""
            print(f"  {problem}\n    {short[:300]!r}{kept}")
    return broken


def _try_worker(inputs: int, seed: int) -> int:
    began = time.monotonic()
    outcome = asyncio.run(worker.run(inputs, seed))
    _report(worker.NAME, outcome, time.monotonic() - began)
    for problem, given in outcome.findings.items():
        print(f"  {problem}\n    {given[:300]!r}")
    return len(outcome.findings)


def _report(name: str, outcome: Outcome, seconds: float) -> None:
    print(
        f"{name:16}{outcome.tried:>10,} inputs, {outcome.read:>9,} read, {outcome.refused:>9,} refused, "
        f"slowest {outcome.slowest:.3f} s, {len(outcome.findings)} findings, {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
