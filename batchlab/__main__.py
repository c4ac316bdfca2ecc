"""Entry point of python -m batchlab."""

from batchlab.cli import main

main()
