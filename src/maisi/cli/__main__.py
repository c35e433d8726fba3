"""`python -m maisi.cli` is `maisi`."""

from maisi.cli import main

main()
