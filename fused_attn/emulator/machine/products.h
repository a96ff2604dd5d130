/* Matrix products: mma, whose operands are registers of one warp, and wgmma, which reads shared memory and lands late.
   Fragments and descriptors are those of the PTX ISA, "Matrix Multiply-Accumulate Instructions". */

/* Products are exact, their sum in fp64 rounded once; a card's tensor cores cut off bits that they align away, on request so
   do we. */
static f32 rounded_sum(const Job *job, f64 sum) {
    f32 v = (f32)sum;
    return job->truncate && isfinite(v) && fabs((f64)v) > fabs(sum) ? nextafterf(v, 0) : v;
}

/* 16 x K times K x 8, added to s (or 0) into d, where d[r][l] is element (l / 4 + 8 (r / 2), l % 4 * 2 + r % 2). */
static void multiply(const Job *job, f32 (*a)[16], f32 (*b)[8], int depth, f32 *d[4], const f32 *s[4]) {
    for (int row = 0; row < 16; row++) {
        f64 sum[8] = {0};
        for (int k = 0; k < depth; k++) for (int j = 0; j < 8; j++) sum[j] += (f64)a[row][k] * b[k][j];
        for (int j = 0; j < 8; j++) {
            int l = row % 8 * 4 + j / 2, r = row / 8 * 2 + j % 2;
            d[r][l] = rounded_sum(job, sum[j] + (s ? (f64)s[r][l] : 0.0));
        }
    }
}
static f32 half_of(u32 word, int high, int bf16) {
    u32 x = high ? word >> 16 : word & 0xffff;
    return bf16 ? bf16_f32(x) : f16_f32(x);
}

enum { MMA_F16, MMA_BF16, MMA_TF32, MMA_F64_K4, MMA_F64_K16 };

/* m16n8k16 of halves and m16n8k8 of TF32. Writes: d[4]; reads: a[4], b[2], c[4]. */
static void mma_f32(Cta *c, Warp *w, const Ins *i, const s32 *o) {
    f32 a[16][16], b[16][8], *d[4]; const f32 *s[4]; int bf16 = i->mode == MMA_BF16;
    f32 before[4][32];
    for (int r = 0; r < 4; r++) {
        d[r] = OPERAND(f32, r); s[r] = before[r]; memcpy(before[r], OPERAND(f32, 10 + r), 128);
        const u32 *x = OPERAND(u32, 4 + r);
        LANES if (i->mode == MMA_TF32) a[l / 4 + 8 * (r & 1)][l % 4 + 4 * (r >> 1)] = as_f32(x[l] & 0xffffe000u);
            else for (int h = 0; h < 2; h++) a[l / 4 + 8 * (r & 1)][l % 4 * 2 + h + 8 * (r >> 1)] = half_of(x[l], h, bf16);
    }
    for (int r = 0; r < 2; r++) {
        const u32 *x = OPERAND(u32, 8 + r);
        LANES if (i->mode == MMA_TF32) b[l % 4 + 4 * r][l / 4] = as_f32(x[l] & 0xffffe000u);
            else for (int h = 0; h < 2; h++) b[l % 4 * 2 + h + 8 * r][l / 4] = half_of(x[l], h, bf16);
    }
    multiply(c->machine->job, a, b, i->mode == MMA_TF32 ? 8 : 16, d, s);
}
/* m8n8k4: writes d[2]; reads a, b, c[2]. m16n8k16: writes d[4]; reads a[8], b[4], c[4]. Fused multiply-adds in fp64. */
static void mma_f64(Warp *w, const Ins *i, const s32 *o) {
    int small = i->mode == MMA_F64_K4, rows = small ? 8 : 16, depth = small ? 4 : 16;
    int n_d = rows / 4, n_a = rows * depth / 32, n_b = depth / 4;
    f64 a[16][16], b[16][8], d[4][32];
    for (int r = 0; r < n_a; r++) {
        int row = small ? 0 : 8 * (r & 1), column = 4 * (small ? r : r >> 1);
        LANES a[l / 4 + row][l % 4 + column] = OPERAND(f64, n_d + r)[l];
    }
    for (int r = 0; r < n_b; r++) LANES b[l % 4 + 4 * r][l / 4] = OPERAND(f64, n_d + n_a + r)[l];
    for (int r = 0; r < n_d; r++) LANES {
        f64 v = OPERAND(f64, n_d + n_a + n_b + r)[l];
        for (int k = 0; k < depth; k++) v = fma(a[l / 4 + 8 * (r / 2)][k], b[k][l % 4 * 2 + r % 2], v);
        d[r][l] = v;
    }
    for (int r = 0; r < n_d; r++) memcpy(OPERAND(f64, r), d[r], 256);
}

/* ---- wgmma: of each warp its 16 rows of 64 ---- */
/* Shared address of the 16-bit element (mn, k) of a matrix that a descriptor tells of; `across`: MN is what is contiguous. */
static u32 element_at(u64 descriptor, int mn, int k, int across) {
    u32 start = (descriptor & 0x3fff) << 4;
    u32 leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    int mode = descriptor >> 62 & 3, span = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0, n = span / 2;
    if (!mode) return across ? start + mn / 8 * stride + k / 8 * leading + k % 8 * 16 + mn % 8 * 2
                             : start + mn / 8 * stride + k / 8 * leading + mn % 8 * 16 + k % 8 * 2;
    return swizzled(across ? start + mn / n * leading + k / 8 * stride + k % 8 * span + mn % n * 2
                           : start + mn / 8 * stride + mn % 8 * span + k * 2, span);
}
#define FROM_REGISTERS 1
#define A_ACROSS 2
#define B_ACROSS 4
#define OF_BF16 8

