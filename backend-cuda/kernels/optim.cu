// Row rules: how touched rows change. RULE says which, ELEM (F32 or BF16) what rows are stored as.
//
// Contract. `table.codes` holds `rows` rows of `dim` codes, `table.state` `state_len` floats a row; `table.names` is null, or
// where the rows lie in a cache the id that each has in its table, by which its noise is drawn. A block changes a row:
// its threads own columns, VEC at a time (4 if codes, state, gradients and sources are aligned to that and VEC divides
// dim). The operations are core's, in their order and unfused, so the bits are the reference's; a mean square is summed in
// 16 lanes, then the lanes in order. Rules that need one take `dim` floats of dynamic shared memory. Compiled behind
// sums.cuh.
//
// `dot_short` changes short rows and writes dots[e] for each of their entries e: the source of the entry times the row as it
// was before. A horizontal sum: fused, its order fixed by the launch. `dot_rows` writes the dots of longer rows and comes
// before these change.
//
// Nothing is changed while the flag is raised: a plan made from an id that is no row must not reach a table. A row of the
// plan that the table has not raises it and is left out.

#define SGD 0
#define ADAGRAD 1
#define ROWWISE_ADAGRAD 2
#define ADAM 3
#define ROWWISE_ADAM 4
#ifndef RULE
#define RULE SGD
#endif

// Threads of a block that takes short rows, at most, and what a multiprocessor must hold of them: as many as registers
// allow without spilling.
#if RULE >= ADAM || RULE == ADAGRAD
#define SHORT_BOUNDS 256, 3
#else
#define SHORT_BOUNDS 256, 4
#endif

// The same where dots are found too. Rules without a rate of rows read each piece twice at the same time, and more sources in
// bf16 are on their way.
#if RULE == ADAGRAD || RULE == ADAM || (RULE == ROWWISE_ADAM && SOURCE == BF16)
#define DOT_BOUNDS 256, 2
#elif RULE == SGD || (RULE == ROWWISE_ADAGRAD && ELEM == F32 && SOURCE == BF16)
#define DOT_BOUNDS 256, 3
#else
#define DOT_BOUNDS SHORT_BOUNDS
#endif

// Pieces of a row that a thread holds at once where the rate of the row must be found first.
#if RULE == ROWWISE_ADAM || ELEM == F32
#define PIECES 2
#else
#define PIECES 4
#endif

#define ROWWISE (RULE == ROWWISE_ADAGRAD || RULE == ROWWISE_ADAM)
// Floats of state that each value has, apart from what its row has.
#define STATES (RULE == ADAM ? 2 : RULE == ADAGRAD || RULE == ROWWISE_ADAM ? 1 : 0)

struct Rows {
    u8* codes;
    float* state;
    u64 rows;
    u32 dim;
    u32 state_len;
    const u32* names;
};

// What all rows of a step share; `count` is mixed already.
struct Step {
    float grad_scale;
    float rate;
    float eps;
    float beta1;
    float beta2;
    float one_less_beta1;
    float one_less_beta2;
    u32 stochastic;
    u64 seed;
    u64 count;
};

// AGAIN: they are read once more soon.
template <int VEC, bool AGAIN = false> __device__ __forceinline__ Raw<VEC * SIZE> load_codes(const u8* p) {
    Raw<VEC * SIZE> raw;
    if constexpr (VEC * SIZE == 16) {
        const uint4 v = AGAIN ? *(const uint4*)p : __ldcs((const uint4*)p);
        raw.w[0] = v.x, raw.w[1] = v.y, raw.w[2] = v.z, raw.w[3] = v.w;
    } else if constexpr (VEC * SIZE == 8) {
        const uint2 v = AGAIN ? *(const uint2*)p : __ldcs((const uint2*)p);
        raw.w[0] = v.x, raw.w[1] = v.y;
    } else if constexpr (VEC * SIZE == 4) {
        raw.w[0] = *(const u32*)p;
    } else {
        raw.w[0] = *(const u16*)p;
    }
    return raw;
}

// Stores VEC columns of a row from `column` on, which is a multiple of VEC. TAME: they are finite and rounded by chance.
template <int VEC, bool TAME = false>
__device__ __forceinline__ void store_codes(u8* p, u32 column, const float (&x)[VEC], const Step& step, u64 row_noise) {
#if ELEM == F32
    write_once<VEC>((float*)p, x);
#else
    u32 below[VEC];
    if (TAME || step.stochastic) {
        // Up by chance. Four neighbours share 64 random bits: core's `Step::noise`.
        const u64 noise = mix(row_noise + column / 4) >> (VEC == 4 ? 0 : 16 * (column % 4));
#pragma unroll
        for (int i = 0; i < VEC; i++) below[i] = (u32)(noise >> (16 * i)) & 0xffffu;
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i++) below[i] = half_below(x[i]);
    }
    write_bf16<VEC, TAME>((u16*)p, x, below);
