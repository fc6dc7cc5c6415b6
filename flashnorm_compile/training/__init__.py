"""A complete private training run, as the command line starts it: digits, model, loop, report."""
