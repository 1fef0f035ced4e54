"""`python -m secateur.recipe`: the same as `secateur recipe`."""

import sys

from secateur.cli import main

if __name__ == "__main__":
    main(["recipe", *sys.argv[1:]])