/* Everything that one warp's part reads of shared memory, 16 bytes at a time: within bounds, and in no race. */
static void wgmma_touch(Cta *c, Warp *w, const Ins *i, int pc, u64 da, u64 db) {
    u32 actor = OF_PRODUCTS(c->machine) + w->id, stamp = w->product_group + 1;
    for (int side = i->mode & FROM_REGISTERS ? 1 : 0; side < 2; side++) {
        u64 descriptor = side ? db : da;
        int across = i->mode & (side ? B_ACROSS : A_ACROSS), first = side ? 0 : w->id % 4 * 16, n = side ? i->size : 16;
        for (int x = first; x < first + n; x += across ? 8 : 1) for (int k = 0; k < 16; k += across ? 1 : 8) {
            u32 at = element_at(descriptor, x, k, across);
            touch(c, w, pc, shared_at(c, w, pc, at, 16, 0), 16, 0, actor, stamp, 1, 0);
        }
    }
}
/* Writes: d[n / 2]; reads: a (a descriptor or 4 registers), descriptor of b, whether d is added to. */
static void wgmma_land(Cta *c, Warp *w) {
    Product x = w->products[0]; memmove(w->products, w->products + 1, --w->n_products * sizeof x);
    const Ins *i = c->machine->job->code + x.pc; const s32 *o = c->machine->job->operands + i->first;
    int n = i->size, bf16 = i->mode & OF_BF16; u32 base = c->machine->job->shared_base;
    f32 a[16][16], b[16][8];
    for (int r = 0; r < 16; r++) for (int k = 0; k < 16; k++)
        if (i->mode & FROM_REGISTERS) {
            const u32 *words = OPERAND(u32, n / 2 + r / 8 + 2 * (k / 8));
            a[r][k] = half_of(words[r % 8 * 4 + k % 8 / 2], k & 1, bf16);
        } else {
            u32 at = element_at(x.a, w->id % 4 * 16 + r, k, i->mode & A_ACROSS);
            u16 v; memcpy(&v, c->shared + at - base, 2);
            a[r][k] = half_of(v, 0, bf16);
        }
    for (int block = 0; block < n / 8; block++) {
        f32 *d[4]; const f32 *s[4];
        for (int r = 0; r < 4; r++) s[r] = d[r] = OPERAND(f32, block * 4 + r);
        for (int k = 0; k < 16; k++) for (int j = 0; j < 8; j++) {
            u32 at = element_at(x.b, block * 8 + j, k, i->mode & B_ACROSS);
            u16 v; memcpy(&v, c->shared + at - base, 2);
            b[k][j] = half_of(v, 0, bf16);
        }
        multiply(c->machine->job, a, b, 16, d, x.accumulate ? s : 0);
    }
    c->machine->progress = 1;
}

/* Registers under a product: its sums may not be looked at, nor what it reads be written, before it was waited for; and what it
   takes from registers must have been written before the last wgmma.fence. A mark is 0, or the group that uses the register. */
#define UNFENCED 255
static void hazard_check(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc) {
    for (int k = 0; k < i->writes + i->reads; k++) {
        u8 mark = w->hazards[o[k]];
        if (!o[k]) continue;
        if (mark && mark != UNFENCED && (k < i->writes || mark & 1))
            fail(c, w, pc, "a register of an asynchronous instruction that was not waited for is %s",
                 k < i->writes ? "written" : "read");
        if (k < i->writes) w->hazards[o[k]] = UNFENCED;
    }
}
static void wgmma_start(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    int from_registers = i->mode & FROM_REGISTERS, n_d = i->size / 2, n_a = from_registers ? 4 : 1;
    Product x = {pc, w->product_group, from_registers ? 0 : OPERAND(u64, n_d)[0], OPERAND(u64, n_d + n_a)[0],
                 OPERAND(u32, n_d + n_a + 1)[0] != 0};
    if (active != ~0u) fail(c, w, pc, "wgmma in a diverged warp");
    if (w->n_products == MAX_PRODUCTS) fail(c, w, pc, "more than %d products in flight", MAX_PRODUCTS);
    if (w->hazards) {
        u8 mark = 2 * (w->product_group % 100) + 2;
        for (int k = 0; k < n_d + (from_registers ? 4 : 0); k++) {
            u8 *at = w->hazards + o[k];
            if (c->machine->job->fences && *at == UNFENCED && (k >= n_d || x.accumulate))
                fail(c, w, pc, "no wgmma.fence between a wgmma and the write of a register that it takes");
            *at = k < n_d ? mark | 1 : *at & 1 ? *at : mark;
        }
    }
    wgmma_touch(c, w, i, pc, x.a, x.b);
    charge_engine(c, pc, (from_registers ? 0 : 512) + (w->id % 4 ? 0 : i->size * 32));   /* B is read once for four warps */
    w->products[w->n_products++] = x;
    if (c->machine->job->landing == EAGER) wgmma_land(c, w);
}
static void wgmma_wait(Cta *c, Warp *w, s64 pending) {
    u32 *known = w->clock.at + OF_PRODUCTS(c->machine) + w->id;
    u32 done = w->product_group > pending ? w->product_group - pending : 0;
    while (w->n_products && (u32)w->products[0].group < done) wgmma_land(c, w);
    if (w->hazards && done > *known)
        for (int k = 0; k < c->machine->job->n_slots; k++) {
            u8 mark = w->hazards[k];
            if (!mark || mark == UNFENCED) continue;
            for (u32 g = done > 100 ? done - 100 : 0; g < done; g++)
                if ((mark & ~1) == 2 * (g % 100) + 2) { w->hazards[k] = 0; break; }
        }
    if (done > *known) *known = done;
}
