/* Copies that run behind a warp's back: cp.async, bulk tensor copies, and the mbarriers that tell of their end. */

static void flying(Warp *w, s64 count) { w->flying += count; if (w->flying > w->most) w->most = w->flying; }

/* ---- cp.async: a group is waited for by the warp that committed it ---- */
static void land_copy(Cta *c, Warp *w, const Copy *x) {
    u8 data[16] = {0};
    memcpy(data, (u8 *)x->from, x->valid);
    memcpy(c->shared + x->to, data, x->bytes);
    flying(w, -(s64)x->valid); c->machine->progress = 1;
}
static void land_copies(Cta *c, Warp *w, u32 groups) {      /* of the first `groups` groups */
    int kept = 0;
    for (int k = 0; k < w->n_copies; k++)
        if (w->copies[k].group < groups) land_copy(c, w, w->copies + k); else w->copies[kept++] = w->copies[k];
    w->n_copies = kept;
}
/* Reads: target, source and, where it is no constant, how many bytes are valid; the rest is zero. */
static void copy_async(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    u64 from[32] = {0}, to[32] = {0}; u32 reading = 0, size = i->size;
    LANES if (active >> l & 1) {
        u32 valid = i->reads > 2 ? OPERAND(u32, 2)[l] : size;
        if (valid > size) fail(c, w, pc, "cp.async of %u bytes reads %u", size, valid);
        to[l] = OPERAND(u32, 0)[l] + (u64)i->offset; from[l] = OPERAND(u64, 1)[l] + (u64)(s64)i->mode;
        aligned(c, w, pc, to[l], size, "shared");
        u32 offset = shared_at(c, w, pc, to[l], size, 1);
        if (valid) {
            aligned(c, w, pc, from[l], size, "global"); global_at(c, w, pc, from[l], valid, 0, 0, 0);
            reading |= 1u << l;
        }
        touch(c, w, pc, offset, size, 1, OF_COPIES(c->machine) + w->id, w->copy_group + 1, 0, 0);
        if (w->n_copies == w->room) w->copies = realloc(w->copies, (w->room = 2 * w->room + 256) * sizeof(Copy));
        w->copies[w->n_copies++] = (Copy){from[l], offset, size, valid, w->copy_group};
        flying(w, valid);
    }
    charge(c, pc, GLOBAL, from, reading, size);
    charge(c, pc, SHARED, to, active, size); c->machine->job->counts[pc].requests -= active != 0;   /* one request */
    if (c->machine->job->landing == EAGER) land_copies(c, w, ~0u);
}
static void copies_wait(Cta *c, Warp *w, s64 pending) {     /* until at most so many groups are; < 0: for all that was issued */
    u32 *known = w->clock.at + OF_COPIES(c->machine) + w->id;
    u32 done = pending < 0 ? w->copy_group + 1 : w->copy_group > pending ? w->copy_group - pending : 0;
    land_copies(c, w, done);
    if (done > *known) *known = done;
}

/* ---- mbarriers ---- */
static Barrier *barrier_at(Cta *c, Warp *w, int pc, u64 at, int must) {
    aligned(c, w, pc, at, 8, "mbarrier");
    Barrier *b = c->mbarriers + shared_at(c, w, pc, at, 8, 1) / 8;
    if (must && !b->set)
        fail(c, w, pc, "the mbarrier at shared byte %lld was not initialised", (long long)(at - c->machine->job->shared_base));
    return b;
}
static void barrier_set(Cta *c, Warp *w, int pc, u64 at, u32 count) {
    Barrier *b = barrier_at(c, w, pc, at, 0); Machine *m = c->machine;
    if (!b->now.at) {
        b->now = new_clock(c, w, pc); b->done = new_clock(c, w, pc);
        b->now_seen = new_clock(c, w, pc); b->done_seen = new_clock(c, w, pc);
    }
    for (Clock *k = &b->now; k <= &b->done_seen; k++) memset(k->at, 0, m->clock_words * 4);
    b->set = 1; b->expected = b->pending = count; b->phase = 0; b->bytes = 0;
    touch_generic(c, w, pc, at - m->job->shared_base, 8, 1, 0);
}
static void barrier_step(Cta *c, Barrier *b) {
    if (b->pending || b->bytes) return;
    b->phase++; b->pending = b->expected;
    join(c->machine, b->done, b->now); join(c->machine, b->done_seen, b->now_seen);
    c->machine->progress = 1;
}
static void barrier_arrive(Cta *c, Warp *w, int pc, Barrier *b, u32 count, s64 bytes) {
    if (count > b->pending) fail(c, w, pc, "%u arrivals at an mbarrier that expects %u", count, b->pending);
    b->bytes += bytes; b->pending -= count;
    join(c->machine, b->now, w->clock); join(c->machine, b->now_seen, w->seen);
    w->clock.at[w->id]++; c->machine->progress = 1;
    barrier_step(c, b);
}
/* Whether the phase of that parity has ended. A card may say no for no reason: so does a random schedule. */
static int barrier_try(Cta *c, Warp *w, Barrier *b, u32 parity) {
    int ended = (b->phase & 1) != (parity & 1);
    if (ended && c->machine->job->landing == RANDOM && chance(c->machine) % 8 == 0) ended = 0;
    if (ended) { join(c->machine, w->clock, b->done); join(c->machine, w->seen, b->done_seen); }
    return ended;
}

