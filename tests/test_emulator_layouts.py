"""Fragments and descriptors of matrix instructions against layouts written down from the PTX ISA, with NumPy's products."""

import numpy as np
import pytest

pytest.importorskip("triton")

from support.ptx import launch

from fused_attn.interpreter import bf16_to_fp32, fp32_to_bf16

pytestmark = pytest.mark.kernels
GROUP, THREAD = np.arange(32) // 4, np.arange(32) % 4  # of a lane, as the ISA calls them


def halves(rng, *shape):
    """(bits of bf16, values)"""
    bits = fp32_to_bf16(rng.standard_normal(shape).astype(np.float32))
    return bits, bf16_to_fp32(bits)


def fragment_a(i):
    """Row and column of element i of A [16, 16] in halves: "Matrix Fragments for mma.m16n8k16"."""
    return GROUP + 8 * (i in (2, 3, 6, 7)), THREAD * 2 + (i & 1) + 8 * (i >= 4)


def fragment_b(i):
    return THREAD * 2 + (i & 1) + 8 * (i >= 2), GROUP


def fragment_c(i):
    return GROUP + 8 * (i >= 2), THREAD * 2 + (i & 1)


def packed(bits, fragment, n):
    """[n / 2, 32] registers of two halves each, the first in the low bits."""
    halves = [bits[fragment(i)].astype(np.uint32) for i in range(n)]
    return np.stack([halves[i] | halves[i + 1] << 16 for i in range(0, n, 2)])


def registers(prefix, n, kind="b32"):
    return f".reg .{kind} {', '.join(f'%{prefix}{k}' for k in range(n))};\n", ", ".join(f"%{prefix}{k}" for k in range(n))


def moved(what, prefix, n, array, kind="b32", size=4):
    """Loads or stores of n registers a lane, of an array [n, 32]."""
    lines = [f"mad.wide.u32 %p, %t, {size}, %a{array};"]
    for k in range(n):
        register, where = f"%{prefix}{k}", f"[%p + {k * 32 * size}]"
        lines.append(f"ld.global.{kind} {register}, {where};" if what == "load" else f"st.global.{kind} {where}, {register};")
    return "\n".join(lines) + "\n"


def multiplied(instruction, a, b, c, kind="b32", size=4):
    """What an mma makes of registers [n, 32] of A, B and C, each lane's in a column."""
    arrays = [a, b, c, np.zeros_like(c)]
    names = {prefix: registers(prefix, len(x), kind) for prefix, x in zip("xyzd", arrays, strict=True)}
    loads = [moved("load", prefix, len(arrays[k]), k, kind, size) for k, prefix in enumerate("xyz")]
    launch(".reg .b64 %p;\n" + "".join(declared for declared, _ in names.values()) + "".join(loads)
           + f"mma.sync.aligned.{instruction} " + ", ".join(f"{{{names[prefix][1]}}}" for prefix in "dxyz") + ";\n"
           + moved("store", "d", len(c), 3, kind, size), arrays)
    return arrays[3]


def test_mma_of_halves():
    rng = np.random.default_rng(0)
    (a_bits, a), (b_bits, b), c = halves(rng, 16, 16), halves(rng, 16, 8), rng.standard_normal((16, 8)).astype(np.float32)
    found = multiplied("m16n8k16.row.col.f32.bf16.bf16.f32", packed(a_bits, fragment_a, 8), packed(b_bits, fragment_b, 4),
                       np.stack([c[fragment_c(i)] for i in range(4)]))
    got = np.zeros((16, 8), np.float32)
    for i in range(4):
        got[fragment_c(i)] = found[i]
    np.testing.assert_array_equal(got, (a.astype(np.float64) @ b + c).astype(np.float32))


def test_mma_of_tf32():
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    a_places = [(GROUP + 8 * (i & 1), THREAD + 4 * (i >> 1)) for i in range(4)]
    b_places = [(THREAD + 4 * i, GROUP) for i in range(2)]
    found = multiplied("m16n8k8.row.col.f32.tf32.tf32.f32", np.stack([a[at] for at in a_places]),
                       np.stack([b[at] for at in b_places]), np.stack([c[fragment_c(i)] for i in range(4)]))
    got = np.zeros((16, 8), np.float32)
    for i in range(4):
        got[fragment_c(i)] = found[i]
    cut = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b)]  # 13 bits do not count
    np.testing.assert_array_equal(got, (cut[0] @ cut[1] + c).astype(np.float32))


