/* Formats and the odd operations on bits. */
static f32 as_f32(u32 x) { f32 v; memcpy(&v, &x, 4); return v; }
static u32 as_u32(f32 v) { u32 x; memcpy(&x, &v, 4); return x; }
static f64 as_f64(u64 x) { f64 v; memcpy(&v, &x, 8); return v; }
static u64 as_u64(f64 v) { u64 x; memcpy(&x, &v, 8); return x; }
static f32 ftz(f32 v) { return fabsf(v) < 0x1p-126f ? copysignf(0, v) : v; }

static f32 bf16_f32(u32 x) { return as_f32(x << 16); }
static u32 f32_bf16(f32 v) { u32 x = as_u32(v); return v != v ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16; }
static f32 f16_f32(u32 x) { u16 bits = (u16)x; f16 v; memcpy(&v, &bits, 2); return (f32)v; }
static u32 half_bits(f16 v) { u16 x; memcpy(&x, &v, 2); return x; }
static u32 f32_f16(f32 v) { return v != v ? 0x7fff : half_bits((f16)v); }
static f64 bf16_f64(u32 x) { return bf16_f32(x & 0xffff); }
static f64 f16_f64(u32 x) { return f16_f32(x); }
static u32 f64_f16(f64 v) { return v != v ? 0x7fff : half_bits((f16)v); }
static u32 f64_bf16(f64 v) {    /* by a step through f32 that keeps, in the last bit, that something was cut off */
    f32 cut = (f32)v;
    if ((f64)cut != v && v == v && isfinite(cut)) {
        if (fabs((f64)cut) > fabs(v)) cut = nextafterf(cut, 0);
        cut = as_f32(as_u32(cut) | 1);
    }
    return f32_bf16(cut);
}
static u32 f32_tf32(f32 v) { u32 x = as_u32(v); return (isfinite(v) ? x + 0x1000 : x) & 0xffffe000u; }

/* NaN gives way to a number; -0 is below +0. */
static f64 minimum(f64 a, f64 b) { return a != a ? b : b != b ? a : a < b || (a == b && signbit(a)) ? a : b; }
static f64 maximum(f64 a, f64 b) { return a != a ? b : b != b ? a : a > b || (a == b && !signbit(a)) ? a : b; }
#define TO_INTEGER(type, rounded, low, high) ({ f64 r = (rounded); r != r ? (type)0 : r <= (f64)(low) ? (type)(low) : \
    r >= (f64)(high) ? (type)(high == 0x1p64 ? ~0ull : high == 0x1p63 ? INT64_MAX : high) : (type)r; })

static u32 bits_from(u32 x, u32 start, u32 n) {
    return start > 31 || !n ? 0 : n > 31 ? x >> start : x >> start & ((1u << n) - 1);
}
static s32 signed_bits_from(u32 x, u32 start, u32 n) {
    if (!n) return 0;
    u32 top = start + n - 1 > 31 ? 31 : start + n - 1, width = top >= start ? top - start + 1 : 0;
    u32 sign = x >> top & 1, v = bits_from(x, start, n);
    return (s32)(sign && width < 32 ? v | ~0u << width : v);
}
static u32 bits_into(u32 x, u32 into, u32 start, u32 n) {
    u32 ones = n > 31 ? ~0u : (1u << n) - 1;
    return start > 31 ? into : (into & ~(ones << start)) | (x & ones) << start;
}
static u32 permuted(u32 a, u32 b, u32 how) {
    u64 both = (u64)b << 32 | a; u32 v = 0;
    for (int k = 0; k < 4; k++) {
        u32 choice = how >> (4 * k) & 15, byte = both >> (8 * (choice & 7)) & 255;
        v |= (choice & 8 ? byte & 128 ? 255 : 0 : byte) << (8 * k);
    }
    return v;
}
static u32 by_table(u32 a, u32 b, u32 c, u32 table) {
    u32 v = 0;
    for (int k = 0; k < 8; k++) if (table >> k & 1) v |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return v;
}
static u32 reversed(u32 x) { u32 v = 0; for (int k = 0; k < 32; k++) v |= (x >> k & 1) << (31 - k); return v; }

/* What a card computes to 2 ulp, as far off as that on request. */
static f32 perturbed(Machine *m, f32 v) {
    if (!m->job->perturb || !isfinite(v) || v == 0) return v;
    int steps = (int)(chance(m) % 5) - 2;
    for (; steps > 0; steps--) v = nextafterf(v, INFINITY);
    for (; steps < 0; steps++) v = nextafterf(v, -INFINITY);
    return v;
}
