// Embedding bags: weighted sums of rows, and dots of rows with a vector.
//
// Contract. `table` holds `rows` rows (at least one) of `dim` codes of format ELEM, one after the other; `scales` is null
// or holds ceil(dim / group) floats a row. `ids` and `weights` are `[tokens, bag]`. A team of `team` lanes (a power of
// two, at most 32) works on one token; a lane reads NV neighbouring codes at once, so NV divides `dim` and `group`, and
// table and rows are aligned to NV * SIZE bytes. `aligned` says whether `out` (`vectors`) and its rows are aligned to 16
// bytes. An id that is no row raises the flag and reads the last row instead: the output of that bag then means nothing.
//
// bag_sum is a vertical sum: products, then sums, unfused, in order of the bag, from zero. A lane owns its columns, so
// neither the team's size nor NV changes a bit. Bytes decide: every row is read once with the widest loads, and UNROLL
// rows are in flight while the ids of the next ones already arrive.

template <int NV, int UNROLL>
__device__ __forceinline__ void sum_rows(
    const u8* __restrict__ table, const float* __restrict__ scales, u64 rows, u32 dim, u32 group,
    const u32* __restrict__ ids, const float* __restrict__ weights, float* __restrict__ out, u32 bag, u32 tokens,
    u32 accumulate, u32 team, u32 aligned, u32* flag, u32 op) {
    const u32 slices = (dim + team * NV - 1) / (team * NV);
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 task = thread / team;
    const u64 token = task / slices;
    const u32 column = ((u32)(task % slices) * team + (u32)(thread % team)) * NV;
    if (token >= tokens || column >= dim) return;
    ids += token * bag;
    weights += token * bag;
    const u8* codes = table + (u64)column * SIZE;
    const u64 stride = (u64)dim * SIZE;
    const u32 groups = scales ? (dim + group - 1) / group : 0;
    const float* scale = scales ? scales + column / group : nullptr;

    const u32 last = (u32)(rows - 1);
    u32 greatest = 0;
    float sum[NV];
#pragma unroll
    for (int i = 0; i < NV; i++) sum[i] = 0.0f;
    u32 next_id[UNROLL];
    float next_weight[UNROLL];
#pragma unroll
    for (int r = 0; r < UNROLL; r++) {
        next_id[r] = r < bag ? __ldg(ids + r) : 0u;
        next_weight[r] = r < bag ? __ldg(weights + r) : 0.0f;
    }
    u32 l = 0;
    for (; l + UNROLL <= bag; l += UNROLL) {
        Raw<NV * SIZE> raw[UNROLL];
        float w[UNROLL];
#pragma unroll
        for (int r = 0; r < UNROLL; r++) {
            greatest = max(greatest, next_id[r]);
            const u32 id = min(next_id[r], last);
            raw[r] = load_once<NV * SIZE>(codes + id * stride);
            w[r] = next_weight[r];
            if (scales) w[r] *= __ldg(scale + (u64)id * groups);
        }
#pragma unroll
        for (int r = 0; r < UNROLL; r++) {
            const u32 at = l + UNROLL + r;
            next_id[r] = at < bag ? __ldg(ids + at) : 0u;
            next_weight[r] = at < bag ? __ldg(weights + at) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < UNROLL; r++) {
            float x[NV];
            decode<ELEM, NV>(raw[r], x);
#pragma unroll
            for (int i = 0; i < NV; i++) sum[i] += w[r] * x[i];
        }
    }
    // What is left is less than UNROLL rows, whose ids are here already.
#pragma unroll
    for (int r = 0; r < UNROLL - 1; r++) {
        if (l + r < bag) {
            greatest = max(greatest, next_id[r]);
            const u32 id = min(next_id[r], last);
            float w = next_weight[r], x[NV];
            if (scales) w *= __ldg(scale + (u64)id * groups);
            decode<ELEM, NV>(load_once<NV * SIZE>(codes + id * stride), x);
#pragma unroll
            for (int i = 0; i < NV; i++) sum[i] += w * x[i];
        }
    }
    if (greatest > last) raise_flag(flag, op, greatest, rows);
    out += token * dim + column;
    if (accumulate) {
#pragma unroll
        for (int i = 0; i < NV; i++) sum[i] = out[i] + sum[i];
    }
    write_floats<NV>(out, aligned, sum);
}

