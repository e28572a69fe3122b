"""Test of the rule behind the reference weights: it gives the values of the reference models."""
import torch

import golden


def test_the_weight_rule_gives_the_noted_values():
    """`golden.weight` gives the weights that the reference models had.

    Every comparison with a reference rests on this rule. If this test fails, believe no other
    golden test.
    """
    noted = golden.load("weights_check")
    for i, key in enumerate(noted["keys"]):
        shape = tuple(int(n) for n in str(noted["shapes"][i]).split(","))
        found = golden.weight(str(key), shape)

        first = found.flatten()[:8].tolist()
        assert first == noted["first8"][i][:found.numel()].tolist(), key

        total = found.double().sum()
        assert torch.isclose(total, noted["sum"][i], rtol=1e-12), key

        total_of_squares = found.double().square().sum()
        assert torch.isclose(total_of_squares, noted["sum_of_squares"][i], rtol=1e-12), key
