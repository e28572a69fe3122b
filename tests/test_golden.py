"""The rule behind the reference weights gives the values noted when the reference models were run."""
import torch

import golden


def test_the_weight_rule_gives_the_noted_values():
    """Every comparison with a reference rests on this rule: if this test fails, believe no other golden test."""
    noted = golden.load("weights_check")
    for i, key in enumerate(noted["keys"]):
        found = golden.weight(str(key), tuple(map(int, str(noted["shapes"][i]).split(","))))
        assert found.flatten()[:8].tolist() == noted["first8"][i][:found.numel()].tolist(), key
        assert torch.isclose(found.double().sum(), noted["sum"][i], rtol=1e-12), key
        assert torch.isclose(found.double().square().sum(), noted["sum_of_squares"][i], rtol=1e-12), key
