"""Modules about positions under whatever runs, traces, fakes or moves them: right there, and right afterwards."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fused_attn import attention, settings
from fused_attn.nn import (
    KVCache,
    LearnedPositions,
    MultiheadAttention,
    RotaryEmbedding,
    SinusoidalPositions,
    T5RelativeBias,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

EMBED, HEADS, LONGEST = 24, 3, 400
FREQUENCIES = torch.tensor([1.0, 0.3, 0.01, 0.0007])


class Turned(nn.Module):
    """Queries and keys as they come out of a rotation, [B, 2 * HEADS, N, 8]."""

    def __init__(self, *args, **options):
        super().__init__()
        self.rope = RotaryEmbedding(*args, **options)

    def forward(self, x):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return torch.cat(self.rope(q, q + 1), 1)


class Bucketed(nn.Module):
    """T5's attention, queries two fewer than keys."""

    def __init__(self):
        super().__init__()
        self.bias = T5RelativeBias(HEADS)

    def forward(self, x):
        k = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        q = k[:, :, 2:]
        return attention(q, k, k, bias=self.bias(q.shape[2], k.shape[2]), scale=1.0, backend="reference")


def stack(**options):
    layer = TransformerEncoderLayer(EMBED, HEADS, 16, 0.0, batch_first=True, causal=True, **options)
    return TransformerEncoder(layer, 2)


MODULES = {
    "rotations": lambda: Turned(8), "partial rotations of neighbours": lambda: Turned(6, interleaved=True),
    "given frequencies": lambda: Turned(8, frequencies=FREQUENCIES), "sinusoids": lambda: SinusoidalPositions(EMBED),
    "learned": lambda: LearnedPositions(LONGEST, EMBED), "buckets": Bucketed, "stack, alibi": lambda: stack(alibi=True),
    "stack, rope": lambda: stack(rope=RotaryEmbedding(8, frequencies=FREQUENCIES)),
    "stack, both": lambda: stack(rope=RotaryEmbedding(6), alibi=True, window=(20, 0)),
}
EVERY = pytest.mark.parametrize("name", MODULES)


def made(name):
    return MODULES[name]().eval()


def drawn(length=10):
    return torch.randn(2, length, EMBED)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def kept(module):
    """Tensors that modules reach without their being parameters or buffers."""
    found, seen = [], set()

    def look(x):
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, dict):
            for value in x.values():
                look(value)
        elif isinstance(x, (list, tuple, set)):
            for value in x:
                look(value)
        elif type(x).__module__.startswith("fused_attn"):
            look({name: value for name, value in vars(x).items() if name not in ("_parameters", "_buffers")})

    for one in module.modules():
        look({name: value for name, value in vars(one).items() if name not in ("_parameters", "_buffers")})
    return found


@EVERY
def test_nothing_is_kept(name):
    """From call to call, whatever the lengths."""
    module = made(name)
    for length in (10, 300):
        module(drawn(length))
        assert kept(module) == []


@pytest.mark.few(2)
@EVERY
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_of_a_dynamic_length(name, strict):
    module, x, n = made(name), drawn(), torch.export.Dim("n", min=4, max=LONGEST)
    before = module(x)
    exported = torch.export.export(module, (x,), dynamic_shapes=({1: n},), strict=strict).module()
    for length in (10, 4, 300):
        x = drawn(length)
        close(exported(x), module(x))
        assert type(module(x)) is torch.Tensor
    assert before.shape[0] == 2


@EVERY
def test_fakes_stay_in_their_mode(name):
    module, x = made(name), drawn()
    before = module(x)
    with FakeTensorMode() as mode:
        state = {key: mode.from_tensor(value) for key, value in (*module.named_parameters(), *module.named_buffers())}
        out = torch.func.functional_call(module, state, mode.from_tensor(x))
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype) == (before.shape, before.dtype)
    assert torch.equal(module(x), before)
    assert type(module(x)) is torch.Tensor


@EVERY
def test_inference_before_training(name):
    module, x = made(name), drawn()
    with torch.inference_mode():
        before = module(x.clone())
    out = module(x.requires_grad_())
    close(out, before.clone())
    out.sin().sum().backward()
    assert x.grad.isfinite().all()


@EVERY
def test_a_module_made_on_meta(name):
    """Deferred construction: memory first, weights later; and no value but those was lost with it."""
    module, x = made(name), drawn()
    with torch.device("meta"):
        deferred = made(name).to("meta")  # and what tests/conftest.py fills on the CPU
    assert deferred(x.to("meta")).is_meta
    deferred = deferred.to_empty(device="cpu")
    deferred.load_state_dict(module.state_dict())
    assert torch.equal(deferred(x), module(x))


@EVERY
def test_copies_share_nothing(name):
    module, x = made(name), drawn()
    before = module(x)
    other = copy.deepcopy(module)
    own, others = ({t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (module, other))
    assert not own & others
    close(other.float()(x), before)
    assert torch.equal(module(x), before)


@EVERY
def test_rounding_moves_no_position(name):
    """The parameters lose digits; what the positions are made of does not."""
    module, x = made(name), drawn(LONGEST)
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().float()
    before = module(x)
    assert torch.equal(module.bfloat16().float()(x), before)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", [name for name in MODULES if "stack" not in name and name != "buckets"])
@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_one_length_serves_every_other(name, backend, monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", backend)
    module = made(name)
    traced = torch.jit.trace(module, drawn(), check_trace=False)
    for length in (10, 3, 300):
        x = drawn(length)
        close(traced(x), module(x))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in ("stack, rope", "stack, both") else ())
                                  for name in MODULES])
