"""Bugs that were found here, each by a test that fails without its fix."""

import re
from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn import tuning
from fused_attn.kernels import launch

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).parents[1]


def qkv(n_queries=6, n_keys=6, dim=16, **kwargs):
    return tuple(torch.randn(1, 2, n, dim, **kwargs) for n in (n_queries, n_keys, n_keys))


def loss(*inputs):
    return fused_attn.attention(*inputs, backend="triton").square().sum()


@pytest.mark.parametrize("transform", [
    lambda *x: torch.func.grad(loss, argnums=(0, 1, 2))(*x),
    lambda *x: torch.func.jvp(lambda q: loss(q, *x[1:]), (x[0],), (x[0],))[1],
], ids=["grad", "jvp"])
def test_torch_func_inside_compile_raises_instead_of_giving_zeros(transform):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"carries no gradient of its own|setup_context|forward mode"):
        torch.compile(transform, backend="aot_eager", fullgraph=True)(*qkv())


def test_the_raw_op_is_not_a_constant():
    q, k, v = qkv(requires_grad=True)
    with pytest.raises(RuntimeError, match="carries no gradient of its own"):
        torch.ops.fused_attn.forward(q, k, v, 0.25, None, None, True, None)


@pytest.mark.parametrize("arguments", [{"softcap": 5.0}, {"return_lse": True}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_keeps_its_precision_under_autocast(arguments, dtype):
    q, k, v = qkv(40, 40)
    with torch.autocast("cpu", dtype):
        got = fused_attn.attention(q, k, v, **arguments)
    want = fused_attn.attention(q.to(dtype), k.to(dtype), v.to(dtype), **arguments)
    for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (got, want)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_the_lse_gradient_of_a_row_without_a_key_does_not_count(poison):
    """logaddexp(-inf, -inf), as in merging two parts by their LSE, sends NaN to such rows."""
    inputs = [x.requires_grad_() for x in qkv(6, 4)]
    dlse = torch.randn(1, 2, 6)
    dlse[:, :, :2] = poison
    gradients = []
    for backend in ("triton", "reference"):
        out, lse = fused_attn.attention(*inputs, causal=True, return_lse=True, backend=backend)
        clean = dlse if backend == "triton" else dlse.masked_fill(lse == -torch.inf, 0)
        gradients.append(torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), clean)))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)


def test_counting_launches_may_nest():
    q, k, v = qkv()
    with launch.counted() as outer:
        with launch.counted() as inner:
            fused_attn.attention(q, k, v, backend="triton")
        fused_attn.attention(q, k, v, backend="triton")
    assert outer == {"forward_kernel": 2}
    assert inner == {"forward_kernel": 1}


def test_strict_holds_for_calls_compiled_outside_it():
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(lambda *x: fused_attn.attention(*x, softcap=5.0), backend="eager", fullgraph=True)
    compiled(q, k, v)
    with fused_attn.strict(), pytest.raises(Exception, match="strict"):
        compiled(q, k, v)
    compiled(q, k, v)


def test_tf32_only_where_triton_has_it():
    assert tuning.has_tf32("sm_80")
    assert tuning.has_tf32("gfx942")
    assert not tuning.has_tf32("gfx90a")
    assert not tuning.has_tf32("gfx1100")


def test_cards_without_tiles_are_known():
    assert tuning.has_tiles("gfx90a")
    assert not tuning.has_tiles("gfx906")


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"causal": "no"}, TypeError, "causal: expected a bool; got 'no'"),
    ({"deterministic": "x"}, TypeError, "deterministic: expected a bool or None; got 'x'"),
    ({"strict": "no"}, TypeError, "strict: expected a bool or None; got 'no'"),
    ({"backend": ""}, ValueError, "backend: expected one of"),
], ids=str)
def test_switches_of_the_wrong_type_are_told(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fused_attn.attention(*qkv(), **arguments)


@pytest.mark.parametrize("backend", ["triton", "reference", "torch"])
def test_a_window_wider_than_64_bits_is_no_window(backend):
    q, k, v = qkv(20, 30)
    wide = fused_attn.attention(q, k, v, window=(2**70, 2**63), backend=backend)
    torch.testing.assert_close(wide, fused_attn.attention(q, k, v, backend=backend))


def test_an_empty_list_asks_for_nothing():
    q, k, v = qkv()
    assert torch.equal(fused_attn.attention(q, k, v, mod_args=[]), fused_attn.attention(q, k, v))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
