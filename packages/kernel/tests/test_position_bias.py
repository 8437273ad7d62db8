"""position_bias.py: each form is what its paper says, and attention with it is the definition, gradients included."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from flash_cosine_sim_attention import (
    AlibiBias,
    PositionBias,
    RelativeBias,
    T5Bias,
    alibi_slopes,
    flash_cosine_sim_attention,
    plain_cosine_sim_attention,
)
from flash_cosine_sim_attention.testing import POSITION_BIASES, assert_close_to_reference, make_inputs

pytestmark = pytest.mark.usefixtures("each_device")

FORMS = sorted(POSITION_BIASES)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LENGTHS = [(1, 1), (1, 300), (300, 1), (65, 130), (130, 65), (257, 513), (600, 300)]


def entries(nq: int, nk: int, value) -> torch.Tensor:
    """The definition, one entry at a time: value(relative position), float64 (nq, nk)."""
    rows = [[value(j - (i + nk - nq)) for j in range(nk)] for i in range(nq)]
    return torch.tensor(rows, dtype=torch.float64)


def bucket(relative: int, num_buckets: int, bidirectional: bool, max_distance: int) -> int:
    """T5's bucket by its description, in exact logarithms."""
    if bidirectional:
        num_buckets //= 2
    offset = num_buckets if bidirectional and relative > 0 else 0
    distance = abs(relative) if bidirectional else max(-relative, 0)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    octave = math.log(distance / exact) / math.log(max_distance / exact)
    return offset + min(exact + int(octave * (num_buckets - exact) + 1e-6), num_buckets - 1)


# ---- the forms ----


@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (1, 9), (9, 1), (5, 9), (9, 5)])
def test_alibi_is_its_definition(nq, nk):
    slopes, future = torch.rand(2, 3, dtype=torch.float64).unbind()
    for bias, value in (
        (AlibiBias(slopes), lambda rel: -abs(rel)),
        (AlibiBias(slopes, torch.zeros_like(slopes)), lambda rel: min(rel, 0)),
    ):
        expected = slopes[:, None, None] * entries(nq, nk, value)
        torch.testing.assert_close(bias.materialize(nq, nk, torch.float64), expected)
    both = AlibiBias(slopes, future).materialize(nq, nk, torch.float64)
    expected = slopes[:, None, None] * entries(nq, nk, lambda rel: min(rel, 0))
    torch.testing.assert_close(both, expected - future[:, None, None] * entries(nq, nk, lambda rel: max(rel, 0)))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 9), (33, 1000)])
def test_t5_is_its_definition(bidirectional, num_buckets, max_distance):
    weight = torch.randn(num_buckets, 3)
    bias = T5Bias(weight, bidirectional, max_distance)
    for nq, nk in ((1, 1), (150, 300), (300, 150)):
        expected = entries(nq, nk, lambda rel: bucket(rel, num_buckets, bidirectional, max_distance)).long()
        assert torch.equal(bias.materialize(nq, nk), weight[expected].permute(2, 0, 1))


@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (4, 9), (9, 4), (9, 9)])
def test_relative_is_its_definition(nq, nk):
    table = torch.randn(2, 17)
    index = entries(nq, nk, lambda rel: rel + 8).long()
    assert torch.equal(RelativeBias(table).materialize(nq, nk), table[:, index])
    clamped = RelativeBias(table[:, 6:11], clamp=True)
    index = entries(nq, nk, lambda rel: min(max(rel, -2), 2) + 8).long()
    assert torch.equal(clamped.materialize(nq, nk), table[:, index])


@pytest.mark.parametrize("heads", [1, 2, 8, 6, 12])
def test_published_slopes(heads):
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,)
    power = 2 ** int(math.log2(heads))
    torch.testing.assert_close(slopes[:power], 2.0 ** (-8.0 / power * torch.arange(1, power + 1)))
    if heads == 12:  # the published example
        torch.testing.assert_close(slopes[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (1, 9), (9, 1), (5, 9), (9, 5)])
def test_diagonals_are_those_of_the_matrix(form, nq, nk):
    x = make_inputs(nq=nq, nk=nk, bias=form, dtype=torch.float64)
    bias = x.arguments()["attn_bias"]
    diagonals, dense = bias.diagonals(nq, nk, torch.float64), bias.materialize(nq, nk, torch.float64)
    assert diagonals.shape == (2, nq + nk - 1)
    for i in range(nq):
        for j in range(nk):
            assert torch.equal(diagonals[:, nq - 1 + j - i], dense[:, i, j])


