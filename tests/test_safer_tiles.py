"""Tiles that do not fit a card: safer ones are taken, once and for all, and the answers stay right."""

import gc
import warnings
import weakref

import pytest
import torch
from support.features import Shape
from support.launching import Launching, process
from triton.runtime.errors import OutOfResources, PTXASError

import fused_attn
from fused_attn import attention
from fused_attn.call.spec import TileConfig
from fused_attn.kernels import launch
from fused_attn.kernels.launch import UnfitTilesError
from fused_attn.plan import safer, tiles
from fused_attn.plan.problem import Problem
from fused_attn.run import plans

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def tables_own():
    safer.forget()
    yield
    safer.forget()


def qkv(n_queries=40, n_keys=70, dim=16, dtype=torch.bfloat16):
    return [torch.randn(1, heads, n, dim).to(dtype) for heads, n in ((4, n_queries), (2, n_keys), (2, n_keys))]


def refusing(monkeypatch, fits):
    """Has every launch looked at, and those refused whose kernel and tiles ``fits`` says no of; what was launched."""
    launched = []

    real = launch._launch_as_it_is

    def looked_at(one, device):
        real(one, device)
        if not fits(one.name, one.config):
            raise UnfitTilesError(one, "spills 4096 bytes a thread")
        launched.append((one.name, one.config.words))

    monkeypatch.setattr(launch, "_launch_as_it_is", looked_at)
    return launched


def gradients(tensors, **arguments):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attention(*leaves, return_lse=True, causal=True, **arguments)
    return out.detach(), lse.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)


def close(got, want):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("kernel", "taken"), [
    ("forward", "32x16 w1 s1"), ("dq", "32x16 w1 s1"), ("dkv", "32x16 w1 s1 separate")])
def test_the_next_tiles_that_fit_are_taken_once(monkeypatch, kernel, taken):
    """Down to half of both sides; one warning a step, and none in later calls, whose results are the same to the bit."""
    tensors = qkv()
    want = gradients(tensors, backend="reference")
    launched = refusing(monkeypatch, lambda name, config: name != f"{kernel}_kernel"
                        or config.block_m * config.block_n <= 32 * 16)
    with pytest.warns(RuntimeWarning, match="spills 4096 bytes") as said:
        first = gradients(tensors, backend="triton")
    assert len(said) == (3 if kernel == "dkv" else 2)
    close(first, want)
    assert (f"{kernel}_kernel", taken) in launched
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            assert all(map(torch.equal, gradients(tensors, backend="triton"), first))
    told = fused_attn.explain(*tensors, causal=True, backend="triton")
    assert told.safer == {kernel: taken}
    assert f"{kernel}: tiles {taken}, as those of the tables do not fit this card" in str(told).splitlines()


def test_calls_of_another_kind_keep_their_tiles(monkeypatch):
    tensors = qkv()
    launched = refusing(monkeypatch, lambda name, config: config.block_m <= 32)
    with pytest.warns(RuntimeWarning):
        attention(*tensors, backend="triton")
    monkeypatch.undo()
    launched = refusing(monkeypatch, lambda name, config: True)
    attention(*tensors, backend="triton")
    assert launched[-1] == ("forward_kernel", "32x32 w1 s1")
    attention(*[x.float() for x in tensors], backend="triton")
    assert launched[-1] == ("forward_kernel", "64x32 w1 s1")
    attention(*tensors, softcap=2.0, backend="triton")
    assert launched[-1] == ("forward_kernel", "64x32 w1 s1")


def test_the_fused_backward_is_given_up(monkeypatch):
    monkeypatch.setattr("fused_attn.plan.problem.choose_fused", lambda *_: tiles.T(16, 32, 1, 1))
    tensors = qkv()
    want = gradients(tensors, backend="reference")
    refusing(monkeypatch, lambda name, config: config.words != "16x32 w1 s1")
    with pytest.warns(RuntimeWarning, match="another schedule is taken instead"):
        got = gradients(tensors, backend="triton", deterministic=False)
    close(got, want)
    told = fused_attn.explain(*tensors, causal=True, deterministic=False, backend="triton")
    assert told.schedule["backward"] == "separate"
    assert "fused: its kernel does not fit this card" in str(told).splitlines()


