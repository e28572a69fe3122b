"""train.py with few sampling steps, so that the pictures at its end take no time; started by test_train.py."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
import train

sample.SAMPLING["tiny"] |= dict(ar_steps=2, diffusion_steps=2, prior_steps=2)
if __name__ == "__main__":
    train.main()
