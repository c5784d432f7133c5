"""How Hypothesis runs: no deadline, since machines are shared; with ``CI`` set, the same examples always."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# A shell that starts a job in the background has it ignore Ctrl-C, and every child inherits
# that; some tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
