/* Blackwell's tensor memory, 128 lanes of 512 words, and its products, which land late, in order, and tell an mbarrier.
   Layouts are those of the PTX ISA, "Tensorcore 5th Generation Instructions". An address is lane << 16 | column. */

static u32 *tensor_word(Cta *c, Warp *w, int pc, u32 lane, u32 column) {
    if (!c->tensor || lane >= 128 || column >= TENSOR_COLUMNS || !c->allocated[column / 32])
        fail(c, w, pc, "lane %u, column %u of tensor memory: not allocated", lane, column);
    return c->tensor + (size_t)lane * TENSOR_COLUMNS + column;
}
/* The shadow has a cell for 16 lanes of a column. */
static void tensor_touch(Cta *c, Warp *w, int pc, u32 lane, u32 column, int write, u32 actor, u32 stamp) {
    u32 cell = c->tensor_cells + lane / 16 * TENSOR_COLUMNS + column;
    if (c->machine->job->races) touch_cell(c, w, pc, cell, write, actor, stamp, 1, 0);
}

/* Reads: where in shared memory the address goes, how many columns. */
static void tensor_allocate(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc) {
    u32 count = OPERAND(u32, 1)[0], first = 0;
    if (count < 32 || count > TENSOR_COLUMNS || count & (count - 1)) fail(c, w, pc, "%u columns of tensor memory", count);
    while (first < TENSOR_COLUMNS && c->allocated[first / 32]) first += 32;
    if (first + count > TENSOR_COLUMNS) fail(c, w, pc, "no %u columns of tensor memory are left", count);
    if (!c->tensor) { c->tensor = malloc(128 * TENSOR_COLUMNS * 4); memset(c->tensor, 0xff, 128 * TENSOR_COLUMNS * 4); }
    memset(c->allocated + first / 32, 1, count / 32);
    memcpy(access_at(c, w, pc, SHARED, address_in(w, i, o[0], 0), 4, 1, 0, (u8 *)&first), &first, 4);
}
static void tensor_free(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc) {
    u32 first = OPERAND(u32, 0)[0], count = OPERAND(u32, 1)[0];
    (void)i;
    for (u32 k = first; k < first + count; k += 32) { tensor_word(c, w, pc, 0, k); c->allocated[k / 32] = 0; }
}

/* tcgen05.ld and .st, `count` registers a thread. 32x32b: thread t has lane t; 16x32bx2 (`mode`, whose split is `size`):
   threads 16 and up have the lanes of the first 16, `size` columns further on. Operands: writes registers, reads the address,
   or reads the address and registers. */
#define NOT_WAITED 205
static void tensor_move(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active, int writes) {
    u32 at = OPERAND(u32, writes ? 0 : i->count)[0] + (u32)i->offset, lane = at >> 16, column = at & 0xffff;
    u32 stamp = writes ? w->tensor_group + 1 : w->clock.at[w->id];
    u32 actor = writes ? (u32)OF_TENSOR(c->machine) + w->id : (u32)w->id;
    if (active != ~0u) fail(c, w, pc, "tensor memory is moved in a diverged warp");
    if (lane / 32 != (u32)w->id % 4) fail(c, w, pc, "lane %u of tensor memory is out of reach of warp %d", lane, w->id);
    for (int k = 0; k < i->count; k++) {
        u32 *x = OPERAND(u32, writes ? 1 + k : k);
        LANES {
            u32 row = lane + (i->mode ? l % 16 : l), at_column = column + k + (i->mode && l >= 16 ? i->size : 0);
            u32 *p = tensor_word(c, w, pc, row, at_column);
            if (l % 16 == 0) tensor_touch(c, w, pc, row, at_column, writes, actor, stamp);
            if (writes) *p = x[l]; else x[l] = *p;
        }
        if (!writes && w->hazards && c->machine->job->fences) w->hazards[o[k]] = NOT_WAITED;
    }
}
static void tensor_wait_load(Cta *c, Warp *w) {
    if (w->hazards) for (int k = 0; k < c->machine->job->n_slots; k++) if (w->hazards[k] == NOT_WAITED) w->hazards[k] = 0;
}

/* ---- tcgen05.mma: D [M, N] in tensor memory, A [M, 16] there or in shared memory, B [16, N] in shared memory ---- */
#define FIELD(x, from, bits) ((x) >> (from) & ((1u << (bits)) - 1))
/* Of 64 rows every 16 have the half of 32 lanes that the address says. */
static u32 tensor_lane(u32 at, u32 row, u32 rows) { return (at >> 16) + (rows == 64 ? row / 16 * 32 + row % 16 : row); }

