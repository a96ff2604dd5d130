"""Private names of torch: in one file, and the package works without each of them."""

import ast
import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack

import fused_attn
from fused_attn import nn, torch_private, tracing

PACKAGE = Path(fused_attn.__file__).parent
# Attributes with an underscore of what torch makes.
ATTRIBUTES = ("_current_level", "_get_max_seqlen", "_mha_shape_check", "_dynamo_marked_constant")


def dotted(node):
    """a.b.c of an attribute, or None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else None


def private_names(source):
    """What of torch's a file uses that torch does not promise."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node) or f".{node.attr}"]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            own = first in ("torch", "F") and any(part.startswith("_") and not part.startswith("__") for part in rest)
            if own or (rest and rest[-1] in ATTRIBUTES):
                yield name


@pytest.mark.parametrize("source", ["torch._C.f()", "import torch._dynamo", "from torch._functorch import config",
                                    "from torch import _VF", "F._mha_shape_check()", "x._get_max_seqlen()",
                                    "torch.autograd.forward_ad._current_level", "torch.cuda._sleep(1)"])
def test_the_search_finds_them(source):
    assert list(private_names(source))


def test_they_are_in_one_file():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").resolve().rglob("*.py")]
    found = {str(file.relative_to(file.parents[1])): names for file in files
             if file.name != "torch_private.py" and (names := sorted(set(private_names(file.read_text(encoding="utf-8")))))}
    assert not found, "belong in fused_attn/torch_private.py, each with what stands in for it"


NAMES = {  # where each stands, and what works without it
    "_C._nn.scaled_dot_product_attention": lambda: same(fused_attn.scaled_dot_product_attention),
    "_check": lambda: None,
    "nn.functional._mha_shape_check": lambda: layers(),
    "_C._len_torch_dispatch_stack": lambda: watches(),
    "_C._are_functorch_transforms_active": lambda: watches(backend="torch"),  # a Function of ours asks torch's code the same
    "ops.aten._scaled_dot_product_flash_attention_for_cpu": lambda: blocks_of_plain_operations(),
    "_C._ForceDispatchKeyGuard": lambda: no_way_up(),
    "_C._autograd._profiler_enabled": lambda: watches(),
    "_C._disabled_torch_function_impl": lambda: same(fused_attn.attention),
    "_C._dispatch_keys": lambda: not_batched(),
    "overrides._get_current_function_mode_stack": lambda: patches_end(),
    "_guards.TracingContext.try_get": lambda: traces_are_one(),
    "cuda._sleep": lambda: torch_private.cuda_sleep(10),
    "_C._AutoDispatchBelowAutograd": lambda: without_a_guard(),
    "autograd.forward_ad._current_level": lambda: forward_mode_is_assumed(),
}


def same(function):
    x = torch.randn(1, 2, 4, 8)
    assert torch.equal(function(x, x, x), F.scaled_dot_product_attention(x, x, x))


def layers():
    x = torch.randn(3, 5, 16)
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    assert module(x, x, x)[0].shape == x.shape
    assert module(x[0], x[0], x[0])[0].shape == x[0].shape


def watches(**arguments):
    """Calls go through the op, as if someone looked: slower, and the same."""
    x = torch.randn(1, 2, 4, 8)
    assert tracing.watched((x,))
    same(partial(fused_attn.attention, **arguments))


def blocks_of_plain_operations():
    x = torch.randn(1, 2, 40, 8)
    torch.testing.assert_close(fused_attn.attention(x, x, x, backend="blocked"), F.scaled_dot_product_attention(x, x, x))


def no_way_up():
    """Within an op, a score function cannot be differentiated: an error, and no zeros."""
    with torch_private.recording():
        assert (torch.ones(1, requires_grad=True) * 2).requires_grad
    with torch._C._AutoDispatchBelowAutograd(), pytest.raises(RuntimeError, match="cannot differentiate score functions"):
        torch_private.recording()


def not_batched():
    assert not torch_private.is_batched(torch.ones(2))