#endif
}

// Plain loads and stores, where a kernel reads what it or another one wrote.
template <int VEC> __device__ __forceinline__ void load_plain(const float* p, bool aligned, float (&x)[VEC]) {
    if (VEC == 4 && aligned) {
        const float4 v = *(const float4*)p;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = p[i];
    }
}

// Where a thread is in a row: its codes and its state there, and its column.
struct Place {
    u8* codes;
    float* state;
    u32 column;

    __device__ __forceinline__ Place(const Rows& table, u32 id, u32 column)
        : codes(table.codes + ((u64)id * table.dim + column) * SIZE),
          state(table.state + (u64)id * table.state_len + (STATES ? column : 0)), column(column) {}
    __device__ __forceinline__ void advance(u32 columns) {
        codes += columns * SIZE, column += columns;
        if (STATES) state += columns;
    }
};

// Values and state of VEC columns of a row, `at` columns behind a place, as they are read and written.
template <int VEC> struct Columns {
    Raw<VEC * SIZE> codes;
    float x[VEC];
    float first[VEC];
    float second[VEC];

    __device__ __forceinline__ void load(const Rows& table, const Place& place, u32 at) {
        codes = load_codes<VEC>(place.codes + at * SIZE);
        if (STATES >= 1) load_plain<VEC>(place.state + at, !ROWWISE, first);
        if (STATES >= 2) load_plain<VEC>(place.state + at + table.dim, !ROWWISE, second);
    }
    __device__ __forceinline__ void change(const float (&g)[VEC], const Step& step, float row_rate) {
        decode<ELEM, VEC>(codes, x);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
#if RULE == SGD
            x[i] -= step.rate * g[i];
#elif RULE == ADAGRAD
            first[i] += g[i] * g[i];
            x[i] -= step.rate * g[i] / (sqrtf(first[i]) + step.eps);
#elif RULE == ROWWISE_ADAGRAD
            x[i] -= row_rate * g[i];
#elif RULE == ADAM
            first[i] = step.beta1 * first[i] + step.one_less_beta1 * g[i];
            second[i] = step.beta2 * second[i] + step.one_less_beta2 * (g[i] * g[i]);
            x[i] -= step.rate * first[i] / (sqrtf(second[i]) + step.eps);
#else
            first[i] = step.beta1 * first[i] + step.one_less_beta1 * g[i];
            x[i] -= row_rate * first[i];
#endif
        }
    }
    template <bool TAME>
    __device__ __forceinline__ void store(const Rows& table, const Place& place, u32 at, const Step& step,
                                          u64 row_noise) const {
        store_codes<VEC, TAME>(place.codes + at * SIZE, place.column + at, x, step, row_noise);
        if (STATES >= 1) write_floats<VEC>(place.state + at, !ROWWISE, first);
        if (STATES >= 2) write_floats<VEC>(place.state + at + table.dim, true, second);
    }
};