def test_splits_have_tiles_of_their_own(monkeypatch):
    monkeypatch.setattr(tiles, "MANY_KEYS", 64)
    monkeypatch.setattr(tiles, "SPLIT", 32)
    monkeypatch.setattr(tiles, "SPLIT_A_ROW", 1)
    tensors = qkv(1, 193)
    launched = refusing(monkeypatch, lambda name, config: name != "forward_kernel" or config.block_n <= 16)
    with pytest.warns(RuntimeWarning):
        got = attention(*tensors, backend="triton")
    close([got], [attention(*tensors, backend="reference")])
    assert {name for name, _ in launched} == {"forward_kernel", "combine_kernel"}
    assert set(fused_attn.explain(*tensors, backend="triton").safer) == {"splits"}


def test_at_the_end_of_the_ladder_the_error_comes_out(monkeypatch):
    refusing(monkeypatch, lambda name, config: False)
    with pytest.warns(RuntimeWarning), pytest.raises(UnfitTilesError, match=r"16x16 w1 s1 spills.*at first.*64x32"):
        attention(*qkv(), backend="triton")


LADDERS = {
    "forward": ["128x64 w8 s1 nolicm", "64x64 w8 s1 nolicm", "64x32 w8 s1 nolicm", "32x32 w4 s1 nolicm", "32x16 w4 s1 nolicm",
                "16x16 w4 s1 nolicm"],
    "dkv": ["128x64 w8 s1 nolicm", *(f"{tile} s1 nolicm separate" for tile in (
        "128x64 w8", "64x64 w8", "64x32 w8", "32x32 w4", "32x16 w4", "16x16 w4"))],
    "operand_grad": ["128x64 w8 s1 nolicm", "32x32 w4 s1 nolicm", "16x16 w4 s1 nolicm"],  # square
}


@pytest.mark.parametrize("kernel", LADDERS)
def test_the_ladder_ends_with_the_smallest_tiles(kernel):
    config, steps = TileConfig(128, 64, 8, 3, edge_stages=1, disable_licm=True), []
    while (config := safer.safer(config, kernel)) is not None:
        steps.append(config.words)
    assert steps == LADDERS[kernel]


def test_gradients_of_a_relative_bias_stay_right(monkeypatch):
    """Their sums along diagonals want square tiles."""
    q, k, v = qkv(70, 70, dtype=torch.float32)
    values = torch.randn(4, 139, requires_grad=True)

    def gradient(backend):
        out = attention(q, k, v, bias=fused_attn.RelativeBias(values), backend=backend)
        return torch.autograd.grad(out.sin().sum(), values)

    launched = refusing(monkeypatch, lambda name, config: name != "operand_grad_kernel" or config.block_m <= 16)
    with pytest.warns(RuntimeWarning):
        got = gradient("triton")
    assert ("operand_grad_kernel", "16x16 w1 s1") in launched
    torch.testing.assert_close(got, gradient("reference"), rtol=1e-4, atol=1e-4)


def test_a_kernel_without_tiles_of_its_own_is_no_endless_loop(monkeypatch):
    refusing(monkeypatch, lambda name, config: name != "list_kernel")
    with pytest.raises(UnfitTilesError, match="list_kernel"):
        attention(*qkv(), mask=torch.rand(40, 70) < 0.5, backend="triton")


class Spilling:
    """What Triton compiles of a kernel that spills."""

    def __init__(self, n_spills):
        self.n_spills = n_spills


