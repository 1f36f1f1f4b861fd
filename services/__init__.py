"""What stands around the pipeline: sources of traffic. Nothing here imports the pipeline."""