// The dots of a row and the sources of its entries, over the columns of a warp's span: lane l has that of entry l. `pieces` are
// the first of the row, `place` where it begins.
template <int VEC, int N> struct Dots {
    static constexpr bool WANTED = true;
    static constexpr int HELD = N;
    const Columns<VEC>* pieces;
    Place place;
    float mine;
    // Zeros, until a code is infinite or NaN.
    u32 odd;
    // Pieces that are not held, on their way; the piece that is multiplied next.
    Raw<VEC * SIZE> ahead[4];
    float values[VEC];
    // Whether the lane has columns of the row there.
    bool inside;

    // Asks for piece `g` of those from number `piece` on, at `column`, if it is `wanted`.
    __device__ __forceinline__ void load(int piece, int g, u32 column, bool wanted) {
        if (piece + g < N) return;
        if (wanted) ahead[g] = load_codes<VEC, true>(place.codes + (column - place.column) * SIZE);
        else ahead[g] = {};
        inside = wanted;
    }
    __device__ __forceinline__ void take(int piece, int g) {
        const Raw<VEC * SIZE> raw = piece + g < N ? pieces[piece + g < N ? piece + g : 0].codes : ahead[g];
        decode<ELEM, VEC>(raw, values);
#if ELEM == BF16
        // Two codes at once.
#pragma unroll
        for (int i = 0; i < (VEC + 1) / 2; i++) asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(odd) : "r"(raw.w[i]), "r"(0u));
#endif
    }
    __device__ __forceinline__ void multiply(const Source<VEC>& x, float& part) const {
#pragma unroll
        for (int i = 0; i < VEC; i++) part = fmaf(x[i], values[i], part);
    }
    // The sources of the entries from `first` on.
    template <int COUNT> __device__ __forceinline__ void multiply_all(u32 first, const Source<VEC> (&x)[COUNT]) {
        static_assert(COUNT <= 4, "a part for each entry");
        float parts[4] = {};
#pragma unroll
        for (int a = 0; a < COUNT; a++) {
            if (inside) multiply(x[a], parts[a]);
        }
        add(first, parts);
    }
    // Adds parts of the entries from `first` on.
    template <int COUNT> __device__ __forceinline__ void add(u32 first, float (&parts)[COUNT]) {
        const float sum = team_sums<COUNT>(parts, 32).sum;
        const u32 at = threadIdx.x % 32 - first;
        const float of_mine = __shfl_sync(FULL, sum, at % COUNT * (32 / COUNT));
        if (at < COUNT) mine += of_mine;
    }
    // Whether the row was finite, as far as the lane saw.
    __device__ __forceinline__ bool finite() const { return (odd & 0x7fff7fffu) == 0u; }

    // Writes those of the lane's entry. The whole block calls it, with a float of shared memory for each of its threads if
    // it is of several warps.
    __device__ __forceinline__ void write(const Gradient& gradient, u32 len, u32 entry, float* parts, float* out) const {
        float sum = mine;
        if (blockDim.x > 32) {
            __syncthreads();
            parts[threadIdx.x] = mine;
            __syncthreads();
            if (threadIdx.x >= 32) return;
            sum = 0.0f;
            for (u32 at = threadIdx.x; at < blockDim.x; at += 32) sum += parts[at];
        }
        if (threadIdx.x < len && entry < gradient.len) out[entry] = sum;
    }
};

#if ROWWISE
// The rate of a row, from the mean square of its gradient; its state is brought up to date. `tame` if no product of the rate
// and a value of the gradient reaches 1e36: no value is greater than the root of dim times the mean. Called by a whole warp.
__device__ __forceinline__ float row_rate(const float* grad, u32 dim, float* state, const Step& step, bool& tame) {
    const u32 lane = threadIdx.x % 32;
    float sum = 0.0f;
    const float old = *state;
    if (lane < 16) {
        const float* g = grad + lane;
        u32 left = (dim + 15 - lane) / 16;
#pragma unroll 1
        for (; left >= 8; left -= 8, g += 128) {
            float x[8];
#pragma unroll
            for (int k = 0; k < 8; k++) x[k] = g[16 * k];
#pragma unroll
            for (int k = 0; k < 8; k++) sum += x[k] * x[k];
        }
#pragma unroll 1
        for (; left > 0; left--, g += 16) sum += *g * *g;
    }
    float lanes[16], mean = 0.0f;
#pragma unroll
    for (int l = 0; l < 16; l++) lanes[l] = __shfl_sync(FULL, sum, l);
#pragma unroll
    for (int l = 0; l < 16; l++) mean += lanes[l];
    mean = mean / (float)dim;
    const float total = RULE == ROWWISE_ADAGRAD ? old + mean : step.beta2 * old + step.one_less_beta2 * mean;
    __syncwarp();
    if (lane == 0) *state = total;
    const float rate = step.rate / (sqrtf(total) + step.eps);
    tame = RULE == ROWWISE_ADAGRAD && mean < 1e30f && fabsf(rate) < 1e15f;
    return rate;
}
#endif

// Asks for `bytes` from `p` on to come nearer: lines of 128 bytes, one for each thread in turn.
__device__ __forceinline__ void fetch_ahead(const void* p, u32 bytes) {
    for (u32 at = threadIdx.x * 128; at < bytes; at += blockDim.x * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)p + at));
}

