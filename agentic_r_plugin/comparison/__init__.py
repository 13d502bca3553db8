"""Comparison of retrievers that are made in several ways from the data of one run (`experiment`)."""
