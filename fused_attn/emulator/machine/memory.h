/* Bounds, races and costs of memory accesses. */

/* ---- what happened before what ---- */
static Clock new_clock(Cta *c, Warp *w, int pc) {
    if (c->n_clocks == (u32)MAX_CLOCKS(c->machine)) fail(c, w, pc, "more than %d mbarriers in one program", MAX_MBARRIERS);
    return (Clock){c->clocks + (size_t)c->n_clocks++ * c->machine->clock_words};
}
static void join(Machine *m, Clock to, Clock from) {
    for (int k = 0; k < m->actors; k++) if (from.at[k] > to.at[k]) to.at[k] = from.at[k];
    for (int k = m->actors; k < m->clock_words; k++) to.at[k] |= from.at[k];
}
static int knows(const Machine *m, Clock k, u32 actor, u32 stamp) {
    return actor == (u32)OF_EVENTS(m) ? k.at[m->actors + stamp / 32] >> stamp % 32 & 1 : k.at[actor] >= stamp;
}
static const char *named(const Machine *m, u32 actor) {
    return actor < (u32)OF_COPIES(m) ? "warp" : actor < (u32)OF_PRODUCTS(m) ? "cp.async of warp" : actor < (u32)OF_STORES(m) ?
        "matrix products of warp" : actor < (u32)OF_TENSOR(m) ? "bulk stores of warp" : actor < (u32)OF_EVENTS(m) ?
        "tcgen05.st of warp" : "what completes on an mbarrier, of";
}

/* One cell of the shadow: of shared memory, and after it of tensor memory. `same`: what is written there is there already,
   which is no race: tensors that several warps hold are stored by all of them. */
static void touch_cell(Cta *c, Warp *w, int pc, u32 k, int write, u32 actor, u32 stamp, int proxy, int same) {
    Machine *m = c->machine; const int n = m->job->n_warps; const u32 events = OF_EVENTS(m);
    Cell *cell = c->cells + k; u32 *reads = c->reads + (size_t)k * (m->actors + 1);
    int tensor = k >= c->tensor_cells, where = tensor ? (k - c->tensor_cells) % TENSOR_COLUMNS : k << m->job->shared_shift;
    const char *what = write ? "write" : "read", *space = tensor ? "tensor memory column" : "shared byte";
    int in_order = cell->writer == actor && (actor < (u32)n || (tensor && actor == events));
    if (cell->stamp && !in_order && !knows(m, w->clock, cell->writer, cell->stamp)) {
        if (same) return;
        fail(c, w, pc, "race: %s of %s %d is not after its write by %s %u", what, space, where, named(m, cell->writer),
             cell->writer % n);
    }
    if (m->job->proxies && proxy && !tensor && cell->stamp && !cell->by_proxy && !knows(m, w->seen, cell->writer, cell->stamp))
        fail(c, w, pc, "no fence.proxy.async between an asynchronous %s of %s %d and its write by %s %u", what, space, where,
             named(m, cell->writer), cell->writer % n);
    if (!write) { reads[actor] = stamp; return; }
    for (u32 a = 0; a <= events; a++)
        if (reads[a] && a != actor && !knows(m, w->clock, a, reads[a]))
            fail(c, w, pc, "race: write of %s %d is not after its read by %s %u", space, where, named(m, a), a % n);
    *cell = (Cell){actor, stamp, proxy};
}
/* `count` bytes of shared memory from `at` on; `data`: what a write will put there. */
static void touch(Cta *c, Warp *w, int pc, u32 at, u32 count, int write, u32 actor, u32 stamp, int proxy, const u8 *data) {
    const int shift = c->machine->job->shared_shift;
    if (!c->machine->job->races || !count) return;
    int same = data && !memcmp(c->shared + at, data, count);
    for (u32 k = at >> shift; k <= (at + count - 1) >> shift; k++) touch_cell(c, w, pc, k, write, actor, stamp, proxy, same);
}
static void touch_generic(Cta *c, Warp *w, int pc, u32 at, u32 count, int write, const u8 *data) {
    touch(c, w, pc, at, count, write, w->id, w->clock.at[w->id], 0, data);
}

/* Global memory: nothing orders the programs of a launch, so one that touches what another has written, or writes what another
   has read, races, unless both do so by atomics. An owner is program * 4 + 1 + 2 if by an atomic; ~0: several have read. */