def test_descriptors_are_immutable():
    with pytest.raises(FrozenInstanceError):
        AlibiBias(torch.ones(2)).slopes = torch.zeros(2)


# ---- attention with them ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("nq", "nk"), LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(form, nq, nk, causal):
    assert_close_to_reference(make_inputs((1,), 2, nq=nq, nk=nk, d=16, bias=form, causal=causal, mask=True), lse=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(form, dtype):
    assert_close_to_reference(make_inputs(nq=70, nk=140, d=24, dv=40, bias=form, dtype=dtype, causal=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 0},
        {"kv_heads": 2, "mask": True},
        {"batch": (2, 3), "mask": True},
        {"batch": (2, 1, 2), "causal": True},
        {"scale": "head", "groups": 4},
        {"scale": 100.0, "l2norm_qk": False},
        {"heads": 0, "batch": (3,), "kv_heads": None, "mask": True},
    ],
    ids=str,
)
def test_options(form, options):
    assert_close_to_reference(make_inputs(**({"heads": 6, "nq": 40, "nk": 70, "d": 16, "bias": form} | options)))


@pytest.mark.parametrize("form", FORMS)
def test_one_set_of_parameters_for_all_heads(form):
    x = make_inputs(heads=3, nq=40, nk=70, d=16, bias=form)
    one = x.attn_bias[:1] if form in ("alibi", "relative") else x.attn_bias[:, :1]
    assert_close_to_reference(replace(x, attn_bias=one.contiguous()))


@pytest.mark.parametrize("shape", [(2, 1, 4), (2, 3, 4), (3, 1), (1, 1, 1)])
def test_parameters_of_each_batch_element(shape):
    x = make_inputs((2, 3), 4, nq=40, nk=70, d=16)
    assert_close_to_reference(replace(x, attn_bias=torch.rand(shape) / 4, position_bias=AlibiBias))
    assert_close_to_reference(replace(x, attn_bias=torch.randn(*shape, 139), position_bias=RelativeBias))


def test_two_sided_slopes_and_clamped_tables():
    x = make_inputs(nq=40, nk=70, d=16)
    two_sided = replace(x, attn_bias=torch.rand(2, 2) / 4, position_bias=lambda both: AlibiBias(both[0], both[1]))
    assert_close_to_reference(two_sided)
    clamped = replace(x, attn_bias=torch.randn(2, 21), position_bias=lambda table: RelativeBias(table, clamp=True))
    assert_close_to_reference(clamped)


@pytest.mark.parametrize("form", FORMS)
def test_merged_heads_with_a_mask_of_each(form):
    """(b * h, n, d) with parameters of h heads, the heads innermost."""
    x = make_inputs((2,), 3, nq=40, nk=70, d=16, bias=form)
    masks = torch.rand(2, 3, 70) < 0.7
    q, k, v = (t.flatten(0, 1) for t in (x.q, x.k, x.v))
    bias = x.arguments()["attn_bias"]
    for function in (flash_cosine_sim_attention, plain_cosine_sim_attention):
        out = function(q, k, v, masks.flatten(0, 1), bias).unflatten(0, (2, 3))
        for head in range(3):
            alone = {"mask": masks[:, head], "attn_bias": bias.materialize(40, 70)}
            expected = plain_cosine_sim_attention(x.q, x.k, x.v, **alone)[:, head]
            torch.testing.assert_close(out[:, head], expected)


@pytest.mark.parametrize("form", FORMS)
def test_cached_decoding_agrees_with_the_whole(form):
    """A query that comes alone, with all keys so far, is the last row of causal attention over the prefix."""
    x = make_inputs(nq=40, d=16, bias=form, causal=True)
    bias = x.arguments()["attn_bias"]
    whole = flash_cosine_sim_attention(x.q, x.k, x.v, attn_bias=bias, causal=True)
    for n in (1, 2, 17, 40):
        step = flash_cosine_sim_attention(
            x.q[..., n - 1 : n, :], x.k[..., :n, :], x.v[..., :n, :], attn_bias=bias, causal=True
        )
        torch.testing.assert_close(step, whole[..., n - 1 : n, :])


