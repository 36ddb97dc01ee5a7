"""``python -m natsrt_cli``: the command ``natsrt``."""

from . import main

main()
