"""``python -m natsrt``: the command ``natsrt``, for where the scripts of an environment are not in PATH."""

import sys
from importlib import import_module
from importlib.util import find_spec

# Not an import statement: nothing in natsrt depends on the command line, which is a package of its own.
if find_spec("natsrt_cli") is None:
    sys.exit("natsrt: the command line is not installed in this environment. Install natsrt: pip install -e CHECKOUT")
import_module("natsrt_cli").main()
