// Embedding bags: weighted sums of rows, and dots of rows with a vector.
//
// Contract. `table` holds `rows` rows (at least one) of `dim` codes of format ELEM, `stride` codes apart; `scales` is null
// or holds ceil(dim / group) floats a row. `ids` and `weights` are `[tokens, bag]`. A team of `team` lanes (8, 16 or
// 32, and 32 for bag_sum_few) works on one token; a lane reads NV neighbouring codes at once, so NV divides `dim` and `group`, and
// table and rows are aligned to NV * SIZE bytes. `aligned` says whether `out` (`vectors`) and its rows are aligned to 16
// bytes. An id that is no row raises the flag and reads the last row instead: the output of that bag then means nothing.
//
// bag_sum is a vertical sum: products, then sums, unfused, in order of the bag, from zero. A lane owns its columns, so
// neither the team's size nor NV changes a bit. Bytes decide: every row is read once with the widest loads, and UNROLL
// rows are in flight while the ids of the next ones already arrive. Where loads are of 16 bytes, the warps of a block, which
// read parts of a wide row, keep together, by the first-level cache: a row that is asked for at once costs memory less.

template <int NV> __device__ __forceinline__ Raw<NV * SIZE> load_row(const u8* p) {
    if constexpr (NV * SIZE == 16) return load_beside(p);
    else return load_once<NV * SIZE>(p);
}

template <int NV, int UNROLL>
__device__ __forceinline__ void sum_rows(
    const u8* __restrict__ table, const float* __restrict__ scales, u64 rows, u32 dim, u32 stride, u32 group,
    const u32* __restrict__ ids, const float* __restrict__ weights, float* __restrict__ out, u32 bag, u32 tokens,
    u32 accumulate, u32 team, u32 aligned, u32* flag, u32 op) {
    const u32 slices = (dim + team * NV - 1) / (team * NV);
    const u64 task = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / team;
    const u32 lane = threadIdx.x % team;
    const u64 token = task / slices;
    const u32 column = ((u32)(task % slices) * team + lane) * NV;
    // Lanes without columns stay, for lanes of a warp fetch ids for each other.
    const bool real = token < tokens, mine = real && column < dim;
    ids += real ? token * bag : 0;
    weights += real ? token * bag : 0;
    const u8* codes = table + (mine ? (u64)column * SIZE : 0);
    const u64 pitch = (u64)stride * SIZE;
    const u32 groups = scales ? (dim + group - 1) / group : 0;
    const float* scale = scales ? scales + (mine ? column / group : 0) : nullptr;
    const u32 last = (u32)(rows - 1);
    u32 greatest = 0;

    float sum[NV];
#pragma unroll
    for (int i = 0; i < NV; i++) sum[i] = 0.0f;
    u32 next_id = lane < bag ? __ldg(ids + lane) : 0u;
    float next_weight = lane < bag ? __ldg(weights + lane) : 0.0f;
    for (u32 base = 0; base < bag; base += team) {
        // A lane looks at its id once, and folds its row's one scale into the weight.
        greatest = max(greatest, next_id);
        const u32 id = min(next_id, last);
        float weight = next_weight;
        if (groups == 1) weight *= __ldg(scales + id);
        const u32 at = base + team + lane;
        next_id = at < bag ? __ldg(ids + at) : 0u;
        next_weight = at < bag ? __ldg(weights + at) : 0.0f;
        const u32 count = min(team, bag - base);
        u32 l = 0;
        for (; l + UNROLL <= count && groups <= 1; l += UNROLL) {
            // All warps come by here as often: bags are equally long.
            if (NV * SIZE == 16) __syncthreads();
            Raw<NV * SIZE> raw[UNROLL];
            float w[UNROLL];
#pragma unroll
            for (int r = 0; r < UNROLL; r++)
                raw[r] = load_row<NV>(codes + __shfl_sync(FULL, id, l + r, team) * pitch);
#pragma unroll
            for (int r = 0; r < UNROLL; r++) w[r] = __shfl_sync(FULL, weight, l + r, team);
#pragma unroll
            for (int r = 0; r < UNROLL; r++) {
                float x[NV];
                decode<ELEM, NV>(raw[r], x);
#pragma unroll
                for (int i = 0; i < NV; i++) sum[i] += w[r] * x[i];
            }
        }
        // What is left of a bag, and rows of several scales.
        for (; l < count; l++) {
            const u32 row = __shfl_sync(FULL, id, l, team);
            float w = __shfl_sync(FULL, weight, l, team), x[NV];
            if (groups > 1) w *= __ldg(scale + (u64)row * groups);
            decode<ELEM, NV>(load_once<NV * SIZE>(codes + row * pitch), x);
#pragma unroll
            for (int i = 0; i < NV; i++) sum[i] += w * x[i];
        }
    }
    if (real && greatest > last) raise_flag(flag, op, greatest, rows);
    if (!mine) return;
    out += token * dim + column;
    if (accumulate) {
#pragma unroll
        for (int i = 0; i < NV; i++) sum[i] = out[i] + sum[i];
    }
    write_floats<NV>(out, aligned, sum);
}

