"""``python -m tests.fuzz.guided READER``: atheris looks for inputs of one reader that reach new code. Needs atheris.

Options of libFuzzer may follow, such as ``-runs=100000`` and ``-seed=1``. It ends at the first finding.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["natsrt"]):
    from tests.fuzz import trial
    from tests.fuzz.readers import READERS, found


def main() -> None:
    reader = READERS[sys.argv[1]]
    corpus = Path(".atheris") / reader.name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, given in enumerate([*reader.corpus, *found(reader.name)]):
        (corpus / str(number)).write_bytes(given)

    def try_one(given: bytes) -> None:
        problem = trial.attempt(reader, given)[1]
        assert problem is None, problem

    atheris.Setup([sys.argv[0], *sys.argv[2:], "-timeout=10", str(corpus)], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
