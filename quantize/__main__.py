"""`python -m quantize`."""

import sys

from quantize.cli import main

if __name__ == "__main__":
    sys.exit(main())
