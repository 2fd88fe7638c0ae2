// Sums over the entries of a row, for plan.cu and optim.cu.
//
// A vertical sum: products, then sums, unfused, in order of the entries, from zero. A thread owns its columns.

// Entries that are summed in one go; part of the law.
#define CHUNK 512
// Warps that sum chunks of a long row at the same time.
#define HOT_WARPS 16
// Sources of a short row that are read ahead.
#define AHEAD 4

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
    // The row that holds position b * CHUNK, if it is longer than CHUNK and this is its first such position; or FULL.
    __device__ __forceinline__ u32 long_row(u32 b) const {
        const u64 position = (u64)b * CHUNK;
        if (position >= entries_len) return FULL;
        u32 low = 0, high = count();
        while (high - low > 1) {
            const u32 middle = low + (high - low) / 2;
            if (__ldg(starts + middle) <= position) low = middle;
            else high = middle;
        }
        if (high == 0) return FULL;
        u32 start, end;
        range(low, start, end);
        if (end - start <= CHUNK || position >= end || position < start || start + CHUNK <= position) return FULL;
        return low;
    }
};

// Entry e adds weights[e] * sources[e / bag]; `magic` divides by the bag. `len` entries.
struct Gradient {
    const float* weights;
    const float* sources;
    u64 magic;
    u32 dim;
    u32 len;

    template <int VEC> __device__ __forceinline__ void source(u32 e, u32 column, float (&x)[VEC]) const {
        const float* p = sources + (u64)divide(e, magic) * dim + column;
        if constexpr (VEC == 4) {
            const float4 v = __ldg((const float4*)p);
            x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        } else {
            x[0] = __ldg(p);
        }
    }

    // Columns `column` to `column + VEC` of the sum over entries[start..end].
    template <int VEC>
    __device__ __forceinline__ void sum(const Plan& plan, u32 start, u32 end, u32 column, float (&sum)[VEC]) const {
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] = 0.0f;
        for (u32 k = start; k < end; k += AHEAD) {
            u32 e[AHEAD];
            float w[AHEAD], x[AHEAD][VEC];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) e[a] = k + a < end ? __ldg(plan.entries + k + a) : FULL;
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                if (e[a] < len) {
                    w[a] = __ldg(weights + e[a]);
                    source<VEC>(e[a], column, x[a]);
                }
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                if (e[a] < len) {
#pragma unroll
                    for (int i = 0; i < VEC; i++) sum[i] += w[a] * x[a][i];
                }
            }
        }
    }

    // The same by a whole warp, whose lanes fetch the entries for each other. Lanes that are not `mine` only help.
    template <int VEC>
    __device__ __forceinline__ void warp_sum(const Plan& plan, u32 start, u32 end, u32 column, bool mine,
                                             float (&sum)[VEC]) const {
        const u32 lane = threadIdx.x % 32;
        if (!mine) column = 0;
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] = 0.0f;
        for (u32 k = start; k < end; k += 32) {
            u32 entry = k + lane < end ? __ldg(plan.entries + k + lane) : FULL;
            if (entry >= len) entry = FULL;
            const float weight = entry == FULL ? 0.0f : __ldg(weights + entry);
            const u32 count = min(32u, end - k);
            for (u32 j = 0; j < count; j += 8) {
                u32 e[8];
                float w[8], x[8][VEC];
#pragma unroll
                for (int a = 0; a < 8; a++) {
                    e[a] = __shfl_sync(FULL, entry, j + a);
                    w[a] = __shfl_sync(FULL, weight, j + a);
                    if (e[a] != FULL) source<VEC>(e[a], column, x[a]);
                }
#pragma unroll
                for (int a = 0; a < 8; a++) {
                    if (e[a] != FULL) {
#pragma unroll
                        for (int i = 0; i < VEC; i++) sum[i] += w[a] * x[a][i];
                    }
                }
            }
        }
    }
};
