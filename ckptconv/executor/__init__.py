"""The only code that moves bytes: work units, threads, journal, commit. `execute.py` is its face."""
