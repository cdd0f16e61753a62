"""`python -m llamahome` is the command line."""

from llamahome.cli import main

main()