def test_ten_lengths_are_two_graphs(name):
    torch._dynamo.reset()
    counter, module = CompileCounterWithBackend("aot_eager"), made(name)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (10, 11, 5, 64, 65, 255, 256, 257, 300, 7):
        x = drawn(length)
        close(compiled(x), module(x))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{}, {"rope": RotaryEmbedding(8)}, {"alibi": True}], ids=["plain", "rope", "alibi"])
def test_cached_steps_are_few_graphs(options):
    torch._dynamo.reset()
    counter, model = CompileCounterWithBackend("aot_eager"), stack(**options).eval()
    compiled, x = torch.compile(model, fullgraph=True, backend=counter), drawn(40)
    with torch.no_grad():
        cache = model.new_cache()
        out = torch.cat([compiled(part, cache=cache) for part in x.split([4] + [1] * 36, 1)], 1)
        close(out, model(x))
    assert counter.frame_count <= 3  # the prompt, a token, a token anywhere
    torch._dynamo.reset()


# --- once for a stack ---


def counted(monkeypatch, cls=RotaryEmbedding, name="angles"):
    calls, method = [], getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda *args, **kw: calls.append(1) or method(*args, **kw))
    return calls


def rotated_stack(cls, **options):
    layer = {TransformerEncoder: TransformerEncoderLayer, TransformerDecoder: TransformerDecoderLayer}[cls]
    rope = RotaryEmbedding(8, base=100.0)
    return cls(layer(EMBED, HEADS, 16, 0.0, causal=True, rope=rope, **options), 3).eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cls", [TransformerEncoder, TransformerDecoder])
def test_a_stack_computes_its_angles_once(cls, batch_first, monkeypatch):
    model, x = rotated_stack(cls, batch_first=batch_first, dtype=torch.float64), torch.randn(5, 7, EMBED).double()
    memory = () if cls is TransformerEncoder else (x,)
    expected = x
    for layer in model.layers:  # each by itself
        expected = layer(expected, *memory)
    calls = counted(monkeypatch)
    torch.testing.assert_close(model(x, *memory), expected, rtol=0, atol=0)
    assert len(calls) == 1
    with torch.no_grad():
        cache, dim = model.new_cache(), 1 if batch_first else 0
        parts = [model(part, *memory, cache=cache) for part in x.split([3, 1, x.shape[dim] - 4], dim)]
    torch.testing.assert_close(torch.cat(parts, dim), expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 4


def test_layers_with_other_rotations_have_their_own(monkeypatch):
    model, x = rotated_stack(TransformerEncoder, batch_first=True), drawn()
    model.layers[1].self_attn.rope = RotaryEmbedding(8, base=7.0)
    expected = x
    for layer in model.layers:
        expected = layer(expected)
    calls = counted(monkeypatch)
    assert torch.equal(model(x), expected)
    assert len(calls) == 2


def test_a_stack_takes_unbatched_and_jagged_inputs(monkeypatch):
    model = rotated_stack(TransformerEncoder, batch_first=True)
    sequences = [torch.randn(n, EMBED) for n in (5, 2, 9)]
    expected = [model(x[None])[0] for x in sequences]
    calls = counted(monkeypatch)
    for x, y in zip(sequences, expected, strict=True):
        close(model(x), y)
    assert len(calls) == 3
    out = model(torch.nested.nested_tensor(sequences, layout=torch.jagged))
    close(torch.cat(list(out.unbind())), torch.cat(expected))
    assert len(calls) == 4


class Unaware(TransformerEncoderLayer):
    """Of someone else's, whose forward has torch's arguments alone."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


class Checkpointed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.self_attn = layer, layer.self_attn

    def forward(self, src, **arguments):
        return checkpoint(lambda x: self.layer(x, **arguments), src, use_reentrant=False)


@pytest.mark.parametrize("wrap", [Checkpointed, lambda layer: torch.compile(layer, backend="eager"), None],
                         ids=["checkpointed", "compiled", "a class of its own"])
def test_layers_of_other_code_in_a_stack(wrap):
    torch._dynamo.reset()
    layer = (Unaware if wrap is None else TransformerEncoderLayer)(
        EMBED, HEADS, 16, 0.0, batch_first=True, causal=True, rope=RotaryEmbedding(8)).eval()
    expected = layer(x := drawn())
    model = TransformerEncoder(layer, 1)
    if wrap is not None:
        model.layers[0] = wrap(model.layers[0])
    close(model(x), expected)


def test_a_model_of_its_own_shares_them_by_hand(monkeypatch):
    module, x = MultiheadAttention(EMBED, HEADS, batch_first=True, rope=RotaryEmbedding(8), alibi=True, causal=True), drawn()
    expected = module(x, x, x, need_weights=False)[0]
    once = module.position_embeddings(x)
    calls = counted(monkeypatch)
    assert torch.equal(module(x, x, x, need_weights=False, position_embeddings=once)[0], expected)
    assert not calls


@pytest.mark.parametrize("cached", [False, True])
def test_embeddings_of_another_kind_are_refused(cached):
    """In both ways: what a module lacks, and what it does not ask for."""
    def made(**options):
        return MultiheadAttention(EMBED, HEADS, batch_first=True, causal=True, **options).eval()

    x = drawn()
    modules = [made(), made(alibi=True), made(rope=RotaryEmbedding(8)), made(rope=RotaryEmbedding(4)),
               made(rope=RotaryEmbedding(8, base=500.0)), made(rope=RotaryEmbedding(8), alibi=True)]
    for module, other in itertools.product(modules, modules):
        given = other.position_embeddings(x)
        if given is not None and module is not other:
            with pytest.raises(ValueError, match="position_embeddings: expected those of a module with this one's rope"):
                module(x, x, x, need_weights=False, position_embeddings=given, cache=KVCache() if cached else None)
