/* Executes the programs of a launch. Warps step in lockstep, one at a time; who goes on, and when asynchronous work lands, is
   the schedule's to say. opcodes.py makes ops.h: the numbers of the opcodes, and ARITHMETIC, a case for each. */
#include "state.h"
#include "numbers.h"
#include "memory.h"
#include "copies.h"
#include "products.h"
#include "tensor.h"
#include "warp.h"
#include "ops.h"

/* ---- divergence: the sides of a branch run one after the other and meet at its immediate post-dominator ---- */
static void spread(Warp *w) { LANES w->lanes[l] = w->mask >> l & 1 ? ~0u : 0; }
static void jump(Warp *w, int to) {
    w->pc = to;
    /* Once this side is there, it is the other one's turn, or both go on together. */
    while (w->depth && w->sides[w->depth - 1].meets == w->pc) {
        Side s = w->sides[--w->depth];
        if (s.mask) { w->pc = s.pc; w->mask = s.mask; spread(w); }
    }
}
static void diverge(Cta *c, Warp *w, u32 taken, int to, int next, int meets) {
    if (w->depth + 2 > MAX_DEPTH) fail(c, w, w->pc, "branches diverge more than %d deep", MAX_DEPTH / 2);
    if (meets >= 0) w->sides[w->depth++] = (Side){meets, meets, w->mask};
    w->sides[w->depth++] = (Side){next, meets, w->mask & ~taken};
    w->mask = taken; spread(w);
    jump(w, to);
}
static int leave(Warp *w, u32 lanes) {                      /* whether the warp has ended */
    w->mask &= ~lanes;
    for (int k = 0; k < w->depth; k++) w->sides[k].mask &= ~lanes;
    while (!w->mask && w->depth) { Side s = w->sides[--w->depth]; w->pc = s.pc; w->mask = s.mask; }
    spread(w);
    return !w->mask;
}

/* ---- bar.sync and bar.arrive ---- */
static void barrier(Cta *c, Warp *w, int pc, u32 id, u32 threads, int waits) {
    Machine *m = c->machine;
    if (id >= MAX_BARRIERS) fail(c, w, pc, "barrier %u", id);
    if (waits) { w->state = AT_BARRIER; w->barrier = id; }
    c->barriers[id].wanted = threads ? (int)threads / 32 : m->job->n_warps;
    c->barriers[id].warps++;
    Clock all = {c->clocks + (size_t)id * 2 * m->clock_words}, seen = {all.at + m->clock_words};
    join(m, all, w->clock); join(m, seen, w->seen);         /* what it did before is known to those who wait */
    if (!waits) w->clock.at[w->id]++;
    if (c->barriers[id].warps < c->barriers[id].wanted) return;
    for (int k = 0; k < m->job->n_warps; k++) {
        Warp *v = c->warps + k;
        if (v->state != AT_BARRIER || v->barrier != (int)id) continue;
        v->state = READY; join(m, v->clock, all); join(m, v->seen, seen); v->clock.at[k]++;
    }
    memset(all.at, 0, 2 * (size_t)m->clock_words * 4);
    c->barriers[id].warps = 0; m->progress = 1;
}