static void tensor_land(Cta *c) {
    TensorOp x = c->tensor_ops[0]; memmove(c->tensor_ops, c->tensor_ops + 1, --c->n_tensor_ops * sizeof x);
    Machine *m = c->machine; Warp *w = c->warps + x.warp; m->progress = 1;
    if (x.barrier) {
        Barrier *b = barrier_at(c, w, x.pc, x.barrier, 1);
        if (!b->pending) fail(c, w, x.pc, "tcgen05.commit arrives at an mbarrier that expects nothing");
        for (u32 e = 1; e <= x.event; e++)
            if (c->tensor_events[e / 32] >> e % 32 & 1) b->now.at[m->actors + e / 32] |= 1u << e % 32;
        b->pending--; barrier_step(c, b);
        return;
    }
    u32 rows = FIELD(x.kind, 24, 5) * 16, columns = FIELD(x.kind, 17, 6) * 8, base = m->job->shared_base;
    int bf_a = FIELD(x.kind, 7, 3), bf_b = FIELD(x.kind, 10, 3);
    int across_a = FIELD(x.kind, 15, 1), across_b = FIELD(x.kind, 16, 1);
    f32 b[16][256];
    for (u32 j = 0; j < columns; j++) for (int k = 0; k < 16; k++) {
        u16 v; memcpy(&v, c->shared + element_at(x.b, j, k, across_b) - base, 2); b[k][j] = half_of(v, 0, bf_b);
    }
    for (u32 row = 0; row < rows; row++) {
        f32 a[16];
        for (int k = 0; k < 16; k++)
            if (x.a != ~0u)
                a[k] = half_of(*tensor_word(c, w, x.pc, tensor_lane(x.a, row, rows), (x.a & 0xffff) + k / 2), k & 1, bf_a);
            else {
                u16 v; memcpy(&v, c->shared + element_at(x.from_a, row, k, across_a) - base, 2);
                a[k] = half_of(v, 0, bf_a);
            }
        for (u32 j = 0; j < columns; j++) {
            f64 sum = 0; u32 *d = tensor_word(c, w, x.pc, tensor_lane(x.d, row, rows), (x.d & 0xffff) + j);
            for (int k = 0; k < 16; k++) sum += (f64)a[k] * b[k][j];
            *d = as_u32(rounded_sum(m->job, sum + (x.accumulate ? (f64)as_f32(*d) : 0.0)));
        }
    }
}
/* Reads: D, A (a descriptor, or with `mode` an address of tensor memory), descriptor of B, descriptor of the instruction,
   whether D is added to. `offset`: of A in tensor memory, `size`: of D. */
static void tensor_multiply(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    int l = __builtin_ctz(active); u32 events = OF_EVENTS(c->machine);
    TensorOp x = {.pc = pc, .warp = w->id, .d = OPERAND(u32, 0)[l] + i->size,
                  .a = i->mode ? OPERAND(u32, 1)[l] + (u32)i->offset : ~0u, .from_a = i->mode ? 0 : OPERAND(u64, 1)[l],
                  .b = OPERAND(u64, 2)[l], .kind = OPERAND(u32, 3)[l],
                  .accumulate = OPERAND(u32, 4)[l] != 0, .event = new_event(c, w, pc)};
    u32 rows = FIELD(x.kind, 24, 5) * 16, columns = FIELD(x.kind, 17, 6) * 8;
    if (active & (active - 1)) fail(c, w, pc, "tcgen05.mma by more than one thread");
    int halves = FIELD(x.kind, 7, 3) <= 1 && FIELD(x.kind, 10, 3) <= 1, into_f32 = FIELD(x.kind, 4, 2) == 1;
    if (!into_f32 || !halves || FIELD(x.kind, 13, 2) || (rows != 64 && rows != 128))
        fail(c, w, pc, "a tcgen05.mma of descriptor %#x, which the emulator does not know", x.kind);
    c->tensor_events[x.event / 32] |= 1u << x.event % 32;
    for (u32 row = 0; row < rows; row += 16) {
        u32 in_d = tensor_lane(x.d, row, rows), in_a = tensor_lane(x.a, row, rows);
        tensor_word(c, w, pc, in_d + 15, (x.d & 0xffff) + columns - 1);
        for (u32 j = 0; j < columns; j++) tensor_touch(c, w, pc, in_d, (x.d & 0xffff) + j, 1, events, x.event);
        if (!i->mode) continue;
        tensor_word(c, w, pc, in_a + 15, (x.a & 0xffff) + 7);
        for (u32 k = 0; k < 8; k++) tensor_touch(c, w, pc, in_a, (x.a & 0xffff) + k, 0, events, x.event);
    }
    for (int side = i->mode ? 1 : 0; side < 2; side++) {
        int across = FIELD(x.kind, side ? 16 : 15, 1); u32 n = side ? columns : rows;
        charge_engine(c, pc, n * 32);
        for (u32 at = 0; at < n; at += across ? 8 : 1) for (int k = 0; k < 16; k += across ? 1 : 8) {
            u32 place = shared_at(c, w, pc, element_at(side ? x.b : x.from_a, at, k, across), 16, 0);
            touch(c, w, pc, place, 16, 0, events, x.event, 1, 0);
        }
    }
    if (c->n_tensor_ops == MAX_COPIES) fail(c, w, pc, "more than %d tensor operations in flight", MAX_COPIES);
    c->tensor_ops[c->n_tensor_ops++] = x;
    if (c->machine->job->landing == EAGER) tensor_land(c);
}
/* Tells an mbarrier when all products so far have landed. Reads: its address. */
static void tensor_commit(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    int l = __builtin_ctz(active);
    TensorOp x = {.pc = pc, .warp = w->id, .barrier = (u32)address_in(w, i, o[0], l), .event = c->events};
    if (active & (active - 1)) fail(c, w, pc, "tcgen05.commit by more than one thread");
    barrier_at(c, w, pc, x.barrier, 1);
    if (c->n_tensor_ops == MAX_COPIES) fail(c, w, pc, "more than %d tensor operations in flight", MAX_COPIES);
    c->tensor_ops[c->n_tensor_ops++] = x;
    if (c->machine->job->landing == EAGER) tensor_land(c);
}