// Changes row `id` by the gradient that `gradient(dots, out)` hands out, column by column. It is given what finds the dots with
// this row, and says whether the lane saw a finite row. The whole block calls it.
template <int VEC, bool DOTS = false, class G>
__device__ __forceinline__ void change_row(const Rows& table, const Step& step, u32 id, float* shared, const G& gradient) {
    const auto noise = [&] {
        return step.stochastic ? mix(step.seed ^ (step.count + (table.names ? table.names[id] : id))) : 0;
    };
#if ROWWISE
    __shared__ float rate;
    __shared__ bool bounded;
    // The row is far away: its first pieces are on their way while its gradient is summed and its rate found, the next
    // while these change.
    const Span span = warp_span<VEC>(table.dim);
    Place place(table, id, span.from + threadIdx.x % 32 * VEC);
    Columns<VEC> pieces[PIECES];
    const auto load = [&](u32 ahead) {
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            if (place.column + ahead + p * 32 * VEC < span.to) pieces[p].load(table, place, ahead + p * 32 * VEC);
            else pieces[p] = {};
        }
    };
    load(0);
    Dots<VEC, PIECES> dots = {pieces, place, 0.0f, 0u};
    const bool finite = gradient(dots, [&](u32 column, float(&g)[VEC]) {
#pragma unroll
        for (int i = 0; i < VEC; i++) g[i] *= step.grad_scale;
        write_floats<VEC>(shared + column, true, g);
    });
    __syncthreads();
    if (threadIdx.x < 32) {
        float* state = table.state + (u64)id * table.state_len + (RULE == ROWWISE_ADAM ? table.dim : 0);
        bool tame;
        const float r = row_rate(shared, table.dim, state, step, tame);
        if (threadIdx.x == 0) rate = r, bounded = tame;
    }
    __syncthreads();
    const float common = rate;
    const u64 row_noise = noise();
    const float* grad = shared + place.column;
    // Finite values less what is far from the greatest float stay finite: no value need be looked at.
    const bool tame = DOTS && bounded && step.stochastic && __all_sync(FULL, finite);
    u32 first = span.from;
#pragma unroll 1
    while (place.column < span.to) {
        Columns<VEC> now[PIECES];
#pragma unroll
        for (int p = 0; p < PIECES; p++) now[p] = pieces[p];
        load(PIECES * 32 * VEC);
        first += PIECES * 32 * VEC;
        if (tame && first <= span.to) {
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                float g[VEC];
                load_plain<VEC>(grad + p * 32 * VEC, true, g);
                now[p].change(g, step, common);
                now[p].template store<true>(table, place, p * 32 * VEC, step, row_noise);
            }
        } else {
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                if (place.column + p * 32 * VEC < span.to) {
                    float g[VEC];
                    load_plain<VEC>(grad + p * 32 * VEC, true, g);
                    now[p].change(g, step, common);
                    now[p].template store<false>(table, place, p * 32 * VEC, step, row_noise);
                }
            }
        }
        place.advance(PIECES * 32 * VEC);
        grad += PIECES * 32 * VEC;
    }
#else
    const Place place(table, id, 0);
    // The row and its state come nearer while the gradient is summed.
    fetch_ahead(place.codes, table.dim * SIZE);
    fetch_ahead(place.state, table.state_len * 4);
    const u64 row_noise = noise();
    Dots<VEC, 0> dots = {nullptr, place, 0.0f, 0u};
    gradient(dots, [&](u32 column, float(&g)[VEC]) {
        Columns<VEC> columns;
        columns.load(table, place, column);
#pragma unroll
        for (int i = 0; i < VEC; i++) g[i] *= step.grad_scale;
        columns.change(g, step, 0.0f);
        columns.template store<false>(table, place, column, step, row_noise);
    });
#endif
}

// Comes before a gradient that is handed out by columns of the whole block: of the row before, warps may still be reading
// their spans.
__device__ __forceinline__ void settle() {
#if ROWWISE
    __syncthreads();
#endif
}

// Whether the flag is up: the same answer for the whole block, which the barriers behind it need.
__device__ __forceinline__ bool stopped(const u32* flag) { return __syncthreads_or(threadIdx.x == 0 && flagged(flag)); }

__device__ __forceinline__ bool no_row(u32 id, const Rows& table, u32* flag, u32 op) {
    if (id < table.rows) return false;
    if (threadIdx.x == 0) raise_flag(flag, op, id, table.rows);
    return true;
}

// A gradient that is there, by the whole block.
template <int VEC, class Out>
__device__ __forceinline__ void read_gradient(const float* grad, u32 dim, const Out& out) {
#pragma unroll 4
    for (u32 column = threadIdx.x * VEC; column < dim; column += blockDim.x * VEC) {
        float g[VEC];
        read_floats<VEC>(grad + column, true, g);
        out(column, g);
    }
}