/* ---- bulk tensor copies; a map is a descriptor in an encoding of our own (tensormap.py) ---- */
typedef struct { u64 base; u32 rank, element, swizzle, fill, dims[5], box[5]; u64 strides[4]; } Map;
enum { MAP_OTHER, MAP_ADDRESS, MAP_RANK, MAP_BOX, MAP_DIM, MAP_STRIDE, MAP_SWIZZLE, MAP_FILL, MAP_TYPE };

static u32 swizzled(u32 at, u32 span) { return span ? at ^ (at >> 7 & (span / 16 - 1)) << 4 : at; }
static u32 box_bytes(const Map *t) { u32 n = t->element; for (u32 d = 0; d < t->rank; d++) n *= t->box[d]; return n; }
/* A row of a box, along dim 0. */
static void copy_row(Cta *c, const Box *x, const Map *t, u64 from, int inside, u32 smem, u32 count) {
    Warp *w = c->warps + x->warp;
    for (u32 k = 0; k < count; k += 16) {                   /* swizzles move 16 bytes at a time */
        u8 *p = c->shared + swizzled(smem + k, t->swizzle) - c->machine->job->shared_base;
        for (u32 e = 0; e < 16 && k + e < count; e += t->element) {
            s64 column = x->at[0] + (s64)((k + e) / t->element);
            u64 at = from + column * t->element; int in = inside && column >= 0 && column < t->dims[0];
            if (in) global_at(c, w, x->pc, at, t->element, x->store, 0, x->store ? p + e : 0);
            if (x->store) { if (in) memcpy((u8 *)at, p + e, t->element); }
            else if (in) memcpy(p + e, (u8 *)at, t->element); else memset(p + e, 0, t->element);
        }
    }
}
static void land_box(Cta *c, int k) {
    Box x = c->boxes[k]; const Map *t = (const Map *)x.map; u32 at[5] = {0}, row = t->box[0] * t->element;
    memmove(c->boxes + k, c->boxes + k + 1, (--c->n_boxes - k) * sizeof x);
    for (u32 r = 0; r < box_bytes(t) / row; r++) {
        u64 from = t->base; int inside = 1;
        for (u32 d = 1; d < t->rank; d++) {
            s64 p = (s64)x.at[d] + at[d];
            if (p < 0 || p >= t->dims[d]) inside = 0;
            from += p * t->strides[d - 1];
        }
        copy_row(c, &x, t, from, inside, x.smem + r * row, row);
        for (u32 d = 1; d < t->rank && ++at[d] == t->box[d]; d++) at[d] = 0;
    }
    if (!x.store) {
        Warp *w = c->warps + x.warp; Barrier *b = barrier_at(c, w, x.pc, x.barrier, 1);
        b->now.at[c->machine->actors + x.event / 32] |= 1u << x.event % 32;
        b->bytes -= box_bytes(t); barrier_step(c, b); flying(w, -(s64)box_bytes(t));
    }
    c->machine->progress = 1;
}
static u32 new_event(Cta *c, Warp *w, int pc) {
    if (++c->events >= MAX_EVENTS) fail(c, w, pc, "more than %d asynchronous operations in one program", MAX_EVENTS);
    return c->events;
}
/* Reads: shared address, map, coordinates and, of a load, the mbarrier. */
static void bulk(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    Machine *m = c->machine; int store = i->mode;
    LANES if (active >> l & 1) {
        Box x = {.pc = pc, .warp = w->id, .group = w->store_group, .store = store, .map = OPERAND(u64, 1)[l],
                 .smem = OPERAND(u32, 0)[l] + (u32)i->offset};
        const Map *t = (const Map *)global_at(c, w, pc, x.map, 128, 0, 1, 0);
        if ((int)t->rank != i->count)
            fail(c, w, pc, "a descriptor of %u dimensions where one of %d is expected", t->rank, i->count);
        for (int d = 0; d < i->count; d++) x.at[d] = OPERAND(s32, 2 + d)[l];
        u32 bytes = box_bytes(t), offset = shared_at(c, w, pc, x.smem, bytes, !store);
        if (x.smem % 128) fail(c, w, pc, "bulk tensor copy at shared byte %u, which is no multiple of 128", offset);
        if (!store) {
            x.barrier = OPERAND(u32, 2 + i->count)[l]; barrier_at(c, w, pc, x.barrier, 1);
            x.event = new_event(c, w, pc);
        }
        u32 actor = store ? (u32)OF_STORES(m) + w->id : (u32)OF_EVENTS(m), stamp = store ? w->store_group + 1 : x.event;
        touch(c, w, pc, offset, bytes, !store, actor, stamp, 1, 0);
        if (!store) flying(w, bytes);
        if (c->n_boxes == MAX_COPIES) fail(c, w, pc, "more than %d bulk copies in flight", MAX_COPIES);
        m->job->counts[pc].requests++; m->job->counts[pc].sectors += bytes / 32; m->job->counts[pc].least_sectors += bytes / 32;
        charge_engine(c, pc, bytes);
        c->boxes[c->n_boxes++] = x;
        if (m->job->landing == EAGER) land_box(c, c->n_boxes - 1);
    }
}
/* What .read waits for is less; that the rest has happened too shows nowhere. */
static void stores_wait(Cta *c, Warp *w, s64 pending) {
    u32 *known = w->clock.at + OF_STORES(c->machine) + w->id, done = w->store_group > pending ? w->store_group - pending : 0;
    for (int k = 0; k < c->n_boxes;)
        if (c->boxes[k].store && c->boxes[k].warp == w->id && (u32)c->boxes[k].group < done) land_box(c, k); else k++;
    if (done > *known) *known = done;
    if (done > w->stores_waited) w->stores_waited = done;
}

