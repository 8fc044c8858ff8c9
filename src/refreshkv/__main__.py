"""`python -m refreshkv`: the command line without the console script."""

from refreshkv.cli import main

main()
