/* What a launch is made of: the encoded program, the warps of the programs that are under way, and what is in flight behind
   their backs. Registers: a slot is 32 lanes of 4 bytes; 64-bit registers take two slots. Slot 0 is nowhere. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
typedef int8_t s8; typedef int16_t s16; typedef int32_t s32; typedef int64_t s64;
typedef float f32; typedef double f64; typedef _Float16 f16;
typedef __int128 s128; typedef unsigned __int128 u128;

#define LANES for (int l = 0; l < 32; l++)
enum { EAGER, LATE, RANDOM };                               /* when asynchronous work lands */
enum { GLOBAL, SHARED };
enum { READY, AT_BARRIER, DONE };
enum { MAX_WARPS = 32, MAX_DEPTH = 64, MAX_BARRIERS = 16, MAX_MBARRIERS = 256, MAX_COPIES = 512, MAX_PRODUCTS = 256,
       MAX_EVENTS = 1 << 14, TENSOR_COLUMNS = 512 };

/* `first` of the operand slots: those written, then those read. */
typedef struct {
    s32 op, predicate, negated, target, meets, first, writes, reads, size, count, space, mode, flags, pad;
    s64 offset;
} Ins;
/* Of addresses; `shadow`: where its cells begin in the shadow of global memory. */
typedef struct { u64 first, last, shadow; } Range;
typedef struct { u64 runs, lanes, requests, sectors, least_sectors, wavefronts, least_wavefronts; } Count;

/* What Python hands over; machine.py has the same fields. */
typedef struct {
    const Ins *code; const s32 *operands; const Range *ranges; const u8 *frame; const u32 *order; Count *counts; char *error;
    u64 params, seed, in_flight; s64 fuel;
    s32 n_code, n_ranges, n_order, n_warps, n_slots, shared_bytes, shared_base, shared_shift, global_shift;
    s32 tid_slot, lane_slot, program_slot, grid_x, grid_y;
    s32 landing, races, proxies, truncate, perturb, turn, resident, hazards, fences;
} Job;

/* Vector clocks: one for every actor, a warp or one of its engines, and a bit for everything that completes in any order. */
typedef struct { u32 *at; } Clock;

typedef struct { u64 from; u32 to, bytes, valid, group; } Copy;                           /* one lane's cp.async */
typedef struct { s32 pc, group; u64 a, b; int accumulate; } Product;                      /* one warp's part of a wgmma */
typedef struct { s32 pc, warp, group, store; u64 map; u32 smem, barrier, event; s32 at[5]; } Box;  /* a bulk tensor copy */
typedef struct { s32 pc, warp; u32 d, a, kind, event, barrier; u64 from_a, b; int accumulate; } TensorOp;   /* of tcgen05 */
typedef struct { s32 pc, meets; u32 mask; } Side;                                         /* of a branch that diverged */
typedef struct {                                                                          /* an mbarrier */
    u32 set, expected, pending, phase; s64 bytes;
    Clock now, done, now_seen, done_seen;
} Barrier;

typedef struct {
    int state, pc, depth, barrier, polls, id;
    u32 mask, lanes[32];
    Side sides[MAX_DEPTH];
    u8 *registers, *hazards;
    Copy *copies; int n_copies, room; u32 copy_group;
    Product products[MAX_PRODUCTS]; int n_products; u32 product_group;
    u32 store_group, stores_waited, tensor_group;
    u64 flying, most;                                       /* bytes of loads in flight */
    Clock clock, seen;                                      /* what happened before; what of it asynchronous proxies see */
} Warp;

typedef struct {
    u32 writer, stamp; u8 by_proxy;
} Cell;

typedef struct Machine Machine;
typedef struct {
    Machine *machine; u32 program;
    u8 *shared; Warp *warps; u8 *registers;
    struct { int warps, wanted; } barriers[MAX_BARRIERS];
    Barrier *mbarriers;
    Box boxes[MAX_COPIES]; int n_boxes; u32 events;
    u32 *tensor; u8 allocated[TENSOR_COLUMNS / 32];         /* tensor memory, 128 lanes of 512 words, made when asked for */
    TensorOp tensor_ops[MAX_COPIES]; int n_tensor_ops;
    u32 tensor_events[MAX_EVENTS / 32];                     /* which events are products of tensor memory, a bit each */
    u32 tensor_cells;
    Cell *cells; u32 *reads;                                /* shadow of shared memory: last write, every actor's last read */
    u32 *clocks, n_clocks;
    int idle;
} Cta;
struct Machine {
    Job *job; u64 random; jmp_buf stop; int progress, actors, clock_words;
    u32 *owners;                                            /* shadow of global memory: which program wrote, which one read */
    Cta **ctas; int n_ctas;
};

/* Of the actors: warps come first, then each engine of each warp. */
#define OF_COPIES(m) ((m)->job->n_warps)
#define OF_PRODUCTS(m) (2 * (m)->job->n_warps)
#define OF_STORES(m) (3 * (m)->job->n_warps)
#define OF_TENSOR(m) (4 * (m)->job->n_warps)                  /* tcgen05.st */
#define OF_EVENTS(m) (5 * (m)->job->n_warps)
/* Of a program's clocks: two for each barrier and each warp, four for each mbarrier. */
#define MAX_CLOCKS(m) (2 * MAX_BARRIERS + 2 * (m)->job->n_warps + 4 * MAX_MBARRIERS)

static u32 chance(Machine *m) {
    m->random ^= m->random << 13; m->random ^= m->random >> 7; m->random ^= m->random << 17;
    return (u32)(m->random >> 16);
}

static void fail(Cta *c, Warp *w, int pc, const char *format, ...) {
    va_list values; va_start(values, format);
    char *text = c->machine->job->error;
    int n = sprintf(text, "%u|%d|%d|", c->program, w ? w->id : -1, pc);
    vsnprintf(text + n, 900, format, values); va_end(values);
    longjmp(c->machine->stop, 1);
}

#define SLOT(w, type, slot) ((type *)((w)->registers + (size_t)(slot) * 128))
#define OPERAND(type, k) SLOT(w, type, o[k])
/* 64 or 32 bits of an address, by whether its register is wide. */
#define WIDE_ADDRESS 1
#define WIDE_VALUES 2
#define SIGNED 4
static u64 address_in(const Warp *w, const Ins *i, s32 slot, int l) {
    return (i->flags & WIDE_ADDRESS ? SLOT(w, u64, slot)[l] : SLOT(w, u32, slot)[l]) + (u64)i->offset;
}
