"""`python -m adapterhub_lite.cli`."""

from .main import main

main()