// By gradients that are there, `[limit, dim]`.
template <int VEC>
__device__ __forceinline__ void update(const Rows& table, const Step& step, const Plan& plan, const float* grads,
                                       u64 limit, float* shared, u32* flag, u32 op) {
    if (stopped(flag)) return;
    const u32 unique = plan.count();
    for (u32 u = blockIdx.x; u < unique; u += gridDim.x) {
        const u32 id = __ldg(plan.rows + u);
        if (no_row(id, table, flag, op)) continue;
        if (u >= limit) {
            if (threadIdx.x == 0) raise_flag(flag, op, u, limit);
            continue;
        }
        change_row<VEC>(table, step, id, shared, [&](auto&, const auto& out) {
            settle();
            read_gradient<VEC>(grads + (u64)u * table.dim, table.dim, out);
            return false;
        });
    }
}

// The dots of a row and the sources of its entries from `start` to `end`, DOTS of them at once a warp of `warps`, of which
// this is number `warp`.
template <int VEC, int DOTS>
__device__ __forceinline__ void dot_row(const Rows& table, u32 id, const Plan& plan, const Gradient& gradient, u32 start,
                                        u32 end, u32 warp, u32 warps, float* dots) {
    const u32 lane = threadIdx.x % 32;
    const Place place(table, id, 0);
    for (u32 first = start + warp * DOTS; first < end; first += warps * DOTS) {
        const u32 at = first + lane;
        const u32 entry = lane < DOTS && at < end ? __ldg(plan.entries + at) : FULL;
        u32 source;
        float weight;
        gradient.weigh(entry, source, weight);
        const u8* p[DOTS];
        float sums[DOTS] = {};
#pragma unroll
        for (int k = 0; k < DOTS; k++) p[k] = gradient.place(__shfl_sync(FULL, source, k), 0);
#pragma unroll 1
        for (u32 column = lane * VEC; column < table.dim; column += 32 * VEC) {
            Source<VEC> x[DOTS];
            float values[VEC];
            decode<ELEM, VEC>(load_codes<VEC, true>(place.codes + column * SIZE), values);
#pragma unroll
            for (int k = 0; k < DOTS; k++) x[k].load(p[k] + column * SOURCE_SIZE, true);
#pragma unroll
            for (int k = 0; k < DOTS; k++) {
#pragma unroll
                for (int i = 0; i < VEC; i++) sums[k] = fmaf(x[k][i], values[i], sums[k]);
            }
        }
        const float sum = team_sums<DOTS>(sums, 32).sum;
        const u32 of = __shfl_sync(FULL, entry, lane / (32 / DOTS));
        if (lane % (32 / DOTS) == 0 && of < gradient.len) dots[of] = sum;
    }
}

// Blocks that share one of the longest rows.
#define DOT_PARTS 32

// The dots of the rows of both lists, the longest in parts.
template <int VEC>
__device__ __forceinline__ void dot_rows(const Rows& table, const Plan& plan, const Gradient& gradient, const Lists& lists,
                                         float* dots, u32* flag) {
    if (stopped(flag)) return;
    const u32 parts = lists.longs() * DOT_PARTS, count = parts + lists.middles();
    const u32 warps = blockDim.x / 32, warp = threadIdx.x / 32;
    for (u32 i = blockIdx.x; i < count; i += gridDim.x) {
        const bool part = i < parts;
        const u32 u = part ? lists.long_row(i / DOT_PARTS) : __ldg(lists.middle + (i - parts));
        const u32 id = __ldg(plan.rows + u);
        u32 start, end;
        plan.range(u, start, end);
        dot_row<VEC, 8>(table, id, plan, gradient, start, end, part ? i % DOT_PARTS * warps + warp : warp,
                        part ? DOT_PARTS * warps : warps, dots);
    }
}

