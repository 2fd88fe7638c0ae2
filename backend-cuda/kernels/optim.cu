// Row rules: how touched rows change. RULE says which, ELEM (F32 or BF16) what rows are stored as.
//
// Contract. `table.codes` holds `rows` rows of `dim` codes, `table.state` `state_len` floats a row; `table.names` is null, or
// where the rows lie in a cache the id that each has in its table, by which its noise is drawn. A block changes a row:
// its threads own columns, VEC at a time (4 if codes, state, gradients and sources are aligned to that and VEC divides
// dim). The operations are core's, in their order and unfused, so the bits are the reference's; a mean square is summed in
// 16 lanes, then the lanes in order. Rules that need one take `dim` floats of dynamic shared memory. Compiled behind
// sums.cuh.
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
#if RULE >= ADAM || (RULE == ADAGRAD && ELEM == F32)
#define SHORT_BOUNDS 256, 3
#else
#define SHORT_BOUNDS 256, 4
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

template <int VEC> __device__ __forceinline__ void load_codes(const u8* row, u32 column, float (&x)[VEC]) {
    Raw<VEC * SIZE> raw;
    const u8* p = row + (u64)column * SIZE;
    if constexpr (VEC * SIZE == 16) {
        const uint4 v = __ldcs((const uint4*)p);
        raw.w[0] = v.x, raw.w[1] = v.y, raw.w[2] = v.z, raw.w[3] = v.w;
    } else if constexpr (VEC * SIZE == 8) {
        const uint2 v = __ldcs((const uint2*)p);
        raw.w[0] = v.x, raw.w[1] = v.y;
    } else if constexpr (VEC * SIZE == 4) {
        raw.w[0] = *(const u32*)p;
    } else {
        raw.w[0] = *(const u16*)p;
    }
    decode<ELEM, VEC>(raw, x);
}

// The upper half of a float, by what is added below the cut: it carries as it must, up to infinity. NaN stays NaN.
__device__ __forceinline__ u32 round_up(u32 bits, u32 below) {
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits << 9 ? bits | 0x400000u : bits;
    return bits + below;
}

template <int VEC>
__device__ __forceinline__ void store_codes(u8* row, u32 column, const float (&x)[VEC], const Step& step, u64 row_noise) {
#if ELEM == F32
    write_once<VEC>((float*)row + column, x);
#else
    u32 c[VEC];
    if (step.stochastic) {
        // Up by chance. Four neighbours share 64 random bits: core's `Step::noise`.
        const u64 noise = mix(row_noise + column / 4) >> (16 * (column % 4));
#pragma unroll
        for (int i = 0; i < VEC; i++) c[i] = round_up(__float_as_uint(x[i]), (u32)(noise >> (16 * i)) & 0xffffu);
    } else {
        // To nearest, ties to even.
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const u32 bits = __float_as_uint(x[i]);
            c[i] = round_up(bits, 0x7fffu + (bits >> 16 & 1u));
        }
    }
    if constexpr (VEC == 4) {
        __stcs((uint2*)((u16*)row + column), make_uint2(__byte_perm(c[0], c[1], 0x7632), __byte_perm(c[2], c[3], 0x7632)));
    } else {
        ((u16*)row)[column] = (u16)(c[0] >> 16);
    }
#endif
}

// The state is a row's own: plain loads, for other kernels wrote it.
template <int VEC> __device__ __forceinline__ void load_state(const float* p, float (&x)[VEC]) {
    if constexpr (VEC == 4 && !ROWWISE) {
        const float4 v = *(const float4*)p;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = p[i];
    }
}

