/* What the lanes of a warp do together: memory, exchanges, matrices in shared memory. Lanes that are not active do nothing. */

static void load(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    u64 at[32]; u32 bytes = i->size * i->count; int step = i->flags & WIDE_VALUES ? 8 : 4;
    LANES if (active >> l & 1) {
        const u8 *p;
        at[l] = address_in(w, i, o[i->count], l);
        if (i->space < 0) p = (u8 *)c->machine->job->params + i->offset;   /* of kernel parameters */
        else p = access_at(c, w, pc, i->space, at[l], bytes, 0, 0, 0);
        for (int k = 0; k < i->count; k++) {
            s64 v = 0; memcpy(&v, p + k * i->size, i->size);
            if (i->flags & SIGNED) v = i->size == 1 ? (s8)v : i->size == 2 ? (s16)v : i->size == 4 ? (s32)v : v;
            if (o[k]) memcpy(OPERAND(u8, k) + l * step, &v, step);
        }
    }
    if (i->space >= 0) charge(c, pc, i->space, at, active, bytes);
}
static void store(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    u64 at[32]; u32 bytes = i->size * i->count; int step = i->flags & WIDE_VALUES ? 8 : 4;
    LANES if (active >> l & 1) {
        u8 data[64];
        for (int k = 0; k < i->count; k++) memcpy(data + k * i->size, OPERAND(u8, k) + l * step, i->size);
        at[l] = address_in(w, i, o[i->count], l);
        memcpy(access_at(c, w, pc, i->space, at[l], bytes, 1, 0, data), data, bytes);
    }
    charge(c, pc, i->space, at, active, bytes);
}

enum { AT_ADD, AT_ADD_F32, AT_ADD_F64, AT_EXCH, AT_CAS, AT_OR, AT_AND, AT_XOR, AT_MAX_U, AT_MIN_U, AT_MAX_S, AT_MIN_S };
static u64 after_atom(int how, int size, u64 old, u64 x, u64 y) {
    s64 a = size == 4 ? (s32)old : (s64)old, b = size == 4 ? (s32)x : (s64)x;
    switch (how) {
    case AT_ADD: return old + x;
    case AT_ADD_F32: return as_u32(as_f32((u32)old) + as_f32((u32)x));
    case AT_ADD_F64: return as_u64(as_f64(old) + as_f64(x));
    case AT_EXCH: return x;
    case AT_CAS: return old == x ? y : old;
    case AT_OR: return old | x;
    case AT_AND: return old & x;
    case AT_XOR: return old ^ x;
    case AT_MAX_U: return old > x ? old : x;
    case AT_MIN_U: return old < x ? old : x;
    case AT_MAX_S: return a > b ? old : x;
    default: return a < b ? old : x;
    }
}
/* Writes: what was there (count); reads: address, values (count), for cas the new values. */
static void atom(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    u64 at[32]; int n = i->count, step = i->size == 8 ? 8 : 4;
    LANES if (active >> l & 1) {
        at[l] = address_in(w, i, o[n], l);
        u8 *p = access_at(c, w, pc, i->space, at[l], i->size * n, 1, 1, 0);
        for (int k = 0; k < n; k++, p += i->size) {
            u64 old = 0, x = 0, y = 0;
            memcpy(&old, p, i->size); memcpy(&x, OPERAND(u8, n + 1 + k) + l * step, i->size);
            if (i->mode == AT_CAS) memcpy(&y, OPERAND(u8, n + 2) + l * step, i->size);
            u64 new = after_atom(i->mode, i->size, old, x, y);
            memcpy(p, &new, i->size);
            if (o[k]) memcpy(OPERAND(u8, k) + l * step, &old, step);
        }
    }
    charge(c, pc, i->space, at, active, i->size * n);
}

static u32 bits_of(const u32 *lanes) { u32 x = 0; LANES x |= (u32)(lanes[l] != 0) << l; return x; }

enum { SHFL_IDX, SHFL_BFLY, SHFL_UP, SHFL_DOWN };
/* Writes: value, whether in range; reads: value, by how much, clamp. */
static void shuffle(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    u32 from[32]; const u32 *by = OPERAND(u32, 3), *clamp = OPERAND(u32, 4); memcpy(from, OPERAND(u32, 2), 128);
    u32 value[32], valid[32];
    LANES if (active >> l & 1) {
        int last = clamp[l] & 31, part = clamp[l] >> 8 & 31, top = (l & part) | (last & ~part), b = by[l] & 31, j, in;
        switch (i->mode) {
        case SHFL_BFLY: j = l ^ b; in = j <= top; break;
        case SHFL_UP: j = l - b; in = j >= top; break;
        case SHFL_DOWN: j = l + b; in = j <= top; break;
        default: j = (l & part) | (b & ~part); in = j <= top;
        }
        if (!in) j = l;
        if (!(active >> j & 1)) fail(c, w, pc, "shfl reads lane %d, which is not active", j);
        value[l] = from[j]; valid[l] = in ? ~0u : 0;
    }
    LANES if (active >> l & 1) { OPERAND(u32, 0)[l] = value[l]; if (o[1]) OPERAND(u32, 1)[l] = valid[l]; }
}