static void own(Cta *c, Warp *w, int pc, const Range *range, u64 at, u32 count, int write, int atomic, const u8 *data) {
    Machine *m = c->machine; const int shift = m->job->global_shift; u32 me = c->program * 4 + 1;
    if (!m->owners) return;
    for (u64 k = (at - range->first) >> shift; k <= (at + count - 1 - range->first) >> shift; k++) {
        u32 *wrote = m->owners + 2 * (range->shadow + k), *read = wrote + 1;
        int foreign = *wrote && (*wrote & ~2u) != me && !(atomic && *wrote & 2);
        if (foreign && write && data && !memcmp((u8 *)at, data, count)) continue;
        if (foreign)
            fail(c, w, pc, "race: %s of global memory that program %u has written", write ? "write" : "read", *wrote / 4);
        if (write && *read && (*read & ~2u) != me && !(atomic && *read & 2 && *read != ~0u))
            fail(c, w, pc, "race: write of global memory that another program has read");
        if (write) *wrote = me | (atomic ? 2 : 0);
        else *read = !*read || *read == me ? me : ~0u;
    }
}

/* ---- bounds ---- */
static u8 *global_at(Cta *c, Warp *w, int pc, u64 at, u32 count, int write, int atomic, const u8 *data) {
    const Job *j = c->machine->job; int low = 0, high = j->n_ranges;
    while (low < high) {
        int middle = (low + high) / 2;
        if (j->ranges[middle].last <= at) low = middle + 1; else high = middle;
    }
    const Range *range = j->ranges + low;
    if (low == j->n_ranges || at < range->first || at + count > range->last)
        fail(c, w, pc, "global %s of %u bytes at 0x%llx: outside of every tensor", write ? "write" : "read", count,
             (unsigned long long)at);
    if (write && at >= j->params && at < j->params + 64 * 1024 && range->first == j->params)
        fail(c, w, pc, "write of a kernel parameter");
    own(c, w, pc, range, at, count, write, atomic, data);
    return (u8 *)at;
}
static void aligned(Cta *c, Warp *w, int pc, u64 at, u32 count, const char *space) {
    if (at % count) fail(c, w, pc, "%s access of %u bytes at 0x%llx is not aligned", space, count, (unsigned long long)at);
}
static u32 shared_at(Cta *c, Warp *w, int pc, u64 at, u32 count, int write) {   /* offset in the shared memory of the program */
    u64 offset = at - (u64)c->machine->job->shared_base, bytes = c->machine->job->shared_bytes;
    if (offset > bytes || offset + count > bytes)
        fail(c, w, pc, "shared %s of %u bytes at %lld: outside of the %d bytes", write ? "write" : "read", count,
             (long long)offset, (int)bytes);
    return (u32)offset;
}
/* An access of a warp; `data`: what a write will put there. */
static u8 *access_at(Cta *c, Warp *w, int pc, int space, u64 at, u32 count, int write, int atomic, const u8 *data) {
    aligned(c, w, pc, at, count, space == SHARED ? "shared" : "global");
    if (space == GLOBAL) return global_at(c, w, pc, at, count, write, atomic, data);
    u32 offset = shared_at(c, w, pc, at, count, write);
    touch_generic(c, w, pc, offset, count, write, data);
    return c->shared + offset;
}

/* ---- costs: 32-byte sectors of global memory, wavefronts of shared memory, and the least that would do ---- */
static void charge(Cta *c, int pc, int space, const u64 *at, u32 mask, u32 count) {
    Count *n = c->machine->job->counts + pc; n->requests += mask != 0;
    if (space == GLOBAL) {
        u64 seen[64]; int k = 0;
        LANES if (mask >> l & 1) for (u64 s = at[l] / 32; s <= (at[l] + count - 1) / 32; s++) {
            int i = 0; while (i < k && seen[i] != s) i++;
            if (i == k) seen[k++] = s;
        }
        n->sectors += k; n->least_sectors += (__builtin_popcount(mask) * count + 31) / 32;
        return;
    }
    int together = count <= 4 ? 32 : count == 8 ? 16 : 8;   /* lanes that share a wavefront */
    for (int first = 0; first < 32; first += together) {
        u32 words[32][32]; int used[32] = {0}, worst = 0;
        for (int l = first; l < first + together; l++) if (mask >> l & 1) for (u32 b = 0; b < (count + 3) / 4; b++) {
            u32 word = at[l] / 4 + b, bank = word % 32; int i = 0;
            while (i < used[bank] && words[bank][i] != word) i++;
            if (i == used[bank]) words[bank][used[bank]++] = word;
            if (used[bank] > worst) worst = used[bank];
        }
        n->wavefronts += worst; n->least_wavefronts += worst > 0;
    }
}
/* `bytes` that an engine reads or writes in shared memory: layouts made for it have no conflicts. */
static void charge_engine(Cta *c, int pc, u32 bytes) {
    Count *n = c->machine->job->counts + pc;
    n->wavefronts += (bytes + 127) / 128; n->least_wavefronts += (bytes + 127) / 128;
}