/* ---- one warp until it waits, ends, or its turn is over ---- */
static void run_warp(Cta *c, Warp *w, int turn) {
    Machine *m = c->machine; Job *job = m->job; u8 *registers = w->registers; u32 lanes[32];
    while (turn-- > 0) {
        int pc = w->pc, next = pc + 1;
        if (pc < 0 || pc >= job->n_code) fail(c, w, pc, "ran off the end of the program");
        const Ins *i = job->code + pc; const s32 *o = job->operands + i->first;
        const u32 *on = w->lanes; u32 active = w->mask;
        if (i->predicate >= 0) {
            const u32 *p = (u32 *)(registers + (size_t)i->predicate * 128);
            LANES lanes[l] = w->lanes[l] & (i->negated ? ~p[l] : p[l]);
            on = lanes; active = bits_of(lanes);
        }
        job->counts[pc].runs++; job->counts[pc].lanes += __builtin_popcount(active);
        if (--job->fuel < 0) fail(c, w, pc, "the launch does not end");
        if (i->op == BRANCH) {
            if (active == w->mask) jump(w, i->target);
            else if (!active) jump(w, next);
            else diverge(c, w, active, i->target, next, i->meets);
            continue;
        }
        if (!active) { jump(w, next); continue; }
        if (w->hazards && i->op != WGMMA) hazard_check(c, w, i, o, pc);
        switch (i->op) {
        ARITHMETIC
        case NOTHING: break;
        case LOAD: load(c, w, i, o, pc, active); break;
        case STORE: store(c, w, i, o, pc, active); break;
        case ATOM: atom(c, w, i, o, pc, active); break;
        case SHUFFLE: shuffle(c, w, i, o, pc, active); break;
        case VOTE: vote(w, i, o, active); break;
        case LOAD_MATRIX: matrix(c, w, i, o, pc, active, 0); break;
        case STORE_MATRIX: matrix(c, w, i, o, pc, active, 1); break;
        case PACK: pack(w, i, o, active); break;
        case UNPACK: unpack(w, i, o, active); break;
        case MMA:
            if (active != ~0u) fail(c, w, pc, "mma in a diverged warp");
            if (i->mode >= MMA_F64_K4) mma_f64(w, i, o); else mma_f32(c, w, i, o);
            break;
        case CP_ASYNC: copy_async(c, w, i, o, pc, active); break;
        case CP_COMMIT: w->copy_group++; break;
        case CP_WAIT: copies_wait(c, w, i->offset); break;
        case BULK: bulk(c, w, i, o, pc, active); break;
        case BULK_COMMIT: w->store_group++; break;
        case BULK_WAIT: stores_wait(c, w, i->offset); break;
        case BARRIER_SET:
            LANES if (active >> l & 1) barrier_set(c, w, pc, address_in(w, i, o[0], l), OPERAND(u32, 1)[l]);
            break;
        case BARRIER_DROP: LANES if (active >> l & 1) barrier_at(c, w, pc, address_in(w, i, o[0], l), 1)->set = 0; break;
        case BARRIER_ARRIVE:
            LANES if (active >> l & 1) {
                Barrier *b = barrier_at(c, w, pc, address_in(w, i, o[0], l), 1);
                if (i->mode) barrier_arrive(c, w, pc, b, 1, OPERAND(s32, 1)[l]);
                else barrier_arrive(c, w, pc, b, i->reads > 1 ? OPERAND(u32, 1)[l] : 1, 0);
            }
            break;
        case BARRIER_TRY: {
            int l0 = __builtin_ctz(active);
            Barrier *b = barrier_at(c, w, pc, address_in(w, i, o[1], l0), 1);
            int yes = barrier_try(c, w, b, OPERAND(u32, 2)[l0]);
            LANES if (active >> l & 1) OPERAND(u32, 0)[l] = yes ? ~0u : 0;
            if (!yes) { jump(w, next); w->polls++; return; }
            break; }
        case FENCE_PROXY: join(m, w->seen, w->clock); w->clock.at[w->id]++; break;
        case WGMMA: wgmma_start(c, w, i, o, pc, active); break;
        case WGMMA_FENCE:
            if (w->hazards) for (int k = 0; k < job->n_slots; k++) if (w->hazards[k] == UNFENCED) w->hazards[k] = 0;
            break;
        case WGMMA_COMMIT: w->product_group++; break;
        case WGMMA_WAIT: wgmma_wait(c, w, i->offset); break;
        case TENSOR_ALLOCATE: tensor_allocate(c, w, i, o, pc); break;
        case TENSOR_FREE: tensor_free(c, w, i, o, pc); break;
        case TENSOR_LOAD: tensor_move(c, w, i, o, pc, active, 0); break;
        case TENSOR_STORE: tensor_move(c, w, i, o, pc, active, 1); break;
        case TENSOR_WAIT_LOAD: tensor_wait_load(c, w); break;
        case TENSOR_WAIT_STORE: w->clock.at[OF_TENSOR(m) + w->id] = ++w->tensor_group; break;
        case TENSOR_MULTIPLY: tensor_multiply(c, w, i, o, pc, active); break;
        case TENSOR_COMMIT: tensor_commit(c, w, i, o, pc, active); break;
        case MAP_REPLACE: map_replace(c, w, i, o, pc, active); break;
        case MAP_PUBLISH: map_publish(c, w, i, o, pc); break;
        case BARRIER:
            if (!i->mode && w->mask != ~0u) fail(c, w, pc, "bar.sync in a diverged warp");
            jump(w, next);
            barrier(c, w, pc, OPERAND(u32, 0)[0], i->reads > 1 ? OPERAND(u32, 1)[0] : 0, !i->mode);
            if (!i->mode) return;
            continue;
        case BRANCH_TABLE: {
            u32 k = OPERAND(u32, 0)[__builtin_ctz(active)];
            LANES if (active >> l & 1 && OPERAND(u32, 0)[l] != k) fail(c, w, pc, "brx.idx diverges");
            if (k >= (u32)i->count) fail(c, w, pc, "brx.idx takes branch %u of %d", k, i->count);
            jump(w, o[1 + k]);
            continue; }
        case EXIT:
            if (leave(w, active)) { w->state = DONE; m->progress = 1; return; }
            if (i->predicate >= 0 && w->pc == pc) break;
            continue;
        default: fail(c, w, pc, "operation %d is not known", i->op);
        }
        jump(w, next);
    }
}

