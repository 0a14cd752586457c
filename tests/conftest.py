from __future__ import annotations

import os

from hypothesis import settings

# Shared machines are slow at times, which says nothing about the code. Every run of CI tries the
# same cases; elsewhere each run tries others.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
