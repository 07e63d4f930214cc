"""The command line: parse words, call core, draw results. See ``app.py``."""