// A number as a type.
template <int COUNT> struct Many {
    static constexpr int N = COUNT;
};

// The same for loads of less than 16 bytes, rows of one scale at most, and teams that the compiler knows; a row's stride in
// bytes has 32 bits. All rounds over a team's ids are written out, so rows of the next are asked for before those of one are
// added, and scales are fetched a team's ids ahead. So narrow rows, which leave few warps to wait for them, are under way.
template <int NV, int TEAM>
__device__ __forceinline__ void sum_narrow(
    const u8* __restrict__ table, const float* __restrict__ scales, u64 rows, u32 dim, u32 stride,
    const u32* __restrict__ ids, const float* __restrict__ weights, float* __restrict__ out, u32 bag, u32 tokens,
    u32 accumulate, u32 aligned, u32* flag, u32 op) {
    constexpr int UNROLL = 8;
    const u32 slices = (dim + TEAM * NV - 1) / (TEAM * NV);
    const u64 task = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / TEAM, token = task / slices;
    const u32 lane = threadIdx.x % TEAM, column = ((u32)(task % slices) * TEAM + lane) * NV;
    const bool real = token < tokens, mine = real && column < dim;
    ids += real ? token * bag : 0;
    weights += real ? token * bag : 0;
    const u8* codes = table + (mine ? (u64)column * SIZE : 0);
    const u32 pitch = stride * SIZE, last = (u32)(rows - 1);
    u32 greatest = 0;

    const auto id_at = [&](u32 at) { return at < bag ? __ldg(ids + at) : 0u; };
    const auto weight_at = [&](u32 at) { return at < bag ? __ldg(weights + at) : 0.0f; };
    const auto row_of = [&](u32 wanted) {
        greatest = max(greatest, wanted);
        return min(wanted, last);
    };
    const auto scale_of = [&](u32 row) { return scales ? __ldg(scales + row) : 1.0f; };
    float sum[NV];
#pragma unroll
    for (int i = 0; i < NV; i++) sum[i] = 0.0f;
    // N rows from the team's number `l` on, each weighed by what a lane holds.
    const auto add = [&](auto many, u32 row, float weight, u32 l) {
        constexpr int N = decltype(many)::N;
        Raw<NV * SIZE> raw[N];
#pragma unroll
        for (int r = 0; r < N; r++)
            raw[r] = load_once<NV * SIZE>(codes + (u64)__shfl_sync(FULL, row, l + r, TEAM) * pitch);
#pragma unroll
        for (int r = 0; r < N; r++) {
            const float w = __shfl_sync(FULL, weight, l + r, TEAM);
            float x[NV];
            decode<ELEM, NV>(raw[r], x);
#pragma unroll
            for (int i = 0; i < NV; i++) sum[i] += w * x[i];
        }
    };

    u32 row = row_of(id_at(lane)), next_id = id_at(TEAM + lane), base = 0;
    float weight = weight_at(lane), scale = scale_of(row), next_weight = weight_at(TEAM + lane);
#pragma unroll 1
    for (; base + TEAM <= bag; base += TEAM) {
        const u32 next_row = row_of(next_id);
        const float next_scale = scale_of(next_row), factor = weight * scale;
        weight = next_weight;
        next_id = id_at(base + 2 * TEAM + lane);
        next_weight = weight_at(base + 2 * TEAM + lane);
#pragma unroll
        for (int l = 0; l < TEAM; l += UNROLL) add(Many<UNROLL>(), row, factor, l);
        row = next_row;
        scale = next_scale;
    }
    // What is left of a bag.
    const u32 count = bag - base;
    u32 l = 0;
#pragma unroll 1
    for (; l + UNROLL <= count; l += UNROLL) add(Many<UNROLL>(), row, weight * scale, l);
#pragma unroll 1
    for (; l < count; l++) add(Many<1>(), row, weight * scale, l);
    if (real && greatest > last) raise_flag(flag, op, greatest, rows);
    if (!mine) return;
    out += token * dim + column;
    if (accumulate) {
#pragma unroll
        for (int i = 0; i < NV; i++) sum[i] = out[i] + sum[i];
    }
    write_floats<NV>(out, aligned, sum);
}

