"""Landing files: the entries of the folder, the lines of a file, and the files that a checkpoint lists."""
