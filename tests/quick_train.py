"""train.py with a row in the log for every step and cheap pictures, for tests that start a program.

Importing this file makes the pictures cheap: few of them, in few steps without guidance.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import output
import sample
import train

CHEAP = dict(ar_steps=2, diffusion_steps=2, cfg=1.0, prior_steps=2, prior_cfg=0.0)

sample.SAMPLING["tiny"] |= CHEAP
output.ROWS = 2
if __name__ == "__main__":
    checkpoint.LOG_EVERY = 1
    train.main()
