"""`python -m maxstack` is the command `maxstack`."""

import sys

from maxstack.cli import main

sys.exit(main())