// Rows of a bag that a team takes at once.
#define ROWS 8

// The dot is a horizontal sum: fused, and reduced over the team in a fixed order.
template <int NV>
__device__ __forceinline__ void dot_rows(
    const u8* __restrict__ table, const float* __restrict__ scales, u64 rows, u32 dim, u32 stride, u32 group,
    const u32* __restrict__ ids, const float* __restrict__ vectors, float* __restrict__ out, u32 bag, u32 tokens,
    u32 team, u32 aligned, u32* flag, u32 op) {
    const u32 tasks = (bag + ROWS - 1) / ROWS;
    const u64 task = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / team;
    const u32 lane = threadIdx.x % team;
    // Teams behind the last stay for the shuffles, and do the last one's work again without writing it.
    const bool real = task < (u64)tokens * tasks;
    const u64 token = real ? task / tasks : tokens - 1;
    const u32 first = (real ? (u32)(task % tasks) : tasks - 1) * ROWS;
    const u64 pitch = (u64)stride * SIZE;
    const u32 groups = scales ? (dim + group - 1) / group : 0;
    const float* vector = vectors + token * dim;
    const u32 last = (u32)(rows - 1);
    // The first eight lanes of a team hold the ids; a team has no fewer.
    const u32 wanted = lane < ROWS && first + lane < bag ? __ldg(ids + token * bag + first + lane) : 0u;
    if (wanted > last) raise_flag(flag, op, wanted, rows);
    const u32 id = min(wanted, last);
    float dot[ROWS];
    u32 row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        row[r] = __shfl_sync(FULL, id, r, team);
        dot[r] = 0.0f;
    }
    for (u32 column = lane * NV; column < dim; column += team * NV) {
        Raw<NV * SIZE> raw[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) raw[r] = load_once<NV * SIZE>(table + row[r] * pitch + (u64)column * SIZE);
        float v[NV];
        read_floats<NV>(vector + column, aligned, v);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x[NV], part = 0.0f;
            decode<ELEM, NV>(raw[r], x);
#pragma unroll
            for (int i = 0; i < NV; i++) part = fmaf(v[i], x[i], part);
            dot[r] = groups > 1 ? fmaf(__ldg(scales + (u64)row[r] * groups + column / group), part, dot[r])
                                : dot[r] + part;
        }
    }
    const TeamSum made = team_sums<ROWS>(dot, team);
    float sum = made.sum;
    const u32 mine = made.number;
    // The lane that holds a row's id: its scale is fetched here, where all lanes still are.
    const u32 of = __shfl_sync(FULL, id, mine, team);
    if (groups == 1) sum *= __ldg(scales + of);
    if (real && lane % made.lanes == 0 && first + mine < bag) out[token * bag + first + mine] = sum;
}

// Registers: on Hopper as few as the loads in flight leave, for 1024 blocks are then one wave; nowhere so few that they
// spill.
#if __CUDA_ARCH__ == 900
#define SUM_BOUNDS 128, 8
#define DOT_BOUNDS 128
#else
#define SUM_BOUNDS 128, 7
#define DOT_BOUNDS 128, 4
#endif

#if ELEM == I4 || ELEM == I4X64
// Rows of 4-bit integers: `codes` is ceil(dim / GROUP) groups of GROUP_BYTES, wherever they begin. A lane reads four bytes
// of a group, which are its values p to p + 3 and p + GROUP / 2 to p + GROUP / 2 + 3, and owns those columns.
#define GROUP (ELEM == I4 ? 32u : 64u)
#define GROUP_BYTES (2u + GROUP / 2u)
#define GROUP_LANES (GROUP / 8u)