enum { VOTE_BALLOT, VOTE_ALL, VOTE_ANY,
       REDUX_ADD, REDUX_AND, REDUX_OR, REDUX_XOR, REDUX_MIN_U, REDUX_MAX_U, REDUX_MIN_S, REDUX_MAX_S,
       ELECT, ACTIVE_MASK, REDUX_MIN_F, REDUX_MAX_F };
/* One value for all lanes. Elect writes the lane and whether it is that. */
static void vote(Warp *w, const Ins *i, const s32 *o, u32 active) {
    const u32 *x = i->reads ? OPERAND(u32, i->writes) : w->lanes; u32 yes = bits_of(x) & active, v = 0;
    int first = 1;
    switch (i->mode) {
    case VOTE_BALLOT: v = yes; break;
    case VOTE_ALL: v = yes == active ? ~0u : 0; break;
    case VOTE_ANY: v = yes ? ~0u : 0; break;
    case ACTIVE_MASK: v = active; break;
    case ELECT: v = __builtin_ctz(active); break;
    case REDUX_MIN_F: case REDUX_MAX_F: {
        f64 best = NAN;
        LANES if (active >> l & 1) best = (i->mode == REDUX_MIN_F ? minimum : maximum)(best, as_f32(x[l]));
        v = as_u32((f32)best); break; }
    default:
        LANES if (active >> l & 1) {
            s32 a = (s32)v, b = (s32)x[l];
            v = first ? x[l]
              : i->mode == REDUX_ADD ? v + x[l]
              : i->mode == REDUX_AND ? v & x[l]
              : i->mode == REDUX_OR ? v | x[l]
              : i->mode == REDUX_XOR ? v ^ x[l]
              : i->mode == REDUX_MIN_U ? (v < x[l] ? v : x[l])
              : i->mode == REDUX_MAX_U ? (v > x[l] ? v : x[l])
              : i->mode == REDUX_MIN_S ? (u32)(a < b ? a : b)
              : (u32)(a > b ? a : b);
            first = 0;
        }
    }
    LANES if (active >> l & 1) {
        if (o[0]) OPERAND(u32, 0)[l] = v;
        if (i->mode == ELECT && o[1]) OPERAND(u32, 1)[l] = (u32)l == v ? ~0u : 0;
    }
}

/* ldmatrix and stmatrix: `count` matrices of 8 rows of 16 bytes, row r of matrix k at the address in lane 8 k + r. */
static void matrix(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active, int writes) {
    int rows = 8 * i->count, transposed = i->mode; u64 at[32];
    if (active != ~0u) fail(c, w, pc, "a matrix is moved in a diverged warp");
    for (int l = 0; l < rows; l++) {
        u8 data[16]; u32 *x = OPERAND(u32, l / 8); int r = l % 8;
        at[l] = address_in(w, i, o[i->count], l);
        if (writes) for (int q = 0; q < 8; q++) {
            u16 half = transposed ? x[4 * q + r / 2] >> 16 * (r & 1) : x[4 * r + q / 2] >> 16 * (q & 1);
            memcpy(data + 2 * q, &half, 2);
        }
        u8 *p = access_at(c, w, pc, SHARED, at[l], 16, writes, 0, writes ? data : 0);
        if (writes) memcpy(p, data, 16);
    }
    charge(c, pc, SHARED, at, rows == 32 ? ~0u : (1u << rows) - 1, 16);
    if (writes) return;
    for (int k = 0; k < i->count; k++) {
        u32 *d = OPERAND(u32, k); const u8 *row[8];
        for (int r = 0; r < 8; r++) row[r] = c->shared + (at[8 * k + r] - c->machine->job->shared_base);
        LANES {
            u16 low, high; int r = l / 4, q = l % 4 * 2;
            memcpy(&low, transposed ? row[q] + 2 * r : row[r] + 2 * q, 2);
            memcpy(&high, transposed ? row[q + 1] + 2 * r : row[r] + 2 * q + 2, 2);
            d[l] = (u32)high << 16 | low;
        }
    }
}

/* mov from and to {a, b, ...}: parts of a word. */
static void pack(Warp *w, const Ins *i, const s32 *o, u32 active) {
    int n = i->size / i->count, whole = i->size == 8 ? 8 : 4;
    LANES if (active >> l & 1)
        for (int k = 0; k < i->count; k++) memcpy(OPERAND(u8, 0) + l * whole + k * n, OPERAND(u8, 1 + k) + l * 4, n);
}
static void unpack(Warp *w, const Ins *i, const s32 *o, u32 active) {
    int n = i->size / i->count, whole = i->size == 8 ? 8 : 4;
    LANES if (active >> l & 1) {
        u8 word[8]; memcpy(word, OPERAND(u8, i->count) + l * whole, whole);
        for (int k = 0; k < i->count; k++) if (o[k]) { u32 v = 0; memcpy(&v, word + k * n, n); OPERAND(u32, k)[l] = v; }
    }
}
