from __future__ import annotations

import warnings

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import MLP, StochasticDepth

from ogreg_core.models.layers import (
    DropPath,
    Mlp,
    attend,
    attention_weights,
    in_pieces,
    split_heads,
)


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


class TestInPieces:
    """A position-wise function in pieces is the function, wherever pieces are taken."""

    def pieces(self, function, *tensors, length):
        lengths = []

        def watched(*parts):
            lengths.append(parts[0].shape[0])
            return function(*parts)

        return in_pieces(watched, *tensors, length=length), lengths

    @given(entries=st.integers(1, 40), length=st.integers(1, 50))
    def test_result_and_lengths(self, entries, length):
        x, y = torch.randn(entries, 3), torch.randn(entries, 2)
        function = lambda x, y: torch.cat([x * 2, y], dim=1)  # noqa: E731
        with torch.no_grad():
            out, lengths = self.pieces(function, x, y, length=length)
        assert torch.equal(out, function(x, y))
        assert sum(lengths) == entries
        assert max(lengths) <= length
        assert max(lengths) - min(lengths) <= 1

    def test_whole_where_a_gradient_is_wanted(self):
        x = torch.randn(9, 3)
        assert self.pieces(torch.exp, x, length=2)[1] == [9]
        with torch.no_grad():
            assert self.pieces(torch.exp, x, length=2)[1] == [2, 2, 2, 2, 1]
            assert self.pieces(torch.exp, x.to("meta"), length=2)[1] == [9]

    def test_whole_for_a_compiler_and_a_trace(self):
        seen = []

        class Model(torch.nn.Module):
            def forward(self, x):
                return in_pieces(lambda part: seen.append(len(part)) or part * 2, x, length=2)

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(Model(), torch.randn(6, 2), check_trace=False)
            assert seen == [6]
            exported = torch.export.export(Model(), (torch.randn(6, 2),)).module()
        x = torch.randn(6, 2)
        torch.testing.assert_close(exported(x), x * 2)
