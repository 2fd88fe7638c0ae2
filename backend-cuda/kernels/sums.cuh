// Sums over the entries of a row, for plan.cu and optim.cu.
//
// A vertical sum: products, then sums, unfused, in order of the entries, from zero. A thread owns its columns, so how rows
// are spread over threads changes no bit.
//
// Rows are of three kinds. Short ones, by far the most, are far apart and have next to no work: a block takes one at a time
// with few threads, so that many are under way, and asks early for what it will need. What it finds to be longer it puts on
// a list. Rows of the first list get a block as wide as themselves; rows of more than CHUNK entries are cut into chunks,
// which many warps sum at the same time.

// Entries that are summed in one go; part of the law.
#define CHUNK 512
// Entries of a short row.
#define SHORT 32
// Warps that sum chunks of a long row at the same time.
#define HOT_WARPS 16

// Rows that are not short: how many of each kind, and which. What does not fit is summed where it is found.
#define LIST_LEN 65536
struct Lists {
    u32* counts;
    u32* middle;
    u32* longest;

    // Whether the row was put on a list. Called by the whole block, with `share` of its shared memory.
    __device__ __forceinline__ bool take(u32 u, u32 len, u32* share) const {
        if (len <= SHORT) return false;
        const u32 kind = len > CHUNK;
        if (threadIdx.x == 0) {
            const u32 at = atomicAdd(counts + kind, 1u);
            if (at < LIST_LEN) (kind ? longest : middle)[at] = u;
            *share = at;
        }
        __syncthreads();
        const bool taken = *share < LIST_LEN;
        __syncthreads();
        return taken;
    }
    __device__ __forceinline__ u32 middles() const { return min(__ldg(counts), (u32)LIST_LEN); }
    // Row number `i` of the longest, or FULL.
    __device__ __forceinline__ u32 long_row(u32 i) const {
        return i < min(__ldg(counts + 1), (u32)LIST_LEN) ? __ldg(longest + i) : FULL;
    }
};

// A plan as it lies on the device. `entries_len` is the length of `entries` and `rows`, one less than that of `starts`.
struct Plan {
    const u32* unique;
    const u32* rows;
    const u32* starts;
    const u32* entries;
    u32 entries_len;

    __device__ __forceinline__ u32 count() const { return min(__ldg(unique), entries_len); }
    __device__ __forceinline__ void range(u32 u, u32& start, u32& end) const {
        end = min(__ldg(starts + u + 1), entries_len);
        start = min(__ldg(starts + u), end);
    }
};

// Entry e adds weights[e] * sources[e / bag]; `magic` divides by the bag. `len` entries.
struct Gradient {
    const float* weights;
    const float* sources;
    u64 magic;
    u32 dim;
    u32 len;

    template <int VEC> __device__ __forceinline__ void source(u32 row, u32 column, float (&x)[VEC]) const {
        const float* p = sources + (u64)row * dim + column;
        if constexpr (VEC == 4) {
            const float4 v = __ldg((const float4*)p);
            x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        } else {
            x[0] = __ldg(p);
        }
    }

    // The source and the weight of the entry at `at`: a plan that names an entry there is not is read as entry 0.
    __device__ __forceinline__ void entry(const Plan& plan, u32 at, u32& row, float& weight) const {
        u32 e = __ldg(plan.entries + at);
        if (e >= len) e = 0;
        weight = __ldg(weights + e);
        row = divide(e, magic);
    }

