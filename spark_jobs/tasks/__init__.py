"""What a batch's tasks do in Spark's Python workers: stage the splits, then write the data files."""
