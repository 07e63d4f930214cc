"""One module per data set: its files or official annotations become a manifest."""
