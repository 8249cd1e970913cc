"""``python -m spectral_core train|fuse|export|info|generate``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
