"""A CPU interpreter for Gluon kernels of Hopper, under an adversarial schedule: no GPU, no compiler.

Triton's interpreter does not take Gluon. This one executes the Python bodies of @gluon.jit functions on numpy tiles, each
partition of warp_specialize a thread of which one runs at a time. A random number generator decides at every synchronising
operation who goes on and which asynchronous work completes, so that a missing wait, a wrong phase, an early release or a
missing fence shows for some seed, as a NaN, a wrong value, a ``Fault`` or a ``Deadlock``:

- a TMA load fills its tile with NaN when it is issued and with data at any later time; its barrier counts the bytes
- an async wgmma reads shared memory at any time before the wait that retires it; its result cannot be read before
- a TMA store or reduction reads shared memory at any time before store_wait, and writes at any time after
- nothing may read a tile that a load is filling, or overwrite one that asynchronous work may still read
- an ordinary store to shared memory needs its partition's fence before any asynchronous operation there
- barriers follow phases, counts and bytes; a deadlock is reported with who waits on what, and where
- pointers and boxes that leave the storage of their tensor are a fault; so is work not waited for when a partition ends
- run-time integers have 32 bits, or 64 after .to(int64): overflow is an error, and // and % truncate

It proves logic. It knows nothing of layouts, registers, speed, the errors of approximate instructions, global memory shared
by programs that run at the same time, or clusters; compilation has to prove the layouts and the types.
"""

from support.gluon.launching import launch
from support.gluon.mutation import mutated
from support.gluon.schedule import Deadlock, Fault

__all__ = ["Deadlock", "Fault", "launch", "mutated"]
