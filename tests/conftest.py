"""Lets the tests import the product's files, whichever folder pytest is started from."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
