"""Switches: what the environment may say, and contexts that overlap, in one thread, in tasks, in threads, in compiled calls."""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fused_attn
from fused_attn import settings

ROOT = Path(__file__).parents[1]
SWITCHES = {  # a way in, what it makes of the default, and how that reads
    "strict": (fused_attn.strict, lambda: settings.is_strict(None), False, True),
    "hopper": (lambda: fused_attn.hopper("gluon"), settings.hopper_schedule, "auto", "gluon"),
}
switches = pytest.mark.parametrize(("enter", "now", "off", "on"), SWITCHES.values(), ids=SWITCHES)


# --- contexts ---


@switches
def test_contexts_that_overlap_end_with_the_last_one(enter, now, off, on):
    a, b = enter(), enter()
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert now() == on
    b.__exit__(None, None, None)
    assert now() == off


def test_the_one_entered_last_holds_whichever_is_left_first():
    outer, inner = fused_attn.hopper("gluon"), fused_attn.hopper("descriptors")
    with contextlib.ExitStack() as stack:
        outer.__enter__()
        stack.enter_context(inner)
        assert settings.hopper_schedule() == "descriptors"
        outer.__exit__(None, None, None)
        assert settings.hopper_schedule() == "descriptors"
        with fused_attn.hopper("pointers"):
            assert settings.hopper_schedule() == "pointers"
        assert settings.hopper_schedule() == "descriptors"
    assert settings.hopper_schedule() == "auto"


@switches
def test_generators_that_are_closed_in_any_order(enter, now, off, on):
    def within():
        with enter():
            yield now()

    first, second = within(), within()
    assert [next(first), next(second)] == [on, on]
    first.close()
    second.close()
    assert now() == off


@switches
def test_exceptions_end_it(enter, now, off, on):
    with pytest.raises(KeyError), enter():
        raise KeyError
    assert now() == off


@switches
def test_tasks_do_not_see_each_other(enter, now, off, on):
    async def run():
        entered, left = asyncio.Event(), asyncio.Event()
        seen = []

        async def first():
            with enter():
                entered.set()
                await left.wait()
                seen.append(now())
            seen.append(now())

        async def second():
            await entered.wait()
            seen.append(now())
            with enter():
                seen.append(await asyncio.to_thread(now))
            seen.append(now())
            left.set()

        await asyncio.gather(first(), second())
        return seen, now()

    assert asyncio.run(run()) == ([off, on, off, on, off], off)
    assert now() == off


@switches
def test_a_task_that_outlives_the_context_it_was_started_in(enter, now, off, on):
    async def run():
        left, seen = asyncio.Event(), []

        async def late():
            seen.append(now())
            await left.wait()
            seen.append(now())

        with enter():
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        left.set()
        await task
        return seen

    assert asyncio.run(run()) == [on, off]


@switches
def test_threads_that_overlap(enter, now, off, on):
    barriers, seen = [threading.Barrier(2, timeout=60) for _ in range(3)], {}

    def work(name, enters_first):
        barriers[0].wait()
        before = now()
        if not enters_first:
            barriers[1].wait()
        with enter():
            if enters_first:
                barriers[1].wait()
            within = now()
            if enters_first:
                barriers[2].wait()
        if not enters_first:
            barriers[2].wait()
        seen[name] = before, within, now()

    threads = [threading.Thread(target=work, args=(i, i == 0)) for i in range(2)]
    with enter():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {0: (off, on, off), 1: (off, on, off)}
    assert now() == off


@switches
def test_left_in_another_thread_than_entered(enter, now, off, on):
    context = enter()
    context.__enter__()
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert now() == off


@pytest.mark.parametrize("value", [1, None, "gluon"])
def test_strict_takes_a_bool(value):
    with pytest.raises(TypeError, match=f"enabled: expected a bool; got {value!r}"):
        fused_attn.strict(value)


# --- compiled calls ---


CAPPED = fused_attn.ScoreMod("capped", reference=lambda score, *_: 2 * torch.tanh(score / 2))


def quadratic(x):
    """Statistics of weights that no kernel computes."""
    return fused_attn.attention_stats(x, x, score_mod=CAPPED).entropy


@pytest.fixture
def compiled():
    """A compiled call that only the quadratic reference answers on a CPU, and how often it was compiled."""
    torch._dynamo.reset()
    counter, x = CompileCounter(), torch.randn(1, 2, 4, 8)
    call = torch.compile(quadratic, backend=counter, fullgraph=True)
    yield lambda: call(x), counter
    torch._dynamo.reset()


def test_a_compiled_call_follows_strict(compiled):
    call, counter = compiled
    call()
    with fused_attn.strict(), pytest.raises(Exception, match="strict: only the quadratic reference"):
        call()
    with fused_attn.strict(), fused_attn.strict(False):
        call()
    call()
    assert counter.frame_count == 1


def test_a_call_compiled_under_strict_does_not_hold_elsewhere():
    torch._dynamo.reset()
    x = torch.randn(1, 2, 4, 8)

    def attend(x):
        try:
            return quadratic(x)
        except RuntimeError:
            return torch.zeros_like(x[..., 0])

    call = torch.compile(attend, backend="eager")
    with fused_attn.strict():
        assert not call(x).any()
    assert call(x).any()
    with fused_attn.strict():
        assert not call(x).any()
    thread_saw = []
    with fused_attn.strict():
        thread = threading.Thread(target=lambda: thread_saw.append(bool(call(x).any())))
        thread.start()
        thread.join()
    assert thread_saw == [True]


