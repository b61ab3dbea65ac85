"""`python -m nanomai`, which is what torchrun starts on every rank."""

import sys

from nanomai.cli import main

sys.exit(main())
