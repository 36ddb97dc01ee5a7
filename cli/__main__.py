"""``python -m natsrt.cli``: the command ``natsrt``."""

from . import main

main()