def patches_end():
    """Their modes stay on the stack and do nothing."""
    x = torch.randn(1, 2, 4, 8)
    with fused_attn.patch_sdpa(strict=True) as report, pytest.raises(RuntimeError, match="strict"):
        F.scaled_dot_product_attention(x, x, x)
    same(fused_attn.attention)
    assert not report.kept
    with pytest.MonkeyPatch.context() as there:
        there.setattr(torch_private, "_function_modes", _get_current_function_mode_stack)
        with fused_attn.patch_sdpa():
            pass


def traces_are_one():
    assert torch_private.current_trace() is torch_private.current_trace() is not None


def without_a_guard():
    assert torch_private.below_autograd is None


def forward_mode_is_assumed():
    assert torch_private.forward_mode()


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_in_for_it(name, monkeypatch):
    *path, last = name.split(".")
    holder = torch
    for part in path:
        holder = getattr(holder, part)
    monkeypatch.delattr(holder, last)
    before = dict(vars(torch_private))
    try:
        importlib.reload(torch_private)
        NAMES[name]()
    finally:
        vars(torch_private).update(before)


def test_the_names_are_there_in_this_torch():
    """Else the package would run on what stands in."""
    assert torch_private.sdpa is torch._C._nn.scaled_dot_product_attention is F.scaled_dot_product_attention
    assert (torch_private.transforms_active(), torch_private.profiler_enabled(), torch_private.dispatch_modes()) == (
        False, False, 0)
    assert not torch_private.forward_mode()
    assert torch_private.below_autograd is torch._C._AutoDispatchBelowAutograd
    x = torch.randn(1, 2, 4, 8)
    assert not tracing.watched((x,))
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(torch_private.constant_when_traced(lambda: 0)) == vars(marked)


class Jagged:
    """Of a torch that does not say how long the longest is."""

    def offsets(self):
        return torch.tensor([0, 2, 7, 8])


def test_the_longest_sequence_of_jagged_tensors():
    jagged = torch.nested.nested_tensor([torch.randn(n, 8) for n in (2, 5, 1)], layout=torch.jagged)
    assert torch_private.longest(Jagged()) == torch_private.longest(jagged) == 5


def test_sizes_are_asked_as_they_are_where_torch_cannot_tell_unknown_ones(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)
    assert (torch_private.known(True), torch_private.known(False)) == (True, False)


def test_graphs_of_a_torch_without_donated_buffers(monkeypatch):
    from torch import _functorch

    monkeypatch.setitem(sys.modules, "torch._functorch.config", None)
    monkeypatch.delattr(_functorch, "config", raising=False)
    torch_private.keep_buffers_of_graphs()
    assert torch_private.activation_memory_budget() == 1


WITHOUT_ANY = """if True:
    import importlib, torch
    from torch.autograd import forward_ad
    taken = []
    for name in NAMES:
        holder = torch
        *path, last = name.split(".")
        for part in path:
            holder = getattr(holder, part)
        taken.append((holder, last, getattr(holder, last)))
        delattr(holder, last)
    from fused_attn import torch_private
    for holder, last, value in taken:  # torch needs them itself
        setattr(holder, last, value)
    import fused_attn
    assert torch_private.below_autograd is None and torch_private.dispatch_modes() == 1
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    for arguments in ({}, {"causal": True, "softcap": 2.0}):
        out, want = (fused_attn.attention(x, x, x, backend=b, **arguments) for b in ("triton", "reference"))
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), x), torch.autograd.grad(want.sin().sum(), x))
    layer = fused_attn.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layer(torch.randn(2, 5, 16)).sum().backward()
    jagged = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (2, 5)], layout=torch.jagged).transpose(1, 2)
    fused_attn.attention(jagged, jagged, jagged)
    x = x.detach()
    assert torch.equal(fused_attn.scaled_dot_product_attention(x, x, x), torch_private.sdpa(x, x, x))
"""


@pytest.mark.kernels
def test_a_torch_without_any_of_them():
    """Through the ops, with gradients, in a process of its own."""
    names = [name for name in NAMES if not name.endswith(("_current_level", "_check"))]  # which torch's own Python code reads
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", f"NAMES = {names!r}\n{WITHOUT_ANY}"], capture_output=True,
                          text=True, check=False, env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)})
    assert done.returncode == 0, done.stderr
