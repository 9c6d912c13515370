"""`python -m iv3jax.cli` is `iv3`."""

import sys

from iv3jax.cli import main

sys.exit(main())