@pytest.mark.parametrize(("rows", "depth"), [(8, 4), (16, 16)])
def test_mma_of_fp64(rows, depth):
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(shape) for shape in ((rows, depth), (depth, 8), (rows, 8)))
    n_a, n_b, n_d = rows * depth // 32, depth // 4, rows // 4
    a_places = [(GROUP + 8 * (i & 1), THREAD + 4 * (i >> 1)) if rows == 16 else (GROUP, THREAD + 4 * i) for i in range(n_a)]
    b_places = [(THREAD + 4 * i, GROUP) for i in range(n_b)]
    c_places = [(GROUP + 8 * (i >> 1), THREAD * 2 + (i & 1)) for i in range(n_d)]
    operands = [np.stack([x[at] for at in places]) for x, places in ((a, a_places), (b, b_places), (c, c_places))]
    got = np.zeros((rows, 8))
    found = multiplied(f"m{rows}n8k{depth}.row.col.f64.f64.f64.f64", *operands, "b64", 8)
    for at, values in zip(c_places, found, strict=True):
        got[at] = values
    np.testing.assert_allclose(got, a @ b + c, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed):
    """Row r of matrix k is at the address in lane 8 k + r; l gets two columns of row l / 4, or two rows of column l / 4."""
    rng = np.random.default_rng(3)
    matrices = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    out, back = np.zeros((4, 32), np.uint32), np.zeros((4, 8, 8), np.uint16)
    trans = ".trans" if transposed else ""
    declared, names = registers("x", 4)
    launch(f"""
        .reg .b64 %p; .reg .b32 %s, %w0, %w1, %w2, %w3; {declared}
        mad.wide.u32 %p, %t, 16, %a0; mov.u32 %s, smem; mad.lo.s32 %s, %t, 16, %s;
        ld.global.v4.b32 {{%w0, %w1, %w2, %w3}}, [%p]; st.shared.v4.b32 [%s], {{%w0, %w1, %w2, %w3}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{{names}}}, [%s];
        {moved("store", "x", 4, 1)} bar.sync 0;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%s], {{{names}}}; bar.sync 0;
        ld.shared.v4.b32 {{%w0, %w1, %w2, %w3}}, [%s]; mad.wide.u32 %p, %t, 16, %a2;
        st.global.v4.b32 [%p], {{%w0, %w1, %w2, %w3}};
        """, [matrices, out, back], shared=512)
    for k, matrix in enumerate(matrices):
        of = matrix.T if transposed else matrix
        np.testing.assert_array_equal(out[k], of[GROUP, THREAD * 2] | of[GROUP, THREAD * 2 + 1].astype(np.uint32) << 16)
    np.testing.assert_array_equal(back, matrices)


# --- matrices in shared memory: "Shared Memory Matrix Layout", canonical layouts in bytes ---


