import sys

if sys.argv[0] == "-m":  # python -m experiments.X, and X itself is not imported yet
    import systems.startup  # noqa: F401