__device__ __forceinline__ u32 load_pair(const u8* p, u32 even) {
    return even ? (u32)__ldg((const u16*)p) : (u32)__ldg(p) | (u32)__ldg(p + 1) << 8;
}

// Four bytes where two of them are aligned at best.
__device__ __forceinline__ u32 load_codes(const u8* p, u32 even) { return load_pair(p, even) | load_pair(p + 2, even) << 16; }

// The eight values of a lane: exact, for a scale has 11 bits and an integer 4.
__device__ __forceinline__ void decode_codes(u32 codes, u32 scale, float (&x)[8]) {
    const float s = half_to_float(scale);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 nibble = (codes >> (8 * (i % 4) + 4 * (i / 4))) & 15u;
        x[i] = s * (__uint_as_float(nibble | 0x4b000000u) - 8388616.0f);
    }
}

// Where a lane is in a row: its codes and its group's scale, and its first column.
struct Place {
    u32 scale, codes, column;
};
__device__ __forceinline__ Place place_of(u32 pair) {
    const u32 group = pair / GROUP_LANES, p = pair % GROUP_LANES * 4;
    return {group * GROUP_BYTES, group * GROUP_BYTES + 2 + p, group * GROUP + p};
}
__device__ __forceinline__ u32 column_of(const Place& place, int i) {
    return place.column + i % 4 + (i / 4) * (GROUP / 2);
}

#define FLIGHT 8

// Without a bound ptxas spills a word on Hopper; with a lesser one it takes twice the registers.
extern "C" __global__ void __launch_bounds__(128, 8)
    bag_sum_packed(const u8* table, const float*, u64 rows, u32 dim, u32 stride, u32, const u32* ids, const float* weights,
                   float* out, u32 bag, u32 tokens, u32 accumulate, u32 team, u32 even, u32* flag, u32 op) {
    const u32 pairs = (dim + GROUP - 1) / GROUP * GROUP_LANES, slices = (pairs + team - 1) / team;
    const u64 task = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / team, token = task / slices;
    const u32 lane = threadIdx.x % team, pair = (u32)(task % slices) * team + lane;
    const bool real = token < tokens, mine = real && pair < pairs;
    const Place place = place_of(mine ? pair : 0);
    const u64 pitch = stride;
    const u32 last = (u32)(rows - 1);
    ids += real ? token * bag : 0;
    weights += real ? token * bag : 0;
    u32 greatest = 0;
    float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (u32 base = 0; base < bag; base += team) {
        const u32 wanted = base + lane < bag ? __ldg(ids + base + lane) : 0u;
        const float weight = base + lane < bag ? __ldg(weights + base + lane) : 0.0f;
        greatest = max(greatest, wanted);
        const u32 id = min(wanted, last), count = min(team, bag - base);
        for (u32 l = 0; l < count; l += FLIGHT) {
            u32 codes[FLIGHT], scale[FLIGHT];
            // Behind the bag's end the last row is read again, and not added.
#pragma unroll
            for (int r = 0; r < FLIGHT; r++) {
                const u8* row = table + __shfl_sync(FULL, id, min(l + r, count - 1), team) * pitch;
                scale[r] = load_pair(row + place.scale, even);
                codes[r] = load_codes(row + place.codes, even);
            }
#pragma unroll
            for (int r = 0; r < FLIGHT; r++) {
                const float w = __shfl_sync(FULL, weight, min(l + r, count - 1), team);
                float x[8];
                decode_codes(codes[r], scale[r], x);
                if (l + r < count) {
#pragma unroll
                    for (int i = 0; i < 8; i++) sum[i] += w * x[i];
                }
            }
        }
    }
    if (real && greatest > last) raise_flag(flag, op, greatest, rows);
    if (!mine) return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 column = column_of(place, i);
        float* to = out + token * dim + column;
        if (column < dim) *to = accumulate ? *to + sum[i] : sum[i];
    }
}