// Values and state of VEC columns of a row, as they are read and written.
template <int VEC> struct Columns {
    float x[VEC];
    float first[VEC];
    float second[VEC];

    __device__ __forceinline__ void load(const Rows& table, const u8* row, const float* state, u32 column) {
        load_codes<VEC>(row, column, x);
        if (STATES >= 1) load_state<VEC>(state + column, first);
        if (STATES >= 2) load_state<VEC>(state + table.dim + column, second);
    }
    __device__ __forceinline__ void change(const float (&g)[VEC], const Step& step, float row_rate) {
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
    __device__ __forceinline__ void store(const Rows& table, u8* row, float* state, u32 column, const Step& step,
                                          u64 row_noise) const {
        store_codes<VEC>(row, column, x, step, row_noise);
        if (STATES >= 1) write_floats<VEC>(state + column, !ROWWISE, first);
        if (STATES >= 2) write_floats<VEC>(state + table.dim + column, true, second);
    }
};

#if ROWWISE
// The rate of a row, from the mean square of its gradient; its state is brought up to date. Called by a whole warp.
__device__ __forceinline__ float row_rate(const float* grad, u32 dim, float* state, const Step& step) {
    const u32 lane = threadIdx.x % 32;
    float sum = 0.0f;
    const float* state_at = RULE == ROWWISE_ADAGRAD ? state : state + dim;
    const float old = *state_at;
    if (lane < 16) {
        u32 i = lane;
        for (; i + 112 < dim; i += 128) {
            float g[8];
#pragma unroll
            for (int k = 0; k < 8; k++) g[k] = grad[i + 16 * k];
#pragma unroll
            for (int k = 0; k < 8; k++) sum += g[k] * g[k];
        }
        for (; i < dim; i += 16) sum += grad[i] * grad[i];
    }
    float lanes[16], mean = 0.0f;
#pragma unroll
    for (int l = 0; l < 16; l++) lanes[l] = __shfl_sync(FULL, sum, l);
#pragma unroll
    for (int l = 0; l < 16; l++) mean += lanes[l];
    mean = mean / (float)dim;
    const float total = RULE == ROWWISE_ADAGRAD ? old + mean : step.beta2 * old + step.one_less_beta2 * mean;
    __syncwarp();
    if (lane == 0) *(float*)state_at = total;
    return step.rate / (sqrtf(total) + step.eps);
}
#endif

// Changes row `id` by the gradient that `gradient(out)` hands out, column by column. The whole block calls it.
template <int VEC, class G>
__device__ __forceinline__ void change_row(const Rows& table, const Step& step, u32 id, float* shared, const G& gradient) {
    u8* row = table.codes + (u64)id * table.dim * SIZE;
    float* state = table.state + (u64)id * table.state_len;
    const u64 row_noise = step.stochastic ? mix(step.seed ^ (step.count + (table.names ? table.names[id] : id))) : 0;
#if ROWWISE
    __shared__ float rate;
    gradient([&](u32 column, float(&g)[VEC]) {
#pragma unroll
        for (int i = 0; i < VEC; i++) g[i] *= step.grad_scale;
        write_floats<VEC>(shared + column, true, g);
    });
    __syncthreads();
    if (threadIdx.x < 32) {
        const float r = row_rate(shared, table.dim, state, step);
        if (threadIdx.x == 0) rate = r;
    }
    __syncthreads();
    const float common = rate;
#pragma unroll 4
    for (u32 column = threadIdx.x * VEC; column < table.dim; column += blockDim.x * VEC) {
        float g[VEC];
        Columns<VEC> columns;
        columns.load(table, row, state, column);
#pragma unroll
        for (int i = 0; i < VEC; i++) g[i] = shared[column + i];
        columns.change(g, step, common);
        columns.store(table, row, state, column, step, row_noise);
    }
#else
    gradient([&](u32 column, float(&g)[VEC]) {
        Columns<VEC> columns;
        columns.load(table, row, state, column);
#pragma unroll
        for (int i = 0; i < VEC; i++) g[i] *= step.grad_scale;
        columns.change(g, step, 0.0f);
        columns.store(table, row, state, column, step, row_noise);
    });
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
        change_row<VEC>(table, step, id, shared, [&](const auto& out) {
            read_gradient<VEC>(grads + (u64)u * table.dim, table.dim, out);
        });
    }
}

