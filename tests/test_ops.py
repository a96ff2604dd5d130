"""The ops of the kernels as torch sees them: schemas, FakeTensors, strides, devices, FLOP counts."""

import contextlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.layouts import LAYOUTS
from support.mods import COMB, NEAR
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fused_attn
from fused_attn.call import mods
from fused_attn.call.schema import BACKWARD, FORWARD, Inputs, Needs, Saved, Signature
from fused_attn.call.spec import RELATIVE, TENSOR, AttentionSpec, Longest, Member, OtherTensors, TileConfig, Window

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).parents[1]


def attention(q, k, v, **arguments):
    return fused_attn.attention(q, k, v, backend="triton", **arguments)


def qkv(n_queries=9, n_keys=9, *, heads=2, kv_heads=2, dim=8, dim_v=8, batch=1, dtype=torch.float64, grad=(True, True, True)):
    shapes = (batch, heads, n_queries, dim), (batch, kv_heads, n_keys, dim), (batch, kv_heads, n_keys, dim_v)
    return tuple(torch.randn(s, dtype=dtype, requires_grad=g) for s, g in zip(shapes, grad, strict=True))


# --- schemas, FakeTensors, strides ---

FULL, CAUSAL = AttentionSpec(0.3), AttentionSpec(0.3, Window(None, 0))
CAPPED = AttentionSpec(0.3, Window(3, 1), bottom_right=False, softcap=1.5)
BIASED = AttentionSpec(0.3, Window(None, 1), score_mods=(Member(mods.BIAS.code, (TENSOR,)), Member(mods.ALIBI.code, (TENSOR,))),
                       mask_mods=(Member(mods.MASK.code, (TENSOR,)),), dropout_p=0.25)
RELATED = AttentionSpec(0.3, score_mods=(Member(mods.BIAS.code, (RELATIVE,)),), precise=True, fp32_precision="ieee")
ADDITIVE = AttentionSpec(1.0, Window(None, 0))
PACKED = AttentionSpec(0.3, Window(None, 0), precise=True, longest=Longest(5, 9))
NEEDS = [(True, True, True), (False, True, False), (True, False, True)]


def operands(spec):
    """The others that a spec asks for, of 4 heads, 5 queries and 7 keys, or packed ones of 10 and 14."""
    if spec == BIASED:
        mask = torch.rand(2, 1, 5, 7) < 0.8
        return OtherTensors(sinks=torch.randn(4), seed=torch.tensor([2**40 + 7]), used_k=torch.tensor([7, 4]),
                            operands=(torch.randn(4, 7, 5).mT[None], torch.randn(2, 4, 1, 1, dtype=torch.float64), mask))
    if spec == RELATED:
        return OtherTensors(sinks=torch.randn(4, dtype=torch.float64), operands=(torch.randn(1, 4, 11),))
    if spec == PACKED:
        cu_q, cu_k = torch.tensor([0, 5, 5, 8], dtype=torch.int32), torch.tensor([0, 3, 4, 13], dtype=torch.int32)
        used_q, used_k = torch.tensor([5, 0, 2]), torch.tensor([3, 1, 7], dtype=torch.int32)
        return OtherTensors(cu_q=cu_q, cu_k=cu_k, used_q=used_q, used_k=used_k)
    if spec == ADDITIVE:
        return OtherTensors(score_weight=torch.randn(8).expand(4, 8))
    return OtherTensors()


OP_CASES = [  # layout, dtype, spec, which of dQ, dK, dV
    ("contiguous", torch.float64, FULL, NEEDS[0]), ("length before heads", torch.bfloat16, CAUSAL, NEEDS[2]),
    ("expanded heads", torch.float32, CAPPED, NEEDS[1]), ("contiguous", torch.float32, BIASED, NEEDS[0]),
    ("length before heads", torch.bfloat16, RELATED, NEEDS[2]), ("length before heads", torch.float32, PACKED, NEEDS[0]),
    ("length before heads", torch.bfloat16, ADDITIVE, NEEDS[1]),
    pytest.param("every second column", torch.float64, BIASED, NEEDS[1], marks=pytest.mark.slow),
    pytest.param("contiguous", torch.float16, CAPPED, NEEDS[1], marks=pytest.mark.slow),
    *(pytest.param(layout, torch.float32, CAUSAL, NEEDS[0], marks=pytest.mark.slow) for layout in LAYOUTS)]


