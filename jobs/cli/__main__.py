"""`python -m jobs.cli`: the command line without the console script."""

from __future__ import annotations

from jobs.cli.main import main

main()
