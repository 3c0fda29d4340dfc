"""Where what can be made again is kept between processes."""

import os
from pathlib import Path


def user_cache_directory() -> Path | None:
    """Where the XDG Base Directory Specification puts our cache; None for a user without a home."""
    home = os.path.expanduser("~")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(home, ".cache")
    return Path(base) / "prfaas" if os.path.isabs(base) else None
