"""Random histories of real programs and faults on a small home, and a model that says what must be true after each step."""
