"""`python -m maisi` is `maisi`."""

from maisi.cli import main

main()
