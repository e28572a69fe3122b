"""train.py --ti-mix with other readings of Eqs. (10) to (12), for findings.py.

Its first argument names one:

    fit         g_M also sees the tokens that Eq. (12) keeps, so x_hat fits them
    share       lambda is 0.8 at every step
    floor0.8    lambda falls from 1 to 0.8 only
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mixing
import train

predict_masked = mixing.predict_masked
ti_mix = mixing.ti_mix
waiting = {}


def remember(g_M, x_d, m, y, u):
    """In place of Eqs. (10) and (11), which `fit` can compute only when rho is known."""
    waiting.update(g_M=g_M, y=y, u=u)
    return x_d


def fit(x_d, x_hat, m, rho, lam):
    """Eqs. (10) to (12), where the mask of Eqs. (10) and (11) is m and rho >= lambda."""
    generated = m & (rho >= lam)
    x_hat = predict_masked(waiting["g_M"], x_d, generated, waiting["y"], waiting["u"])
    return ti_mix(x_d, x_hat, m, rho, lam)


def constant(step, steps):
    return 0.8


def falling(step, steps):
    return 1 - 0.2 * step / max(steps - 1, 1)


if __name__ == "__main__":
    reading = sys.argv.pop(1)
    if reading == "fit":
        mixing.predict_masked = remember
        mixing.ti_mix = fit
    elif reading == "share":
        mixing.ti_lambda = constant
    elif reading == "floor0.8":
        mixing.ti_lambda = falling
    else:
        sys.exit(f"{reading}: no such reading")
    train.main()