/* tensormap.replace: `mode` says which field of the map in shared memory, `count` its ordinal. Reads: address, value. */
static void map_replace(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc, u32 active) {
    static const u8 element_bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
    LANES if (active >> l & 1) {
        u64 at = address_in(w, i, o[0], l), v = i->size == 8 ? OPERAND(u64, 1)[l] : OPERAND(u32, 1)[l];
        Map *t = (Map *)(c->shared + shared_at(c, w, pc, at, 128, 1));
        switch (i->mode) {
        case MAP_ADDRESS: t->base = v; break;
        case MAP_RANK: t->rank = v + 1; break;
        case MAP_BOX: t->box[i->count] = v; break;
        case MAP_DIM: t->dims[i->count] = v; break;
        case MAP_STRIDE: t->strides[i->count] = v; break;
        case MAP_SWIZZLE: t->swizzle = v ? 16 << v : 0; break;
        case MAP_FILL: t->fill = v; break;
        case MAP_TYPE:
            if (v >= sizeof element_bytes) fail(c, w, pc, "element type %llu", (unsigned long long)v);
            t->element = element_bytes[v];
            break;
        }
    }
}
static void map_publish(Cta *c, Warp *w, const Ins *i, const s32 *o, int pc) {     /* to global memory: reads: to, from */
    u64 to = OPERAND(u64, 0)[0]; u32 from = shared_at(c, w, pc, address_in(w, i, o[1], 0), 128, 0);
    touch_generic(c, w, pc, from, 128, 0, 0);
    memcpy(global_at(c, w, pc, to, 128, 1, 0, c->shared + from), c->shared + from, 128);
}