def placed(matrix, span, across):
    """(bytes of shared memory, leading and stride byte offsets) of [MN, K] halves; ``across``: MN is contiguous.

    The unit is an atom of 8 rows of ``span`` bytes (16 where nothing is swizzled); in row r 16-byte chunk c stands at c ^ r % 8
    (of 128 bytes; of 64 and 32 the row's number counts by two and by four rows).
    """
    mn, k = matrix.shape
    rows, columns = (k, mn) if across else (mn, k)
    of = matrix.T if across else matrix  # [rows, columns], columns contiguous
    width = max(span, 16) // 2  # elements of a row of an atom
    memory = np.zeros(rows * -(-columns // width) * width, np.uint16)
    by_rows, by_columns = 8 * width, rows * width  # elements from atom to atom, down and along
    for r in range(rows):
        for c in range(columns):
            byte = c % width * 2
            if span:
                at = r % 8 * span + byte
                byte_in_atom = at ^ (at >> 7 & span // 16 - 1) << 4
            else:
                byte_in_atom = r % 8 * 16 + byte
            memory[c // width * by_columns + r // 8 * by_rows + byte_in_atom // 2] = of[r, c]
    if span and not across:  # K is no longer than a row: the leading offset does not count
        return memory, 16, by_rows * 2
    if span:
        return memory, by_columns * 2, by_rows * 2  # along MN, along K
    return (memory, by_rows * 2, by_columns * 2) if across else (memory, by_columns * 2, by_rows * 2)


def descriptor(start, leading, stride, span, version=0):
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[span]
    return (start >> 4 & 0x3FFF) | (leading >> 4) << 16 | (stride >> 4) << 32 | version << 46 | mode << 62


COPY = """
.reg .b64 %g; .reg .b32 %i, %s, %v; .reg .pred %more;
mov.u32 %i, %t; mov.u32 %s, smem;
$copy:
mad.wide.u32 %g, %i, 4, %a0; ld.global.b32 %v, [%g]; .reg .b32 %at; mad.lo.s32 %at, %i, 4, %s; st.shared.b32 [%at], %v;
add.s32 %i, %i, 128; setp.lt.s32 %more, %i, {words}; @%more bra $copy;
fence.proxy.async.shared::cta; bar.sync 0;
"""


@pytest.mark.parametrize("across", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=["KK", "MK", "KN", "MN"])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_wgmma_reads_every_layout(span, across):
    rng = np.random.default_rng(4)
    n = 128
    (a_bits, a), (b_bits, b) = halves(rng, 64, 16), halves(rng, n, 16)
    a_memory, a_leading, a_stride = placed(a_bits, span, across[0])
    b_memory, b_leading, b_stride = placed(b_bits, span, across[1])
    b_start = -(-a_memory.nbytes // 1024) * 1024
    memory = np.zeros(b_start // 2 + b_memory.size, np.uint16)
    memory[: a_memory.size], memory[b_start // 2 :] = a_memory, b_memory
    out = np.zeros((n // 2, 128), np.float32)
    declared, names = registers("d", n // 2)
    stores = "".join(f"st.global.b32 [%p + {k * 512}], %d{k};\n" for k in range(n // 2))
    da, db = descriptor(1024, a_leading, a_stride, span), descriptor(1024 + b_start, b_leading, b_stride, span)
    launch(COPY.format(words=memory.size // 2) + f"""
        .reg .b64 %p, %x, %y; {declared}
        mov.b64 %x, {da}; mov.b64 %y, {db};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{names}}}, %x, %y, 0, 1, 1, {across[0]}, {across[1]};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %p, %t, 4, %a1;
        {stores}""", [memory, out], threads=128, shared=memory.nbytes)
    got = np.zeros((64, n), np.float32)
    for k in range(n // 2):  # "Register Fragments for wgmma.mma_async.m64nNk16": D
        warp, lane = np.arange(128) // 32, np.arange(128) % 32
        got[16 * warp + lane // 4 + 8 * (k % 4 >= 2), 8 * (k // 4) + lane % 4 * 2 + k % 2] = out[k]
    np.testing.assert_array_equal(got, (a.astype(np.float64) @ b.T).astype(np.float32))


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("span", [32, 128])
def test_tcgen05_multiplies_into_tensor_memory(span, rows):
    """Of 128 rows lane i has row i; of 64 every 16 rows have a quarter of the lanes. The product tells an mbarrier."""
    rng = np.random.default_rng(5)
    n = 32
    (a_bits, a), (b_bits, b) = halves(rng, rows, 16), halves(rng, n, 16)
    (a_memory, a_leading, a_stride), (b_memory, b_leading, b_stride) = placed(a_bits, span, 0), placed(b_bits, span, 0)
    b_start = -(-a_memory.nbytes // 1024) * 1024
    barrier = -(-(b_start + b_memory.nbytes) // 1024) * 1024
    memory = np.zeros(barrier // 2, np.uint16)
    memory[: a_memory.size], memory[b_start // 2 : b_start // 2 + b_memory.size] = a_memory, b_memory
    out = np.zeros((128, n), np.float32)
    declared, names = registers("d", n)
    stores = "".join(f"st.global.b32 [%p + {4 * k}], %d{k};\n" for k in range(n))
    da, db = descriptor(1024, a_leading, a_stride, span, 1), descriptor(1024 + b_start, b_leading, b_stride, span, 1)
    kind = 1 << 4 | 1 << 7 | 1 << 10 | n // 8 << 17 | rows // 16 << 24  # fp32 sums of bf16
    launch(f"""
        .reg .b32 %bar, %tm, %kind, %mine; .reg .pred %first, %one, %done, %no; .reg .b64 %p, %x, %y; {declared}
        mov.u32 %bar, smem; add.s32 %bar, %bar, {barrier}; setp.eq.s32 %first, %warp, 0; setp.eq.s32 %one, %t, 0;
        @%first tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%bar + 8], 32;
        @%one mbarrier.init.shared::cta.b64 [%bar], 1;
        {COPY.format(words=memory.size // 2)}
        ld.shared.b32 %tm, [%bar + 8]; mov.b64 %x, {da}; mov.b64 %y, {db}; mov.u32 %kind, {kind}; mov.pred %no, 0;
        @%one tcgen05.mma.cta_group::1.kind::f16 [%tm + 0], %x, %y, %kind, %no;
        @%one tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%bar];
        $wait: mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], 0; @!%done bra $wait;
        shl.b32 %mine, %warp, 21; add.s32 %mine, %mine, %tm;
        tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {{{names}}}, [%mine]; tcgen05.wait::ld.sync.aligned;
        mad.wide.u32 %p, %t, {4 * n}, %a1;
        {stores} bar.sync 0;
        @%first tcgen05.dealloc.cta_group::1.sync.aligned.b32 %tm, 32;""", [memory, out], threads=128, shared=barrier + 1024)
    lanes = np.arange(rows) if rows == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
    np.testing.assert_array_equal(out[lanes], (a.astype(np.float64) @ b.T).astype(np.float32))
