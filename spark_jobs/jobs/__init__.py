"""What can be run: read, transform, write."""