// By the sums over the entries of short rows; others go to the lists.
template <int VEC>
__device__ __forceinline__ void update_short(const Rows& table, const Step& step, const Plan& plan,
                                             const Gradient& gradient, const Lists& lists, float* shared, u32* flag, u32 op) {
    __shared__ u32 share;
    if (stopped(flag)) return;
    const u32 unique = plan.count();
    Walk at;
    at.begin(plan, gradient, unique);
    u32 id = at.u < unique ? __ldg(plan.rows + at.u) : 0u;
    u32 next_id = at.u + gridDim.x < unique ? __ldg(plan.rows + at.u + gridDim.x) : 0u;
    while (at.u < unique) {
        at.look_ahead(plan, gradient, unique);
        // The next row and its state are asked for early, for they are far away.
        if (next_id < table.rows) {
            fetch_ahead(table.codes + (u64)next_id * table.dim * SIZE, table.dim * SIZE);
            fetch_ahead(table.state + (u64)next_id * table.state_len, table.state_len * 4);
        }
        const u64 last = (u64)at.u + 2 * gridDim.x;
        const u32 last_id = last < unique ? __ldg(plan.rows + last) : 0u;
        if (!no_row(id, table, flag, op) && !lists.take(at.u, at.end - at.start, &share)) {
            change_row<VEC>(table, step, id, shared, [&](const auto& out) {
                gradient.sum_short<VEC>(plan, at.start, at.end, at.row, at.weight, out);
            });
        }
        at.advance();
        id = next_id, next_id = last_id;
    }
}

// By the sums over the entries of the rows of the first list.
template <int VEC>
__device__ __forceinline__ void update_middle(const Rows& table, const Step& step, const Plan& plan,
                                              const Gradient& gradient, const Lists& lists, float* shared, u32* flag, u32 op) {
    if (stopped(flag)) return;
    for (u32 i = blockIdx.x; i < lists.middles(); i += gridDim.x) {
        const u32 u = __ldg(lists.middle + i);
        u32 start, end;
        plan.range(u, start, end);
        change_row<VEC>(table, step, __ldg(plan.rows + u), shared, [&](const auto& out) {
            gradient.sum_row<VEC, 8>(plan, start, end, out);
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
    change_row<VEC>(table, step, __ldg(plan.rows + u), shared, [&](const auto& out) {
        read_gradient<VEC>(slots + (u64)blockIdx.x * table.dim, table.dim, out);
    });
}

#define UPDATES(VEC)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) update_##VEC(Rows table, Step step, Plan plan,                  \
                                                                   const float* grads, u64 limit, u32* flag, u32 op) {\
        extern __shared__ __align__(16) float shared[];                                                               \
        update<VEC>(table, step, plan, grads, limit, shared, flag, op);                                               \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(SHORT_BOUNDS) update_short_##VEC(                                         \
        Rows table, Step step, Plan plan, Gradient gradient, Lists lists, u32* flag, u32 op) {                        \
        extern __shared__ __align__(16) float shared[];                                                               \
        update_short<VEC>(table, step, plan, gradient, lists, shared, flag, op);                                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512) update_middle_##VEC(                                            \
        Rows table, Step step, Plan plan, Gradient gradient, Lists lists, u32* flag, u32 op) {                        \
        extern __shared__ __align__(16) float shared[];                                                               \
        update_middle<VEC>(table, step, plan, gradient, lists, shared, flag, op);                                     \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512) update_long_##VEC(                                              \
        Rows table, Step step, Plan plan, Lists lists, const float* slots, u32 first, u32* flag) {                    \
        extern __shared__ __align__(16) float shared[];                                                               \
        update_long<VEC>(table, step, plan, lists, slots, first, shared, flag);                                       \
    }
UPDATES(1)
UPDATES(4)