// By the sums over the entries of short rows; others go to the lists. DOTS: their dots too. Shared memory: the gradient of a
// row, if its rule needs all of it, and a float a thread for dots.
template <int VEC, bool DOTS>
__device__ __forceinline__ void update_short(const Rows& table, const Step& step, const Plan& plan,
                                             const Gradient& gradient, const Lists& lists, float* dots, float* shared,
                                             u32* flag, u32 op) {
    __shared__ u32 share;
    if (stopped(flag)) return;
    const u32 unique = plan.count();
    const Span span = warp_span<VEC>(table.dim);
    Walk at;
    at.begin(plan, gradient, unique);
    u32 id = at.u < unique ? __ldg(plan.rows + at.u) : 0u;
    while (at.u < unique) {
        at.look_ahead(plan, gradient, unique);
        const u32 next = at.u + gridDim.x, next_id = next < unique ? __ldg(plan.rows + next) : 0u;
        if (!no_row(id, table, flag, op) && !lists.take(at.u, at.len, &share)) {
            if (DOTS && at.len > SHORT) {
                u32 start, end;
                plan.range(at.u, start, end);
                dot_row<VEC, 1>(table, id, plan, gradient, start, end, threadIdx.x / 32, blockDim.x / 32, dots);
                __syncthreads();
            }
            change_row<VEC, DOTS>(table, step, id, shared, [&](auto& found, const auto& out) {
                if (at.len > SHORT) {
                    settle();
                    gradient.sum_row<VEC, 1>(plan, at.u, out);
                    return false;
                }
                if constexpr (DOTS) {
                    gradient.sum_short<VEC>(at.len, at.row, at.weight, span, out, found);
                    found.write(gradient, at.len, at.held, shared + (ROWWISE ? table.dim : 0), dots);
                    return found.finite();
                } else {
                    NoDots none;
                    gradient.sum_short<VEC>(at.len, at.row, at.weight, span, out, none);
                    return false;
                }
            });
        }
        at.advance();
        id = next_id;
    }
}

// By the sums over the entries of the rows of the first list.
template <int VEC>
__device__ __forceinline__ void update_middle(const Rows& table, const Step& step, const Plan& plan,
                                              const Gradient& gradient, const Lists& lists, float* shared, u32* flag, u32 op) {
    if (stopped(flag)) return;
    for (u32 i = blockIdx.x; i < lists.middles(); i += gridDim.x) {
        const u32 u = __ldg(lists.middle + i);
        change_row<VEC>(table, step, __ldg(plan.rows + u), shared, [&](auto&, const auto& out) {
            settle();
            gradient.sum_row<VEC, 8>(plan, u, out);
            return false;
        });
    }
}

// By the gradients of the longest rows, which `reduce_long` left in slots.
template <int VEC>
__device__ __forceinline__ void update_long(const Rows& table, const Step& step, const Plan& plan, const Lists& lists,
                                            const float* slots, u32 first, float* shared, u32* flag) {
    if (stopped(flag)) return;
    const u32 u = lists.long_row(first + blockIdx.x);
    if (u == FULL) return;
    change_row<VEC>(table, step, __ldg(plan.rows + u), shared, [&](auto&, const auto& out) {
        read_gradient<VEC>(slots + (u64)blockIdx.x * table.dim, table.dim, out);
        return false;
    });
}

#define UPDATES(VEC)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512, 1) update_##VEC(Rows table, Step step, Plan plan,               \
                                                                   const float* grads, u64 limit, u32* flag, u32 op) {\
        extern __shared__ __align__(16) float shared[];                                                               \
        update<VEC>(table, step, plan, grads, limit, shared, flag, op);                                               \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(SHORT_BOUNDS) update_short_##VEC(                                         \
        Rows table, Step step, Plan plan, Gradient gradient, Lists lists, u32* flag, u32 op) {                        \
        extern __shared__ __align__(16) float shared[];                                                               \
        update_short<VEC, false>(table, step, plan, gradient, lists, nullptr, shared, flag, op);                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(DOT_BOUNDS) dot_short_##VEC(                                           \
        Rows table, Step step, Plan plan, Gradient gradient, Lists lists, float* dots, u32* flag, u32 op) {           \
        extern __shared__ __align__(16) float shared[];                                                               \
        update_short<VEC, true>(table, step, plan, gradient, lists, dots, shared, flag, op);                          \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128, 5) dot_rows_##VEC(                                              \
        Rows table, Plan plan, Gradient gradient, Lists lists, float* dots, u32* flag) {                              \
        dot_rows<VEC>(table, plan, gradient, lists, dots, flag);                                                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512, 1) update_middle_##VEC(                                         \
        Rows table, Step step, Plan plan, Gradient gradient, Lists lists, u32* flag, u32 op) {                        \
        extern __shared__ __align__(16) float shared[];                                                               \
        update_middle<VEC>(table, step, plan, gradient, lists, shared, flag, op);                                     \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512, 1) update_long_##VEC(                                           \
        Rows table, Step step, Plan plan, Lists lists, const float* slots, u32 first, u32* flag) {                    \
        extern __shared__ __align__(16) float shared[];                                                               \
        update_long<VEC>(table, step, plan, lists, slots, first, shared, flag);                                       \
    }
UPDATES(1)
UPDATES(4)