@pytest.mark.parametrize("size", [1e4, -1e4, -math.inf])
def test_extreme_entries(size):
    x = make_inputs(nq=70, nk=90, d=16, bias="relative", dtype=torch.bfloat16)
    x.attn_bias[:, ::3] = size
    assert_close_to_reference(x)


@pytest.mark.parametrize(("nq", "nk"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(nq, nk):
    slopes = torch.rand(2, requires_grad=True)
    q, k = torch.randn(1, 2, nq, 8), torch.randn(1, 2, nk, 8)
    out = flash_cosine_sim_attention(q, k, k, attn_bias=AlibiBias(slopes))
    (gradient,) = torch.autograd.grad(out.sum(), slopes)
    assert torch.equal(out, torch.zeros(1, 2, nq, 8))
    assert torch.equal(gradient, torch.zeros(2))


@dataclass(frozen=True, eq=False)
class Kerple(PositionBias):
    """A form of a user's own: -log(1 + a |rel|), logarithmic KERPLE (Chi et al. 2022)."""

    rate: torch.Tensor

    leading = property(lambda self: tuple(self.rate.shape))
    device = property(lambda self: self.rate.device)

    def values(self, relative_position, dtype):
        distance = relative_position.abs().to(dtype)
        return -torch.log1p(self.rate.to(dtype).reshape(-1, *(1,) * distance.ndim) * distance)


def test_a_form_of_ones_own():
    x = replace(make_inputs(nq=40, nk=70, d=16), attn_bias=torch.rand(2), position_bias=Kerple)
    assert_close_to_reference(x)


# ---- errors ----

WRONG = {
    "slopes of integers": (
        lambda: AlibiBias(torch.arange(4)),
        TypeError,
        "slopes: expected a floating dtype, got torch.int64",
    ),
    "slopes of a list": (lambda: AlibiBias([1.0]), TypeError, "slopes: expected a torch.Tensor of shape .* got list"),
    "slope without a dim": (
        lambda: AlibiBias(torch.tensor(1.0)),
        ValueError,
        r"slopes: expected \(heads,\).*got shape \(\)",
    ),
    "two kinds of slopes": (
        lambda: AlibiBias(torch.ones(4), torch.ones(2)),
        ValueError,
        "future_slopes: expected the shape of slopes",
    ),
    "weight of three dims": (lambda: T5Bias(torch.ones(32, 4, 1)), ValueError, r"\(num_buckets, heads\), got shape"),
    "few buckets": (lambda: T5Bias(torch.ones(3, 4)), ValueError, "at least 4 buckets with bidirectional=True"),
    "short distance": (lambda: T5Bias(torch.ones(32, 4), max_distance=8), ValueError, "more than the 8 positions"),
    "even table": (lambda: RelativeBias(torch.ones(4, 8)), ValueError, "an odd last dim, got shape"),
    "no slopes": (lambda: alibi_slopes(0), ValueError, "heads: expected a positive int, got 0"),
    "short table": (
        lambda: RelativeBias(torch.ones(4, 11)),
        ValueError,
        r"at least 2 \* max\(queries, keys\) - 1 = 13",
    ),
    "heads": (lambda: AlibiBias(torch.ones(3)), ValueError, r"broadcast to \(\*batch, heads\) = \(2, 4\), got \(3,\)"),
    "batch": (
        lambda: AlibiBias(torch.ones(3, 4)),
        ValueError,
        r"broadcast to \(\*batch, heads\) = \(2, 4\), got \(3, 4\)",
    ),
    "device": (lambda: AlibiBias(torch.ones(4, device="meta")), ValueError, "attn_bias: expected the device of q"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("function", [flash_cosine_sim_attention, plain_cosine_sim_attention])
def test_errors(case, function):
    make, error, message = WRONG[case]
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 7, 16)
    with pytest.raises(error, match=message):
        function(q, k, k, attn_bias=make())


@pytest.mark.parametrize("leading", [(4,), (2, 3)])
def test_errors_with_merged_heads(leading):
    q = torch.randn(6, 5, 16)
    with pytest.raises(ValueError, match=r"divides batch \* heads = 6, got"):
        flash_cosine_sim_attention(q, q, q, attn_bias=AlibiBias(torch.ones(leading)))
