"""Rings of tiles in shared memory, which one producer warp fills by TMA and warpgroups of consumers empty.

A *step* counts the tiles that a ring has carried: step s lies in slot ``s % stages``, and its barriers are awaited with
the parity of ``s // stages``. Each slot has two barriers: ``full`` is passed once the tile's bytes have landed,
``empty`` once every consumer has handed the slot back. Kernels whose slots hold several tiles use the barriers alone.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Triton 3.6 and 3.7 have the long names alone, 3.8 both, 3.9 the short ones alone.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


class Ring(NamedTuple):
    """``stages`` tiles in shared memory and their barriers."""

    tiles: Any  # [stages, 1, ..., rows, columns]
    full: Any  # [stages, 1]
    empty: Any  # [stages, 1]


@gluon.jit
def allocate_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier [STAGES, 1] for each slot, passed at the ``ARRIVALS``th arrival of a step."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def barrier_at(barriers, step):
    """The barrier of a step's slot."""
    return barriers.index(step % barriers.shape[0])


@gluon.jit
def await_step(barriers, step, pred=True):
    """Waits until the barrier of a step's slot is passed in that step."""
    mbarrier.wait(barrier_at(barriers, step), (step // barriers.shape[0]) & 1, pred=pred)


@gluon.jit
def await_step_before(barriers, step):
    """Waits until the step that used the slot before this one has passed its barrier; the first steps do not wait."""
    mbarrier.wait(barrier_at(barriers, step), (step // barriers.shape[0] + 1) & 1)


@gluon.jit
def allocate_ring(desc, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """A ring for the boxes of a tensor descriptor."""
    tiles = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)
    full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, CONSUMERS)
    fence_async_shared()  # a barrier that no warp waits at may share its bytes with a tile
    return Ring(tiles, full, empty)


@gluon.jit
def fill(ring, step, desc, coordinates):
    """Producer: starts to load the box at ``coordinates``, as soon as its slot is empty."""
    await_step_before(ring.empty, step)
    full = barrier_at(ring.full, step)
    mbarrier.expect(full, desc.block_type.nbytes)
    tma_load(desc, coordinates, full, ring.tiles.index(step % ring.tiles.shape[0]))


@gluon.jit
def await_tile(ring, step, pred=True):
    """Consumer: waits until the tile has landed."""
    await_step(ring.full, step, pred)


@gluon.jit
def tile_at(ring, step):
    """The tile [rows, columns] in shared memory."""
    tile = ring.tiles.index(step % ring.tiles.shape[0])
    return tile.reshape([ring.tiles.shape[-2], ring.tiles.shape[-1]])


@gluon.jit
def release(ring, step):
    """Consumer: hands the slot back; nothing of its own may read it any more."""
    mbarrier.arrive(barrier_at(ring.empty, step), count=1)
