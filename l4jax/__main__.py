"""`python -m l4jax VERB ...` is the same as `l4jax VERB ...`."""

import sys

from l4jax.cli import main

sys.exit(main())
