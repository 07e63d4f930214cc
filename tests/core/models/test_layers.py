from __future__ import annotations

import torch
from torchvision.ops import MLP, StochasticDepth

from ogreg_core.models.layers import DropPath, Mlp, attend, attention_weights, split_heads


def test_mlp_equals_torchvision_with_the_same_names():
    ours = Mlp(8, 32).eval()
    reference = MLP(8, [32, 8], activation_layer=torch.nn.GELU, inplace=None, dropout=0.0).eval()
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), reference(x))


def test_drop_path_equals_torchvision_draw_for_draw():
    x = torch.randn(64, 4, 3)
    torch.manual_seed(3)
    ours = DropPath(0.3).train()(x)
    torch.manual_seed(3)
    reference = StochasticDepth(0.3, mode="row").train()(x)
    torch.testing.assert_close(ours, reference)
    assert (ours == 0).all(dim=(1, 2)).any()
    assert torch.equal(DropPath(0.3).eval()(x), x)


def test_attention_is_softmax_of_scaled_products():
    qkv = torch.randn(2, 7, 36, dtype=torch.float64)
    q, _, v = split_heads(qkv, 3)
    weights = attention_weights(qkv, 3)
    assert q.shape == (2, 3, 7, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    expected = (weights @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(qkv, 3), expected)
