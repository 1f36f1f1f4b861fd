"""``python -m orchestration.cli`` is ``adtally``."""

from orchestration.cli.app import main

main()