/* ---- programs ---- */
static Cta *start(Machine *m, u32 program) {
    const Job *j = m->job; Cta *c = calloc(1, sizeof *c); int n = j->n_warps;
    size_t frame = (size_t)j->n_slots * 128, cells = ((size_t)j->shared_bytes >> j->shared_shift) + 1 + 8 * TENSOR_COLUMNS;
    c->machine = m; c->program = program; c->tensor_cells = cells - 8 * TENSOR_COLUMNS;
    c->shared = aligned_alloc(4096, ((size_t)j->shared_bytes + 8192) & ~(size_t)4095); memset(c->shared, 0xff, j->shared_bytes);
    c->mbarriers = calloc(j->shared_bytes / 8 + 1, sizeof *c->mbarriers);
    if (j->races) { c->cells = calloc(cells, sizeof *c->cells); c->reads = calloc(cells * (m->actors + 1), 4); }
    c->clocks = calloc((size_t)MAX_CLOCKS(m) * m->clock_words, 4); c->n_clocks = 2 * MAX_BARRIERS;
    c->warps = calloc(n, sizeof *c->warps); c->registers = aligned_alloc(4096, (frame * n + 4095) & ~(size_t)4095);
    for (int k = 0; k < n; k++) {
        Warp *w = c->warps + k; w->id = k; w->registers = c->registers + frame * k; memcpy(w->registers, j->frame, frame);
        u32 at[3] = {program % j->grid_x, program / j->grid_x % j->grid_y, program / j->grid_x / j->grid_y};
        LANES {
            SLOT(w, u32, j->tid_slot)[l] = k * 32 + l; SLOT(w, u32, j->lane_slot)[l] = l;
            for (int d = 0; d < 3; d++) SLOT(w, u32, j->program_slot + d)[l] = at[d];
        }
        w->mask = ~0u; spread(w);
        w->clock = new_clock(c, w, 0); w->seen = new_clock(c, w, 0); w->clock.at[k] = w->seen.at[k] = 1;
        if (j->hazards) w->hazards = calloc(j->n_slots, 1);
    }
    return c;
}
static void finish(Cta *c) {
    for (int k = 0; k < c->machine->job->n_warps; k++) {
        Warp *w = c->warps + k; u64 *most = &c->machine->job->in_flight;
        if (w->n_products) fail(c, w, w->products[0].pc, "a wgmma was never waited for");
        if (w->store_group > w->stores_waited) fail(c, w, w->pc, "a bulk store was never waited for");
        if (w->most > *most) *most = w->most;
    }
    for (int k = 0; k < TENSOR_COLUMNS / 32; k++)
        if (c->allocated[k]) fail(c, c->warps, c->warps->pc, "tensor memory was not freed");
    if (c->n_tensor_ops)
        fail(c, c->warps + c->tensor_ops->warp, c->tensor_ops->pc, "a product of tcgen05 was never waited for");
    if (c->n_boxes) {
        const Box *x = c->boxes;
        fail(c, c->warps + x->warp, x->pc, "a bulk %s was never waited for", x->store ? "store" : "load");
    }
}
static void discard(Cta *c) {
    for (int k = 0; k < c->machine->job->n_warps; k++) { free(c->warps[k].copies); free(c->warps[k].hazards); }
    free(c->shared); free(c->tensor); free(c->mbarriers); free(c->cells); free(c->reads); free(c->clocks);
    free(c->warps); free(c->registers); free(c);
}

