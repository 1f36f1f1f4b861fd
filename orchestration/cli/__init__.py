"""The command ``adtally``."""
