"""What the tests of pages need: Chromium, which this installs with apt where it may. Quick when it is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

INSTALL_CHROMIUM = "sudo apt-get install -y chromium"
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """Return the path of the browser that tests open pages with; None if none is installed."""
    return next((path for path in map(shutil.which, _NAMES) if path is not None), None)


def main() -> int:
    """Install Chromium if it is missing; the exit status of the process."""
    if find_chromium() is not None:
        return 0
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") is not None and (not as_root or shutil.which("sudo") is not None):
        print("adtally: Chromium is not installed; installing it with apt-get", flush=True)
        # Without the update, a machine with old package lists asks for a version that the mirror no longer has.
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            subprocess.run([*as_root, "apt-get", *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
    if find_chromium() is None:
        print(
            f"adtally: error: the tests of pages need Chromium, which could not be installed (install it: {INSTALL_CHROMIUM})",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