def test_a_compiled_call_follows_hopper(compiled):
    call, counter = compiled
    for hopper, count in (("pointers", 1), ("gluon", 2), ("descriptors", 3), ("pointers", 3), ("gluon", 3)):
        with fused_attn.hopper(hopper):
            call()
        assert counter.frame_count == count


def test_contexts_inside_a_compiled_function():
    torch._dynamo.reset()
    seen = []

    @torch.compiler.assume_constant_result
    def note(hopper):
        seen.append(hopper)
        return 0

    def attend(x):
        with fused_attn.hopper("gluon"), fused_attn.strict():
            note(settings.hopper_schedule())
            out = fused_attn.attention(x, x, x)
        note(settings.hopper_schedule())
        return out + quadratic(x)[..., None]  # strict no more

    x = torch.randn(1, 2, 4, 8)
    call = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(call(x), attend(x))
    assert seen[:2] == ["gluon", "auto"]
    assert (settings.is_strict(None), settings.hopper_schedule()) == (False, "auto")

    def refused(x):
        with fused_attn.strict():
            return quadratic(x)

    with pytest.raises(Exception, match="strict: only the quadratic reference"):
        torch.compile(refused, backend="eager", fullgraph=True)(x)
    assert settings.is_strict(None) is False


def unfinished(enter, x):
    """A generator that is left inside its context."""
    def chunks():
        with enter():
            yield x + 1
            yield x + 2

    return next(chunks())


def unleft(enter, x):
    context = enter()
    context.__enter__()
    return x + 1


def broken_off(enter, x):
    with enter():
        raise KeyError


@pytest.mark.few(3)
@pytest.mark.parametrize("leave", [unfinished, unleft, broken_off])
@switches
def test_a_context_of_a_compiled_function_ends_with_it(enter, now, off, on, leave):
    torch._dynamo.reset()
    with contextlib.suppress(Exception):
        torch.compile(lambda x: leave(enter, x), backend="eager")(torch.ones(3))
    seen = torch.compile(lambda x: (x + 1, now()), backend="eager", fullgraph=True)(torch.ones(3))[1]
    assert (seen, now()) == (off, off)
    gc.collect()
    assert not settings._traced  # nor is anything kept of it


def test_contexts_that_overlap_inside_a_compiled_function():
    torch._dynamo.reset()

    def attend(x):
        outer, inner = fused_attn.hopper("gluon"), fused_attn.hopper("descriptors")
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        seen = settings.hopper_schedule()
        inner.__exit__(None, None, None)
        return x + 1, (seen, settings.hopper_schedule())

    assert torch.compile(attend, backend="eager", fullgraph=True)(torch.ones(3))[1] == ("descriptors", "auto")


# --- the environment ---


def read(**environment):
    """(last line of the output, of the errors) of a process that prints its settings."""
    code = ("import fused_attn.settings as s\n"
            "print(s.BACKEND, s.TILES, s.DETERMINISTIC, s.is_strict(None), s.hopper_schedule())")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FUSED_ATTN_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
                          env=clean | {"PYTHONPATH": str(ROOT), **environment})
    return tuple("".join(text.splitlines()[-1:]) for text in (done.stdout, done.stderr))


TRUE, FALSE = ("1", "true", "TRUE ", " On", "yes"), ("0", "False", "off ", "NO", "", " ")


@pytest.mark.slow
@pytest.mark.parametrize("value", [*TRUE, *FALSE])
def test_switches_are_on_or_off(value):
    out, _ = read(FUSED_ATTN_STRICT=value, FUSED_ATTN_DETERMINISTIC=value)
    assert out == f"None None {value in TRUE} {value in TRUE} auto"


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("STRICT", "2", "1, true, yes, on, 0, false, no or off"), ("DETERMINISTIC", "2", "1, true"), ("STRICT", "tru", "1, true"),
    ("DETERMINISTIC", "enabled", "1, true"), ("STRICT", "-1", "1, true"), ("STRICT", "None", "1, true"),
    ("BACKEND", "cudnn", "one of triton, torch, blocked, reference"), ("HOPPER", "1", "one of auto, pointers, descriptors"),
])
def test_what_means_nothing_is_an_error(name, value, expected, monkeypatch):
    monkeypatch.setenv(f"FUSED_ATTN_{name}", value)
    choices = {"BACKEND": settings.BACKENDS, "HOPPER": settings.HOPPER_CHOICES}
    with pytest.raises(ValueError, match=f"^FUSED_ATTN_{name}: expected {expected}.*; got {value!r}"):
        settings._choice(f"FUSED_ATTN_{name}", choices[name]) if name in choices else settings._flag(f"FUSED_ATTN_{name}")


@pytest.mark.slow
def test_every_variable_is_checked_at_import():
    """One process for each: an error that names the variable, or a warning for a name that means nothing."""
    for name in ("STRICT", "DETERMINISTIC", "BACKEND", "HOPPER"):
        out, error = read(**{f"FUSED_ATTN_{name}": "2"})
        assert (out, error.startswith(f"ValueError: FUSED_ATTN_{name}: expected ")) == ("", True), (name, error)
    out, error = read(FUSED_ATTN_BACKEND=" Torch", FUSED_ATTN_HOPPER="GLUON ", FUSED_ATTN_TILES=" none ",
                      FUSED_ATTN_STRICT="On")
    assert (out, error) == ("torch none False True gluon", "")


def test_a_misspelt_variable_is_a_warning():
    code = "import warnings; warnings.simplefilter('error'); import fused_attn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "FUSED_ATTN_STRCIT": "1"})
    assert "RuntimeWarning: fused_attn: FUSED_ATTN_STRCIT is no environment variable of this version" in done.stderr
