"""`python -m secateur.sync`: the same as `secateur sync`."""

import sys

from secateur.cli import main

if __name__ == "__main__":
    main(["sync", *sys.argv[1:]])