def test_where_every_step_spills_the_least_is_kept(monkeypatch):
    """A kernel that runs is never refused: the call is answered, by the tiles that spill least, and so are later ones."""
    spills = {"64x32 w1 s1": 600, "32x32 w1 s1": 300, "32x16 w1 s1": 500, "16x16 w1 s1": 400}
    compiled, ran, real = {}, [], launch._launch

    def looked_at(one, device, kept):
        result = real(one, device, None)
        if one.name == "forward_kernel":
            ran.append(one.config.words)
            launch._look(one, compiled.setdefault(one.config.words, Spilling(spills[one.config.words])))
        return result

    monkeypatch.setattr(launch, "_launch", looked_at)
    tensors = qkv()
    with pytest.warns(RuntimeWarning) as said:
        first = attention(*tensors, backend="triton")
    assert "32x32 w1 s1, which spills least, is kept" in str(said[-1].message)
    assert ran == [*spills, "32x32 w1 s1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attention(*tensors, backend="triton"), first)
    assert ran[-1] == "32x32 w1 s1"
    close([first], [attention(*tensors, backend="reference")])


def test_what_did_not_fit_keeps_no_tensor(monkeypatch):
    tensors = qkv()
    refusing(monkeypatch, lambda name, config: config.block_m <= 32)
    with pytest.warns(RuntimeWarning):
        attention(*tensors, backend="triton")
    gone = [weakref.ref(x) for x in tensors]
    del tensors
    gc.collect()
    assert [x() for x in gone] == [None] * 3


def test_plans_are_made_of_safer_tiles(monkeypatch):
    plans.forget()
    tensors = qkv()
    launched = refusing(monkeypatch, lambda name, config: config.block_m <= 32)
    with pytest.warns(RuntimeWarning):
        first = attention(*tensors, backend="triton")
    for _ in range(4):
        assert torch.equal(attention(*tensors, backend="triton"), first)
    assert set(launched) == {("forward_kernel", "32x32 w1 s1")}


# --- what Triton and a card say ---


class Failing:
    """A kernel that cannot be launched."""

    def __init__(self, error):
        self.error, self.fn = error, test_plans_are_made_of_safer_tiles

    def __getitem__(self, grid):
        def launched(*arguments, **options):
            raise self.error

        return launched


@pytest.mark.parametrize(("error", "of_tiles"), [
    (OutOfResources(300_000, 200_000, "shared memory"), True), (PTXASError("too many registers"), True),
    (RuntimeError("PassManager::run failed"), True), (ValueError("a mistake in a mod"), False),
    (RuntimeError("CUDA error: an illegal memory access"), False)], ids=repr)
def test_only_what_smaller_tiles_may_cure_is_of_tiles(error, of_tiles):
    with pytest.raises(UnfitTilesError if of_tiles else type(error)) as raised:
        launch.run(launch.Launch(Failing(error), 1, (torch.ones(1), 5), TileConfig(64, 64, 4, 1)))
    assert (raised.value.__cause__ is error) if of_tiles else (raised.value is error)


@pytest.fixture(scope="module")
def worker():
    yield from process()


WIDE = Shape(1, 2, 2, 300, 300, 128, 128)


@pytest.mark.parametrize(("planted", "said"), [
    ({"forward": (256, 128, 8, 4)}, "shared memory"), ({"forward": (128, 256, 4, 1)}, "spills")])
def test_what_does_not_fit_a_card_is_seen(worker, planted, said):
    """Too much shared memory for the card, and sums that the registers do not hold."""
    told = worker(Launching(("causal",), "sm_80", shape=WIDE, asks="output", tiles=planted, repeats=5))
    assert told["verdict"] == "ok", told["verdict"]
    assert any(said in text for text in told["warned"]), told["warned"]
    kept = [launch for launch in told["launches"] if launch["frame"] <= 1024]
    assert len(kept) == 5, "each turn ends with a launch that fits"
    assert len({launch["grid"][0] for launch in kept[:3]}) == 1
    assert kept[-1]["grid"] == kept[3]["grid"], "what an unaligned call was found to need holds for all of its kind"


def test_schedules_with_tiles_of_their_own_keep_them():
    """What the default kernel steps down to is not for them, who are given up whole."""
    call = fused_attn.call.describe.describe(*qkv(dim=64))
    own = Problem.of(*call, arch="sm_90", tiles={}).hopper_config("gluon")
    stepped = Problem.of(*call, arch="sm_90", tiles={"forward": TileConfig(16, 16, 4, 1)})
    assert stepped.hopper_config("gluon") == own
    assert stepped.config("forward") == TileConfig(16, 16, 4, 1)
    assert Problem.of(*call, arch="sm_90", tiles={"gluon": None}).gives_up("gluon")