@pytest.mark.few(2)
@pytest.mark.parametrize(("layout", "dtype", "spec", "needs"), OP_CASES)
def test_ops_keep_torchs_rules(layout, dtype, spec, needs):
    batch, n_queries, n_keys = (1, 10, 14) if spec == PACKED else (2, 5, 7)
    tensors = [LAYOUTS[layout](batch, heads, n, 8) for heads, n in ((4, n_queries), (2, n_keys), (2, n_keys))]
    tensors = [x if dtype == x.dtype else x.to(dtype) for x in tensors]
    forward, backward = torch.ops.fused_attn.forward.default, torch.ops.fused_attn.backward.default
    others = operands(spec)
    arguments = FORWARD.flat(Inputs(*tensors), others, spec)
    out, lse, residual = forward(*arguments)
    assert bool(residual.numel()) == (spec.precise or spec == ADDITIVE)
    dlse = torch.randn_like(lse) if all(needs) else None
    saved = Saved(torch.randn_like(out), dlse, *tensors, out, residual if residual.numel() else None, lse)
    wanted = Needs(*needs, others.sinks is not None, others.score_weight is not None,
                   tuple(x.is_floating_point() for x in others.operands))
    given = BACKWARD.flat(saved, others, spec, wanted)
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(backward, given)

    with FakeTensorMode() as mode:
        def fake(x):
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else tuple(map(fake, x)) if isinstance(x, tuple) else x

        found = tree_leaves((forward(*fake(arguments)), backward(*fake(given))))
    real = tree_leaves(((out, lse, residual), backward(*given)))
    assert len(real) == 8 + len(others.operands)
    for r, f in zip(real, found, strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


@pytest.mark.parametrize("spec", [FULL, CAUSAL, CAPPED, BIASED, RELATED, PACKED, FULL._replace(mask_mods=(
    Member(mods.TREE.code, (TENSOR,) * 3), Member(NEAR.code, ("-1.5", "7", TENSOR, "1e-05")), Member(COMB.code, ())))])
def test_a_spec_survives_its_flat_form(spec):
    signature = Signature(AttentionSpec)
    flat = signature.flat(spec)
    assert next(signature.records(flat)) == spec
    assert all(x is None or isinstance(x, (str, bool, int, float)) for x in flat)


@pytest.mark.parametrize("records", [(Inputs, OtherTensors, AttentionSpec),
                                     (Saved, OtherTensors, AttentionSpec, Needs)], ids=len)
def test_arguments_have_the_order_and_names_of_fields(records):
    given, expected = [], []
    for record in records:
        fields = {name: object() for name in record._fields}
        fields |= {name: (object(),) for name in ("operands", "doperands") if name in fields}
        if record is AttentionSpec:
            fields |= {"window": Window(1, 2), "score_mods": (), "mask_mods": (), "longest": Longest(3, 4)}
        given.append(record(**fields))
        for value in given[-1]:
            expected += [""] if value == () else value if isinstance(value, (Window, Longest)) else [value]
    signature = Signature(*records)
    assert signature.flat(*given) == tuple(expected)
    assert list(signature.records(expected)) == given
    assert len(expected) == len({argument.split()[1] for argument in signature.text.split(", ")})


# --- who sees a call ---


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A tensor class without behaviour of its own."""


@pytest.fixture
def ops_seen(monkeypatch):
    """The names of the ops that calls went through."""
    from fused_attn.run import ops

    seen = []

    def recorded(name):
        real = getattr(torch.ops.fused_attn, name).default
        return SimpleNamespace(default=lambda *args: seen.append(name) or real(*args))

    names = ("forward", "backward", "rotary")
    monkeypatch.setattr(ops, "_OPS", SimpleNamespace(**{name: recorded(name) for name in names}))
    return seen


def train(q, k, v, **arguments):
    attention(q, k, v, **arguments).sum().backward()
    fused_attn.apply_rotary(q.detach(), torch.ones(9, 4), torch.zeros(9, 4), backend="triton")


def test_a_call_that_nobody_watches_is_no_op(ops_seen):
    train(*qkv(), bias=torch.zeros(9, 9, requires_grad=True))
    assert ops_seen == []


@pytest.mark.parametrize("watcher", [Recorder, lambda: FlopCounterMode(display=False), torch.profiler.profile])
def test_who_watches_sees_ops(watcher, ops_seen):
    with watcher():
        train(*qkv())
    assert ops_seen == ["forward", "backward", "rotary"]


@pytest.mark.parametrize("place", range(4))
def test_a_tensor_of_another_class_makes_ops(place, ops_seen):
    tensors = [x.detach() for x in (*qkv(), torch.zeros(9, 9))]
    tensors[place] = tensors[place].as_subclass(Own)
    attention(*tensors[:3], bias=tensors[3])
    assert ops_seen == ["forward"]


@pytest.mark.filterwarnings("ignore")  # of tracing: shapes become constants, and it is deprecated
def test_a_traced_call_is_an_op(ops_seen):
    q, k, v = (x.detach() for x in qkv())
    traced = torch.jit.trace(lambda q: attention(q, k, v), (q,), check_trace=False)
    assert "fused_attn::forward" in str(traced.graph)
    assert ops_seen == ["forward"]
    torch.testing.assert_close(traced(2 * q), attention(2 * q, k, v))


# --- FLOPs ---



# B 2, H 4, D 8, Dv 4; 6 queries, 10 keys. Query i stands at i + 4. Kept pairs: full 6 * 10 = 60; causal 5 + 6 + ... + 10 = 45;
# window (2, 1): keys i + 2 ... i + 5, 4 for i = 0 ... 4 and 3 for i = 5: 23. A product of depth d costs 2 d FLOPs a pair.
@pytest.mark.parametrize(("arguments", "pairs"), [({}, 60), ({"causal": True}, 45), ({"window": (2, 1)}, 23)], ids=str)
@pytest.mark.parametrize(("grad", "qk", "pv"), [((True, True, True), 3, 2), ((True, False, False), 2, 1),
                                                ((False, False, True), 1, 1)])
def test_flops(arguments, pairs, grad, qk, pv):
    with FakeTensorMode():  # what is counted are shapes
        q, k, v = qkv(6, 10, batch=2, heads=4, dim_v=4, grad=grad)
        with FlopCounterMode(display=False) as forward:
            out = attention(q, k, v, **arguments)
        with FlopCounterMode(display=False) as backward:  # S, dQ, dK and dP, dV, as far as they are needed
            out.sum().backward()
    assert forward.get_total_flops() == 2 * 4 * pairs * 2 * (8 + 4)
    assert backward.get_total_flops() == 2 * 4 * pairs * 2 * (qk * 8 + pv * 4)


# What a call adds changes no count, wherever it travels among the arguments. 3 sequences of 6, 2 and 0 queries, of 10, 4 and 3
# keys: full 60 + 8, causal 45 + (3 + 4); a window keeps i + Nk - Nq - 2 ... + 1 of each: 23 + (4 + 3).
MANY = {
    "plain": {}, "dropout": {"dropout_p": 0.5}, "sinks": {"sinks": torch.zeros(4)}, "bias": {"bias": torch.zeros(6, 10)},
    "alibi": {"alibi_slopes": torch.zeros(4)}, "mask": {"mask": torch.ones(6, 10, dtype=torch.bool)},
    "additive": {"score_weight": torch.ones(8)}, "precise": {"precise": True}, "softcap": {"softcap": 2.0},
    "document": {"mask_mod": mods.DOCUMENT(torch.zeros(1, 1, 6, 1), torch.zeros(1, 1, 1, 10))},
    "dropout and sinks and bias": {"dropout_p": 0.1, "sinks": torch.zeros(4), "bias": torch.zeros(6, 10, requires_grad=True)},
}
STARTS = torch.tensor([[0, 6, 8, 8], [0, 10, 14, 17]], dtype=torch.int32)


def flops_of(run):
    with FlopCounterMode(display=False) as forward:
        out = run()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.few(2)
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize(("arguments", "dense", "packed"),
                         [({}, 60, 68), ({"causal": True}, 45, 52), ({"window": (2, 1)}, 23, 30)], ids=str)
def test_flops_whatever_is_added(name, arguments, dense, packed):
    q, k, v = qkv(6, 10, batch=2, heads=4, dim_v=4, dtype=torch.float32)
    products = 2 * 4 * (8 + 4)  # of 4 heads, a pair
    found = flops_of(lambda: attention(q, k, v, **arguments, **MANY[name]))
    assert found == (2 * dense * products, 2 * dense * 2 * 4 * (3 * 8 + 2 * 4))
    q, k, v = (torch.randn(n, 4, d, requires_grad=True) for n, d in ((8, 8), (17, 8), (17, 4)))
    found = flops_of(lambda: fused_attn.attention_varlen(q, k, v, *STARTS, 6, 10, backend="triton", **arguments, **MANY[name]))
    assert found == (packed * products, packed * 2 * 4 * (3 * 8 + 2 * 4))


def test_flops_of_lengths_that_count():
    q, k, v = qkv(6, 10, batch=2, heads=4, dim_v=4, dtype=torch.float32)
    lengths = torch.tensor([10, 3])  # positions do not move: causal queries stand at 4 ... 9 and see 3 keys each
    assert flops_of(lambda: attention(q, k, v, causal=True, key_lengths=lengths))[0] == (45 + 6 * 3) * 2 * 4 * (8 + 4)
    q, k, v = (torch.randn(n, 4, d, requires_grad=True) for n, d in ((8, 8), (17, 8), (17, 4)))
    used_q, used_k = torch.tensor([5, 2, 9]), torch.tensor([3, 4, 0])
    found = flops_of(lambda: fused_attn.attention_varlen(q, k, v, *STARTS, 6, 10, seqused_q=used_q, seqused_k=used_k,
                                                         backend="triton"))
    assert found[0] == (5 * 3 + 2 * 4) * 2 * 4 * (8 + 4)


def test_flops_of_lengths_that_cannot_be_read():
    """As if every sequence were the longest."""
    with FakeTensorMode():
        q, k, v = (torch.randn(n, 4, d) for n, d in ((8, 8), (17, 8), (17, 4)))
        starts = torch.zeros(4, dtype=torch.int32)
        with FlopCounterMode(display=False) as counter:
            fused_attn.attention_varlen(q, k, v, starts, starts, 6, 10, backend="triton", dropout_p=0.5)
    assert counter.get_total_flops() == 3 * 60 * 2 * 4 * (8 + 4)


FIRST = """
{imports}
import torch
q, k, v = (torch.ones(2, 4, n, 8, requires_grad=True) for n in (6, 10, 10))
with FlopCounterMode(display=False) as counter:
    fused_attn.attention(q, k, v, dropout_p=0.5, backend="triton").sum().backward()
assert counter.get_total_flops() == 2 * 4 * 60 * 2 * 7 * 8, counter.get_flop_counts()
"""


OURS, COUNTER = "import fused_attn", "from torch.utils.flop_counter import FlopCounterMode"
ASKED = "import importlib.util; assert importlib.util.find_spec('torch.utils.flop_counter')"


@pytest.mark.parametrize("imports", [
    pytest.param((OURS, COUNTER), id="we first"), pytest.param((COUNTER, OURS), id="the counter first", marks=pytest.mark.slow),
    pytest.param((OURS, ASKED, ASKED, COUNTER), id="asked for first", marks=pytest.mark.slow)])
def test_the_first_count_of_a_process(imports):
    subprocess.run([sys.executable, "-c", FIRST.format(imports="\n".join(imports))], check=True, cwd=ROOT)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("inspect", [fused_attn.attention_weights, fused_attn.attention_stats])
def test_inspection_is_an_op_that_is_counted_and_traced(inspect):
    q, k, dims = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 10, 8), (torch.export.Dim("n", min=2), torch.export.Dim("m", min=2))

    class Module(torch.nn.Module):
        def forward(self, q, k):
            found = inspect(q, k, causal=True, softcap=3.0, backend="triton")
            return found if isinstance(found, torch.Tensor) else tuple(found)

    module = Module()
    want = module(q, k)
    with FlopCounterMode(display=False) as counter:
        module(q, k)
    assert counter.get_total_flops() == 2 * 2 * 4 * (5 + 6 + 7 + 8 + 9 + 10) * 8
    torch._dynamo.reset()
    others = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 17, 8)
    exported = torch.export.export(module, (q, k), dynamic_shapes=({2: dims[0]}, {2: dims[1]})).module()
    for made in (torch.compile(module, backend="aot_eager", fullgraph=True), make_fx(module)(q, k),
                 torch.jit.trace(module, (q, k), check_trace=False), exported):
        torch.testing.assert_close(made(q, k), want)
    torch.testing.assert_close(exported(*others), module(*others))
    with FakeTensorMode() as mode:
        fake = module(*map(mode.from_tensor, (q, k)))
    for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (fake, want)), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_the_ops_exist_without_triton():
    code = ("import sys; sys.modules['triton'] = None; import fused_attn, torch, torch.utils.flop_counter as counter\n"
            "for op in ('forward', 'backward', 'rotary'): getattr(torch.ops.fused_attn, op).default\n"
            "assert torch.ops.fused_attn.forward in counter.flop_registry")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_import_brings_neither_triton_nor_dynamo():
    heavy = ("triton", "torch._dynamo", "torch.utils.flop_counter")
    code = f"import sys, fused_attn; found = [x for x in {heavy} if x in sys.modules]; sys.exit(str(found) if found else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- devices ---


class FakeAccelerator:
    """torch.accelerator for a machine with several devices, of which ``current`` is the active one."""

    def __init__(self, monkeypatch, current):
        self.current, self.entered = current, []
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: self.current)
        monkeypatch.setattr(torch.accelerator, "device_index", self.device_index)

    @contextlib.contextmanager
    def device_index(self, index):
        before, self.current = self.current, index
        self.entered.append(index)
        try:
            yield
        finally:
            self.current = before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("device", "current", "entered"), [("cuda:1", 0, [1]), ("cuda:1", 1, []), ("cuda:0", 1, [0])])
def test_launch_on_the_tensors_device(monkeypatch, device, current, entered, fails):
    from fused_attn.kernels import launch

    accelerator, seen = FakeAccelerator(monkeypatch, current), []
    monkeypatch.setattr(launch, "arch_of", lambda device: "sm_80")

    class Kernel:
        params = ()

        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, accelerator.current, args, options)) or 1 / (not fails)

    tensor, config = SimpleNamespace(device=torch.device(device)), TileConfig(16, 32, 8, 3, options=(("waves_per_eu", 2),))
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        launch.run(launch.Launch(Kernel(), 7, (tensor, 5), config))
    options = {"num_warps": 8, "num_stages": 3, "waves_per_eu": 2, "enable_fp_fusion": True}
    assert seen == [((7,), torch.device(device).index, (tensor, 5, config), options)]
    assert accelerator.current == current
    assert accelerator.entered == entered


def test_launch_on_the_cpu_asks_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: pytest.fail("no accelerator is concerned"))
    attention(*qkv())
