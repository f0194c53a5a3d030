"""The entry point of `python -m specserve.cli`."""

import sys

from specserve.cli.main import main

sys.exit(main())
