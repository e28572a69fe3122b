"""train.py with a fourth layer in MixAR's encoder and decoder, for findings.py.

dcmix then has about as many parameters as dcca.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import backbone
import train

backbone.PRESETS["tiny"]["mar"]["depth"] = 4
if __name__ == "__main__":
    train.main()
