"""One file a question: `python -m experiments.NAME --help`."""
