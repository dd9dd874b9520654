import sys

if sys.argv[0] == "-m" and any(one.startswith("experiments.") for one in sys.orig_argv):  # python -m experiments.X
    import systems.startup  # noqa: F401
