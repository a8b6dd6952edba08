"""``python -m prunetool``."""

from prunetool.cli import main

main()