static void land_some(Cta *c) {
    Machine *m = c->machine;
    for (int k = 0; k < m->job->n_warps; k++) {
        Warp *w = c->warps + k;
        if (w->n_copies && chance(m) % 4 == 0) {
            int x = chance(m) % w->n_copies;
            land_copy(c, w, w->copies + x); w->copies[x] = w->copies[--w->n_copies];
        }
        if (w->n_products && chance(m) % 4 == 0) wgmma_land(c, w);
    }
    if (c->n_boxes && chance(m) % 4 == 0) land_box(c, chance(m) % c->n_boxes);
    if (c->n_tensor_ops && chance(m) % 4 == 0) tensor_land(c);
}
/* One turn of one warp of a program; whether the program has ended. */
#define LOOP 32
static int take_turn(Cta *c) {
    Machine *m = c->machine; int ready[MAX_WARPS], n = 0, done = 0, warps = m->job->n_warps;
    for (int k = 0; k < warps; k++) { if (c->warps[k].state == READY) ready[n++] = k; done += c->warps[k].state == DONE; }
    if (done == warps) return 1;
    if (!n) {
        Warp *w = c->warps; while (w->state == DONE) w++;
        fail(c, w, w->pc, "deadlock: no warp can go on, and warp %d waits at barrier %d", w->id, w->barrier);
    }
    Warp *w = c->warps + ready[chance(m) % n]; int polls = w->polls;
    s64 before = m->job->fuel;
    m->progress = 0;
    if (m->job->landing == RANDOM) land_some(c);
    run_warp(c, w, m->job->turn ? 1 + chance(m) % m->job->turn : 1 << 30);
    int worked = w->polls == polls && before - m->job->fuel > LOOP;   /* longer than a loop that polls */
    if (worked || m->progress) c->idle = 0;
    else if (w->polls == polls) return 0;
    else if (++c->idle > 8 * warps) {                       /* all spin: what is late can be later no more */
        if (c->n_boxes && !(c->n_tensor_ops && chance(m) % 2)) { land_box(c, chance(m) % c->n_boxes); c->idle = 0; }
        else if (c->n_tensor_ops) { tensor_land(c); c->idle = 0; }
        else if (c->idle > 64 * warps + 4096)
            fail(c, w, w->pc, "deadlock: every warp spins on an mbarrier that nothing completes");
    }
    return 0;
}

int run_launch(Job *job) {
    Machine m = {.job = job, .random = job->seed | 1}; int failed = 0, started = 0;
    m.actors = 5 * job->n_warps; m.clock_words = m.actors + MAX_EVENTS / 32;
    for (int k = 0; k < 8; k++) chance(&m);
    u64 cells = 0;
    for (int k = 0; k < job->n_ranges; k++) {
        const Range *range = job->ranges + k;
        u64 end = range->shadow + ((range->last - range->first) >> job->global_shift) + 1;
        if (end > cells) cells = end;
    }
    m.owners = job->races ? calloc(2 * cells, 4) : 0;
    m.ctas = calloc(job->resident, sizeof *m.ctas);
    if (setjmp(m.stop)) failed = 1;
    else for (;;) {
        while (m.n_ctas < job->resident && started < job->n_order) m.ctas[m.n_ctas++] = start(&m, job->order[started++]);
        if (!m.n_ctas) break;
        int k = m.n_ctas > 1 ? chance(&m) % m.n_ctas : 0; Cta *c = m.ctas[k];
        if (take_turn(c)) { finish(c); m.ctas[k] = m.ctas[--m.n_ctas]; discard(c); }
    }
    for (int k = 0; k < m.n_ctas; k++) discard(m.ctas[k]);
    free(m.ctas); free(m.owners);
    return failed;
}
