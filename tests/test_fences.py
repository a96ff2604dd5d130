"""Fences that are put into Triton's code: where, into which kernels, and into nobody else's."""

import dataclasses
import itertools
import threading

import pytest

pytest.importorskip("triton")

import torch
import triton

from fused_attn.call.spec import Kind, TileConfig
from fused_attn.kernels import fences, launch

FENCE = "\tfence.proxy.async.shared::cta;"
PTX = """
	@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	cp.async.commit_group;
	cp.async.wait_group 	0x1;
	bar.sync 	0, 128;
	@%p4 cp.async.wait_all;
	@%p261 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [ %rd76 + 0 ], [ %rd73 + 0 ], 0x80;
	cp.async.bulk.wait_group.read 	0;
	PRODUCT;
"""  # noqa: E501


@pytest.mark.parametrize("product", ["wgmma.mma_async.sync.aligned", "cp.async.bulk.tensor.2d.shared::cta", "tcgen05.mma"])
def test_what_has_landed_is_fenced(product):
    lines = fences.with_fences(PTX.replace("PRODUCT", product)).split("\n")
    behind = [before.partition("cp")[2][:14] for before, line in itertools.pairwise(lines) if line == FENCE]
    assert behind == [".async.wait_gr", ".async.wait_al", "_fenceproxy.gl"]
    assert [line for line in lines if line != FENCE] == PTX.replace("PRODUCT", product).split("\n")


def test_what_only_ordinary_reads_follow_is_left_alone():
    text = PTX.replace("PRODUCT", "mma.sync.aligned.m16n8k16")
    assert fences.with_fences(text) == text


@pytest.mark.parametrize(("version", "arch", "descriptors", "lacking"), [
    ((3, 6), "sm_90", False, True), ((3, 7), "sm_90", False, False), ((3, 10), "sm_90", False, False),
    ((3, 7), "sm_90", True, True), ((3, 8), "sm_90", True, False), ((3, 8), "sm_100", False, True),
    ((3, 8), "sm_103", False, True), ((3, 9), "sm_100", False, False), ((3, 6), "sm_80", False, False),
    ((3, 6), "sm_89", False, False), ((3, 6), "sm_120", False, False), ((3, 6), "gfx942", False, False),
    ((3, 6), "interpreter", False, False), ((3, 6), "xpu", False, False),
])
def test_which_kernels_are_fenced(monkeypatch, version, arch, descriptors, lacking):
    monkeypatch.setattr(fences, "triton_version", lambda: version)
    fences.lacking.cache_clear()
    assert fences.lacking(arch, descriptors) is lacking
    fences.lacking.cache_clear()


def test_kernels_with_fences_are_kept_apart_from_those_without():
    config = TileConfig(64, 64, 4, 2)
    assert fences.fenced(config) == TileConfig(64, 64, 4, 2, fenced=True) != config


def compile_ptx():
    """What a compilation makes of PTX, as Triton asks its hook."""
    stages = {"ptx": lambda source, metadata: PTX.replace("PRODUCT", "wgmma.mma_async")}
    hook = triton.knobs.runtime.add_stages_inspection_hook
    if hook is not None:
        hook(None, stages, None, None, 90)
    return stages["ptx"](None, {})


@pytest.fixture(autouse=True)
def no_hook(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", None)


def test_kernels_are_fenced_while_one_of_ours_is_launched():
    before = compile_ptx()
    with fences.putting_in():
        with fences.putting_in():
            assert FENCE in compile_ptx()
        assert FENCE in compile_ptx()
    assert compile_ptx() == before
    with pytest.raises(OSError, match="full"), fences.putting_in():
        raise OSError("full")
    assert compile_ptx() == before
    assert triton.knobs.runtime.add_stages_inspection_hook() == ("", "")  # nothing of others' kernels has another key on disk


def test_a_users_own_hook_is_called_and_stays(monkeypatch):
    seen = []

    def own(*compilation):
        seen.append(compilation)
        if not compilation:
            return "key", "hash"
        compilation[1]["ptx"] = lambda source, metadata, make=compilation[1]["ptx"]: make(source, metadata) + "// own"

    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", own)
    with fences.putting_in():
        assert triton.knobs.runtime.add_stages_inspection_hook() == ("key", "hash")
        made = compile_ptx()
    assert FENCE in made
    assert made.endswith("// own")
    assert len(seen) == 2
    assert compile_ptx().endswith("// own")


def test_a_hook_that_calls_ours_has_nothing_fenced_twice():
    with fences.putting_in():
        ours = triton.knobs.runtime.add_stages_inspection_hook
    triton.knobs.runtime.add_stages_inspection_hook = lambda *compilation: ours(*compilation)
    with fences.putting_in():
        assert compile_ptx().count(FENCE) == 3


def test_what_another_thread_compiles_meanwhile_is_its_own():
    found = []
    with fences.putting_in():
        thread = threading.Thread(target=lambda: found.append(compile_ptx()))
        thread.start()
        thread.join()
    assert FENCE not in found[0]


def test_launches_are_fenced_where_the_card_lacks_fences(monkeypatch):
    made, config = [], TileConfig(64, 64, 4, 2)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: made.append((args[-1], FENCE in compile_ptx()))

    monkeypatch.setattr(fences, "lacking", lambda arch, descriptors: arch == "sm_90")
    for arch in ("sm_90", "sm_80"):
        monkeypatch.setattr(launch, "arch_of", lambda device, arch=arch: arch)
        launch.run(launch.Launch(Kernel(), 1, (torch.empty(1),), config))
    assert made == [(fences.fenced(config), True), (config, False)]


def test_a_configuration_is_known_by_all_that_it_says():
    """Triton finds compiled kernels by the text of their constants: one that leaves a field out would find another's."""
    plain = TileConfig(32, 64, 4, 2)
    changed = [dataclasses.replace(plain, **{field.name: 1 if getattr(plain, field.name) != 1 else 2})
               for field in dataclasses.fields(plain)]
    assert len({str(config) for config in (plain, *changed)}) == 1 + len(changed)
    kind = Kind(2, 64, 32, "fp32")
    changed = [dataclasses.replace(kind, **{field.name: "another"}) for field in dataclasses.fields(kind)]
    assert len({str(each) for each in (kind, *changed)}) == 1 + len(changed)
