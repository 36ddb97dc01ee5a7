"""A fuzzer for everything that natsrt reads from the wire: ``python -m tests.fuzz``.

The corpus is the vectors in `tests/vectors`, what natsrt itself writes, and the inputs that once broke something
(`tests/fuzz/found`). The mutator changes them, as bytes and as JSON. A reader may return a value or raise the typed
error that its docstring names; anything else is a finding, and so is more than a bounded time or memory.
"""
