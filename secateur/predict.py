"""`python -m secateur.predict MODEL IMAGE...`: the same as `secateur predict`."""

import sys

from secateur.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
