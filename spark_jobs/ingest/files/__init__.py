"""Landing files: what lies in the folder, which lines a file has, and what a checkpoint says of it."""