extern "C" __global__ void __launch_bounds__(128)
    bag_dot_packed(const u8* table, const float*, u64 rows, u32 dim, u32 stride, u32, const u32* ids, const float* vectors,
                   float* out, u32 bag, u32 tokens, u32 team, u32 even, u32* flag, u32 op) {
    const u32 pairs = (dim + GROUP - 1) / GROUP * GROUP_LANES, tasks = (bag + ROWS - 1) / ROWS;
    const u64 task = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / team;
    const u32 lane = threadIdx.x % team;
    // Teams behind the last stay for the shuffles, and write nothing.
    const bool real = task < (u64)tokens * tasks;
    const u64 token = real ? task / tasks : tokens - 1;
    const u32 first = (real ? (u32)(task % tasks) : tasks - 1) * ROWS;
    const u64 pitch = stride;
    const u32 last = (u32)(rows - 1);
    const u32 wanted = lane < ROWS && first + lane < bag ? __ldg(ids + token * bag + first + lane) : 0u;
    if (wanted > last) raise_flag(flag, op, wanted, rows);
    const u32 id = min(wanted, last);
    float dot[ROWS];
    u32 row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        row[r] = __shfl_sync(FULL, id, r, team);
        dot[r] = 0.0f;
    }
    for (u32 pair = lane; pair < pairs; pair += team) {
        const Place place = place_of(pair);
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 column = column_of(place, i);
            v[i] = column < dim ? __ldg(vectors + token * dim + column) : 0.0f;
        }
        u32 codes[ROWS], scale[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const u8* at = table + row[r] * pitch;
            scale[r] = load_pair(at + place.scale, even);
            codes[r] = load_codes(at + place.codes, even);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x[8];
            decode_codes(codes[r], scale[r], x);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                // What pads a last group out may be any code, with any scale.
                if (column_of(place, i) < dim) dot[r] = fmaf(v[i], x[i], dot[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = dot[r];
        for (u32 offset = team / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL, sum, offset);
        if (real && lane == 0 && first + r < bag) out[token * bag + first + r] = sum;
    }
}
#else
#define SUM(NV)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(SUM_BOUNDS) bag_sum_##NV(                                            \
        const u8* table, const float* scales, u64 rows, u32 dim, u32 stride, u32 group, const u32* ids,               \
        const float* weights, float* out, u32 bag, u32 tokens, u32 accumulate, u32 team, u32 aligned, u32* flag,      \
        u32 op) {                                                                                                     \
        sum_rows<NV, 8>(table, scales, rows, dim, stride, group, ids, weights, out, bag, tokens, accumulate, team,    \
                        aligned, flag, op);                                                                           \
    }
#define DOT(NV)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(DOT_BOUNDS) bag_dot_##NV(                                            \
        const u8* table, const float* scales, u64 rows, u32 dim, u32 stride, u32 group, const u32* ids,               \
        const float* vectors, float* out, u32 bag, u32 tokens, u32 team, u32 aligned, u32* flag, u32 op) {            \
        dot_rows<NV>(table, scales, rows, dim, stride, group, ids, vectors, out, bag, tokens, team, aligned, flag, op);\
    }

#define SUM_NARROW(NV, TEAM)                                                                                          \
    extern "C" __global__ void __launch_bounds__(SUM_BOUNDS) bag_sum_##NV##_##TEAM(                                   \
        const u8* table, const float* scales, u64 rows, u32 dim, u32 stride, u32, const u32* ids,                     \
        const float* weights, float* out, u32 bag, u32 tokens, u32 accumulate, u32, u32 aligned, u32* flag, u32 op) { \
        sum_narrow<NV, TEAM>(table, scales, rows, dim, stride, ids, weights, out, bag, tokens, accumulate, aligned,   \
                             flag, op);                                                                               \
    }

SUM(1)
SUM(2)
SUM(4)
DOT(1)
DOT(2)
DOT(4)
#if SIZE <= 2
SUM(8)
DOT(8)
SUM_NARROW(4, 8)
SUM_NARROW(4, 16)
SUM_NARROW(4, 32)
#endif
#if SIZE == 1
DOT(16)
SUM_NARROW(8, 16)
SUM_NARROW(8, 32)
#endif

// For few tokens: narrow loads, so that there are many warps, and a whole warp's ids in flight at once.
extern "C" __global__ void __launch_bounds__(128, 1)
    bag_sum_few(const u8* table, const float* scales, u64 rows, u32 dim, u32 stride, u32 group, const u32* ids,
                const float* weights, float* out, u32 bag, u32 tokens, u32 accumulate, u32 team, u32 aligned, u32* flag,
                u32 op) {
    sum_rows<4 / SIZE, 32>(table, scales, rows, dim, stride, group, ids, weights, out, bag, tokens, accumulate, team,
                           aligned, flag, op);
}
#endif
