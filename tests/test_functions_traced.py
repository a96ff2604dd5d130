"""Plain score and mask functions: when they are traced anew, and what they leave behind."""

import collections
import enum
import functools
import gc
import threading
import types
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch

from fused_attn import attention
from fused_attn.call.functions import functions

pytestmark = pytest.mark.kernels

N = 20
Q_IDX, K_IDX = torch.arange(N)[:, None], torch.arange(N)
BACKENDS = "reference", "blocked", "triton"


def qkv(dtype=torch.float64):
    return [torch.randn(2, 2, N, 16, dtype=dtype) for _ in range(3)]


def plain(q, k, v, factor=1.0, summand=0.0):
    """Attention with scores changed by what is already computed."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 * factor + summand, -1) @ v


def check(function, factor=1.0, summand=0.0, backend="reference", **arguments):
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v, score_mod=function, backend=backend, **arguments),
                               plain(q, k, v, factor, summand))


# --- what a function captures is seen at every call ---

SLOPE = 1.0


class Settings:
    """Numbers to capture; ``shared`` is that of all."""

    shared = 1.0

    def __init__(self, slope, other=1.0):
        self.slope, self.other = slope, other

    def times(self, x):
        return x * self.slope

    def times_other(self, x):
        return x * self.other

    def through(self, s, b, h, q, k):
        return self.times(s)

    def __call__(self, s, b, h, q, k):
        return self.times(s)

    def __getitem__(self, name):
        return vars(self)[name]


class Layer(torch.nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, s, b, h, q, k):
        return s * self.slope


class Choice(enum.Enum):
    ONE, TWO = 1.0, 2.0


class Number(enum.IntEnum):
    ONE, TWO = 1, 2


class Float(float):
    """A number of a class of its own."""


Pair = collections.namedtuple("Pair", "first second")


def with_default(x):
    def function(s, b, h, q, k, x=x):
        return s * x

    return function


def with_keyword(x):
    def function(s, b, h, q, k, *, x=x):
        return s * x

    return function


def nested(x):
    def function(s, *_):
        def inner(t):
            return t * x

        return inner(s)

    return function


def recursive(x):
    def times(s, n):
        return s if n == 0 else times(s * x, n - 1)

    return lambda s, *_: times(s, 1)


def cached(x):
    factor = functools.lru_cache(lambda: x)
    return lambda s, *_: s * factor()


def decorated(x):
    def factor(function):
        return functools.wraps(function)(lambda *args: function(*args) * x)

    return factor(lambda s, b, h, q, k: s)


def first(x):
    """A function that captures x, and multiplies by its first element."""
    return lambda s, *_: s * x[0]


def as_float(x):
    return lambda s, *_: s * float(x)


# Each makes a function that multiplies the score by the number that it is given, 1 or 2.
MAKERS = {
    "number": lambda x: lambda s, *_: s * x, "list": lambda x: first([x]),
    "nested list": lambda x: (lambda y: lambda s, *_: s * y[0][0])([[x]]),
    "dict": lambda x: first({0: x}), "tuple": lambda x: first((x, 7)), "default": with_default, "keyword": with_keyword,
    "partial": lambda x: functools.partial(lambda y, s, *_: s * y, x), "nested": nested, "recursive": recursive,
    "decorated": decorated, "attribute": lambda x: (lambda o: lambda s, *_: s * o.slope)(Settings(x)),
    "namespace": lambda x: (lambda o: lambda s, *_: s * o.inner.slope)(types.SimpleNamespace(inner=Settings(x))),
    "enum": lambda x: (lambda choice: lambda s, *_: s * (2.0 if choice is Choice.TWO else 1.0))(Choice(x)),
    "bool": lambda x: (lambda flag: lambda s, *_: s * (2.0 if flag else 1.0))(x == 2),
    "tensor": lambda x: (lambda t: lambda s, b, h, q, k: s * t[h])(torch.full((2,), x)),
    "tensors in a dict": lambda x: (lambda d: lambda s, b, h, q, k: s * d["a"][h])({"a": torch.full((2,), x)}),
    "tensor without dimensions": lambda x: (lambda t: lambda s, *_: s * t)(torch.tensor(x)),
    "module with a parameter": lambda x: (lambda m: lambda s, b, h, q, k: s * m.weight[h, 0])(_linear(x)),
    "method": lambda x: Settings(x).through, "callable object": Settings, "nn.Module": Layer, "lru_cache": cached,
    "helper method": lambda x: (lambda o: lambda s, *_: o.times(s))(Settings(x)),
    "second method": lambda x: (lambda o: lambda s, *_: o.times_other(o.times(s)))(Settings(1.0, x)),
    "object given to a helper": lambda x: (lambda o: lambda s, *_: s * _slope_of(o))(Settings(x)),
    "getattr": lambda x: (lambda o: lambda s, *_: s * getattr(o, "slo" + "pe"))(Settings(x)),
    "indexed object": lambda x: (lambda o: lambda s, *_: s * o["slope"])(Settings(x)),
    "NumPy array": lambda x: first(np.array([x])), "torch.Size": lambda x: first(torch.Size([int(x)])),
    "namedtuple": lambda x: first(Pair(x, 3.0)), "range": lambda x: first(range(int(x), 5)),
    "deque": lambda x: first(collections.deque([x])), "OrderedDict": lambda x: first(collections.OrderedDict({0: x})),
    "set": lambda x: (lambda numbers: lambda s, *_: s * sum(numbers))({x}), "Fraction": lambda x: as_float(Fraction(x)),
    "float of a class": lambda x: (lambda y: lambda s, *_: s * y)(Float(x)),
    "IntEnum": lambda x: (lambda y: lambda s, *_: s * y)(Number(int(x))), "NumPy number": lambda x: as_float(np.float64(x)),
    "length of a tensor": lambda x: (lambda t: lambda s, *_: s * len(t))(torch.zeros(int(x))),
    "shape of a tensor": lambda x: (lambda t: lambda s, *_: s * t.shape[0])(torch.zeros(int(x))),
    "size of a tensor": lambda x: (lambda t: lambda s, *_: s * t.size(0))(torch.zeros(int(x))),
    "elements of a tensor": lambda x: (lambda t: lambda s, *_: s * t.numel())(torch.zeros(int(x))),
    "type of a tensor": lambda x: (lambda t: lambda s, *_: s * (2.0 if t.dtype == torch.int64 else 1.0))(
        torch.zeros(1, dtype=torch.int64 if x == 2 else torch.int32)),
}


def _linear(x):
    layer = torch.nn.Linear(1, 2).double()
    torch.nn.init.constant_(layer.weight, x)
    return layer


def _slope_of(o):
    return o.slope


@pytest.mark.parametrize("name", MAKERS)
def test_functions_that_capture_something_else_are_others(name):
    for x in (1.0, 2.0, 1.0):
        check(MAKERS[name](x), x)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_table_of_another_size(backend):
    """The size of a captured tensor, asked for within the function, is that of the call."""
    for n in (5, 9):
        table = torch.randn(n, dtype=torch.float64)
        check(lambda s, b, h, q, k, table=table: s + table[(q - k + table.shape[0] // 2).clamp(0, table.shape[0] - 1)],
              summand=table[(Q_IDX - K_IDX + n // 2).clamp(0, n - 1)], backend=backend)


def change(where, name, x):
    """Sets what is to be seen at the next call."""
    (vars(where) if isinstance(where, types.ModuleType) else where).update({name: x}) if isinstance(
        where, (dict, types.ModuleType)) else setattr(where, name, x)


CONFIG = types.ModuleType("config")
CONFIG.slope = 1.0
HELD, OWN, MUTATED = {"slope": 1.0}, Settings(1.0), [1.0]


def helper(s):
    return s * SLOPE


@pytest.mark.parametrize(("function", "where", "name"), [
    (lambda s, *_: s * SLOPE, globals(), "SLOPE"), (lambda s, *_: helper(s), globals(), "SLOPE"),
    (lambda s, *_: s * HELD["slope"], HELD, "slope"), (lambda s, *_: s * OWN.slope, OWN, "slope"),
    (OWN.through, OWN, "slope"), (OWN, OWN, "slope"), (lambda s, *_: OWN.times(s), OWN, "slope"),
    (lambda s, *_: s * Settings.shared, Settings, "shared"), (lambda s, *_: s * OWN.shared, Settings, "shared"),
    (lambda s, *_: s * CONFIG.slope, CONFIG, "slope"), (LAYER := Layer(1.0), LAYER, "slope"),
], ids=["global", "global of a helper", "dict", "attribute", "method", "callable object", "method within", "class",
        "class by its instance", "module", "nn.Module"])
def test_changes_are_seen(function, where, name):
    for x in (1.0, 2.0, 1.0):
        change(where, name, x)
        check(function, x)


def test_what_closures_and_containers_hold_is_looked_at_again():
    x, numbers = 1.0, [1.0]

    def function(s, *_):
        return s * x * numbers[0]

    check(function)
    x = 2.0
    check(function, 2.0)
    numbers[0] = 3.0
    check(function, 6.0)


def test_equal_functions_are_traced_once():
    q, k, v = qkv()
    counts = []
    for i in range(12):
        gain = torch.rand(2, dtype=torch.float64)
        attention(q, k, v, score_mod=lambda s, b, h, i, j, gain=gain: s * gain[h] + 0.25, backend="reference",
                  mask_mod=lambda b, h, i, j, reach=i % 2 + 3: (i - j).abs() < reach)
        counts.append(len(functions._TRACED))
    assert counts[1] == counts[-1], "one score function, and masks of two reaches"
    assert counts[1] == counts[0] + 1


def test_threads():
    """Several trace at once, functions of one code with other captures among them."""
    wrong, start = [], threading.Barrier(6)

    def work(x):
        q, k, v = qkv()
        start.wait()
        for i in range(5):
            gain = torch.full((2,), x, dtype=torch.float64)
            out = attention(q, k, v, score_mod=lambda s, b, h, i, j, gain=gain, n=i: s * gain[h] * x + n, backend="reference")
            wrong.extend([x] if not torch.allclose(out, plain(q, k, v, x * x)) else [])

    threads = [threading.Thread(target=work, args=(1.0 + i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_tensors_go_with_the_function(backend):
    def used():
        owner, table = Settings(torch.rand(N, dtype=torch.float64)), torch.rand(3, 3, dtype=torch.float64, requires_grad=True)

        def function(s, b, h, q, k):
            return s + owner.slope.exp()[k] + table[q % 3, k % 3]

        def refused(s, b, h, q, k):
            return s if owner.slope[k] > 0 else -s

        tensors = [x.requires_grad_() for x in qkv()]
        attention(*tensors, score_mod=function, backend=backend, deterministic=False).sum().backward()
        with pytest.raises(TypeError, match="score_mod: a branch"):
            attention(*tensors, score_mod=refused, backend=backend)
        return [weakref.ref(x) for x in (owner, owner.slope, table)]

    alive = used()
    gc.collect()
    assert [x() for x in alive] == [None] * 3


def test_a_looked_up_table_where_sums_must_be_equal_to_the_bit():
    table = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv()

    def lookup(s, b, h, q, k):
        return s + table[q % 3, k % 3]

    with pytest.raises(ValueError, match=r"backend: 'triton'.*lookup looks up is summed by atomics"):
        attention(q, k, v, score_mod=lookup, backend="triton", deterministic=True)
    grads = []
    for backend in (None, "reference", "blocked"):
        out = attention(q, k, v, score_mod=lookup, backend=backend, deterministic=True)
        grads.append(torch.autograd.grad(out.sin().sum(), table)[0])
        torch.testing.assert_close(grads[0], grads[-1])