// A team's task is ROWS rows of one bag. The dot is a horizontal sum: fused, and reduced over the team in a fixed order.
template <int NV, int ROWS>
__device__ __forceinline__ void dot_rows(
    const u8* __restrict__ table, const float* __restrict__ scales, u64 rows, u32 dim, u32 group,
    const u32* __restrict__ ids, const float* __restrict__ vectors, float* __restrict__ out, u32 bag, u32 tokens,
    u32 team, u32 aligned, u32* flag, u32 op) {
    const u32 tasks = (bag + ROWS - 1) / ROWS;
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 task = thread / team;
    const u32 lane = (u32)(thread % team);
    // Teams behind the last stay for the shuffles, and do the last one's work again without writing it.
    const bool real = task < (u64)tokens * tasks;
    const u64 token = real ? task / tasks : tokens - 1;
    const u32 first = (real ? (u32)(task % tasks) : tasks - 1) * ROWS;
    const u64 stride = (u64)dim * SIZE;
    const u32 groups = scales ? (dim + group - 1) / group : 0;
    const float* vector = vectors + token * dim;
    const u8* codes[ROWS];
    const float* scale[ROWS];
    float dot[ROWS];
    const u32 last = (u32)(rows - 1);
    u32 greatest = 0;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const u32 wanted = first + r < bag ? __ldg(ids + token * bag + first + r) : 0u;
        greatest = max(greatest, wanted);
        const u32 id = min(wanted, last);
        codes[r] = table + id * stride;
        scale[r] = scales + (u64)id * groups;
        dot[r] = 0.0f;
    }
    if (greatest > last && lane == 0) raise_flag(flag, op, greatest, rows);
#pragma unroll 2
    for (u32 column = lane * NV; column < dim; column += team * NV) {
        Raw<NV * SIZE> raw[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) raw[r] = load_once<NV * SIZE>(codes[r] + (u64)column * SIZE);
        float v[NV];
        read_floats<NV>(vector + column, aligned, v);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x[NV], part = 0.0f;
            decode<ELEM, NV>(raw[r], x);
#pragma unroll
            for (int i = 0; i < NV; i++) part = fmaf(v[i], x[i], part);
            dot[r] = groups > 1 ? fmaf(__ldg(scale[r] + column / group), part, dot[r]) : dot[r] + part;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        for (u32 o = team / 2; o > 0; o >>= 1) dot[r] += __shfl_xor_sync(FULL, dot[r], o);
        if (real && lane == 0 && first + r < bag)
            out[token * bag + first + r] = groups == 1 ? __ldg(scale[r]) * dot[r] : dot[r];
    }
}

#define BAG(NV, UNROLL)                                                                                               \
    extern "C" __global__ void __launch_bounds__(128) bag_sum_##NV(                                                  \
        const u8* table, const float* scales, u64 rows, u32 dim, u32 group, const u32* ids, const float* weights,     \
        float* out, u32 bag, u32 tokens, u32 accumulate, u32 team, u32 aligned, u32* flag, u32 op) {                  \
        sum_rows<NV, UNROLL>(table, scales, rows, dim, group, ids, weights, out, bag, tokens, accumulate, team,       \
                             aligned, flag, op);                                                                     \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) bag_dot_##NV(                                                  \
        const u8* table, const float* scales, u64 rows, u32 dim, u32 group, const u32* ids, const float* vectors,     \
        float* out, u32 bag, u32 tokens, u32 team, u32 aligned, u32* flag, u32 op) {                                  \
        dot_rows<NV, 4>(table, scales, rows, dim, group, ids, vectors, out, bag, tokens, team, aligned, flag, op);    \
    }

// Narrow loads come with more of them in flight.
BAG(1, 16)
#if SIZE == 4
BAG(2, 16)
BAG(4, 8)
#elif SIZE == 2
BAG(2, 16)
BAG(4, 12)
BAG(8, 8)
#else
BAG(2, 16)
BAG(4, 16)
BAG(8, 8)
BAG(16, 8)
#endif