    // Sums of at most K entries, which the lanes hold: GROUP pieces of the row at once, each handed to `out`.
    template <int VEC, int GROUP, int K, class Out>
    __device__ __forceinline__ void sum_few(u32 lane_row, float lane_weight, u32 count, const Out& out) const {
        u32 row[K];
        float w[K];
#pragma unroll
        for (int k = 0; k < K; k++) {
            row[k] = __shfl_sync(FULL, lane_row, k);
            w[k] = __shfl_sync(FULL, lane_weight, k);
        }
        const u32 stride = blockDim.x * VEC;
        for (u32 first = threadIdx.x * VEC; first < dim; first += GROUP * stride) {
            float x[GROUP][K][VEC];
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const u32 column = first + g * stride;
#pragma unroll
                for (int k = 0; k < K; k++) {
                    if (column < dim && k < count) source<VEC>(row[k], column, x[g][k]);
                }
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const u32 column = first + g * stride;
                if (column < dim) {
                    float sum[VEC];
#pragma unroll
                    for (int i = 0; i < VEC; i++) sum[i] = 0.0f;
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        if (k < count) {
#pragma unroll
                            for (int i = 0; i < VEC; i++) sum[i] += w[k] * x[g][k][i];
                        }
                    }
                    out(column, sum);
                }
            }
        }
    }

    // Columns of the sum over entries[start..end], a few entries ahead. Lanes of a warp fetch entries for each other, so
    // all of it must be here; those that are not `mine` only help.
    template <int VEC, int AHEAD>
    __device__ __forceinline__ void sum_warp(const Plan& plan, u32 start, u32 end, u32 column, bool mine,
                                             float (&sum)[VEC]) const {
        const u32 lane = threadIdx.x % 32;
        if (!mine) column = 0;
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] = 0.0f;
        u32 next_row = 0;
        float next_weight = 0.0f;
        if (start + lane < end) entry(plan, start + lane, next_row, next_weight);
        for (u32 k = start; k < end; k += 32) {
            const u32 row = next_row;
            const float weight = next_weight;
            if (k + 32 + lane < end) entry(plan, k + 32 + lane, next_row, next_weight);
            const u32 count = min(32u, end - k);
            for (u32 j = 0; j < count; j += AHEAD) {
                float w[AHEAD], x[AHEAD][VEC];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    const u32 r = __shfl_sync(FULL, row, j + a);
                    w[a] = __shfl_sync(FULL, weight, j + a);
                    if (j + a < count) source<VEC>(r, column, x[a]);
                }
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    if (j + a < count) {
#pragma unroll
                        for (int i = 0; i < VEC; i++) sum[i] += w[a] * x[a][i];
                    }
                }
            }
        }
    }

    // The sum over the entries of a row of at most CHUNK of them, by the whole block: every column is handed to `out`.
    template <int VEC, int AHEAD, class Out>
    __device__ __forceinline__ void sum_row(const Plan& plan, u32 start, u32 end, const Out& out) const {
        for (u32 base = 0; base < dim; base += blockDim.x * VEC) {
            const u32 column = base + threadIdx.x * VEC;
            float sum[VEC];
            sum_warp<VEC, AHEAD>(plan, start, end, column, column < dim, sum);
            if (column < dim) out(column, sum);
        }
    }

    // The same for a short row, whose first two entries the lanes hold, with as many pieces in flight as registers allow.
    template <int VEC, class Out>
    __device__ __forceinline__ void sum_short(const Plan& plan, u32 start, u32 end, u32 row, float weight,
                                              const Out& out) const {
        if (end - start > 2) sum_row<VEC, 3>(plan, start, end, out);
        else if (end - start == 2) sum_few<VEC, 1, 2>(row, weight, 2, out);
        else sum_few<VEC, 2, 1>(row, weight, end - start, out);
    }
};

// A block's way through the rows of a plan: one row in hand, the entries of the next asked for, the place of the one behind.
struct Walk {
    u32 u, start, end, row;
    float weight;
    u32 next_start, next_end, next_row;
    float next_weight;
    u32 last_start, last_end;

    __device__ __forceinline__ void range(const Plan& plan, u32 unique, u32 at, u32& from, u32& to) const {
        from = to = 0;
        if (at < unique && at >= blockIdx.x) plan.range(at, from, to);
    }
    __device__ __forceinline__ void entry(const Plan& plan, const Gradient& gradient, u32 from, u32 to, u32& row,
                                          float& weight) const {
        const u32 lane = threadIdx.x % 32;
        row = 0, weight = 0.0f;
        if (lane < 2 && from + lane < to) gradient.entry(plan, from + lane, row, weight);
    }
    __device__ __forceinline__ void begin(const Plan& plan, const Gradient& gradient, u32 unique) {
        u = blockIdx.x;
        range(plan, unique, u, start, end);
        range(plan, unique, u + gridDim.x, next_start, next_end);
        entry(plan, gradient, start, end, row, weight);
    }
    // Asks for what the next rows need. Comes before the work on this row.
    __device__ __forceinline__ void look_ahead(const Plan& plan, const Gradient& gradient, u32 unique) {
        entry(plan, gradient, next_start, next_end, next_row, next_weight);
        range(plan, unique, u + 2 * gridDim.x, last_start, last_end);
    }
    // To the next row. Comes behind the work on this one.
    __device__ __forceinline__ void advance() {
        u += gridDim.x;
        start = next_start, end = next_end, row = next_row, weight = next_weight;
        next_start = last_start, next_end = last_end;
    }
};

// Asks for `bytes` from `p` on to come nearer: lines of 128 bytes, one for each thread in turn.
__device__ __forceinline__ void fetch_ahead(const void* p, u32 bytes) {
    for (u32 at = threadIdx.x * 128; at < bytes; at += blockDim.x * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)p + at));
}
