"""The comparison with the images that people use instead. `make bench` runs it."""
