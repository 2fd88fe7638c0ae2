// Sums over the entries of a row, for plan.cu and optim.cu.
//
// A vertical sum: products, then sums, unfused, in order of the entries, from zero. A thread owns its columns, so how rows
// are spread over threads changes no bit. SOURCE says what sources are stored as (F32 or BF16); products are of f32 either way.
//
// Rows are of three kinds. Short ones, by far the most, are far apart and have next to no work: a block takes one at a time
// with few threads, so that many are under way, and asks early for what it will need. What it finds to be longer it puts on
// a list. Rows of the first list get a block as wide as themselves; rows of more than CHUNK entries are cut into chunks,
// which many warps sum at the same time.

// Entries that are summed in one go; part of the law.
#define CHUNK 512
// Entries of a short row, at most: one for each lane of a warp.
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
    __device__ __forceinline__ u32 longs() const { return min(__ldg(counts + 1), (u32)LIST_LEN); }
    // Row number `i` of the longest, or FULL.
    __device__ __forceinline__ u32 long_row(u32 i) const { return i < longs() ? __ldg(longest + i) : FULL; }
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

// Columns `from` to `to` of rows, which a warp takes: VEC of them a lane, then the next.
struct Span {
    u32 from;
    u32 to;
};

// The warp's part of `dim` columns that are the block's.
template <int VEC> __device__ __forceinline__ Span warp_span(u32 dim) {
    const u32 warps = blockDim.x / 32, width = (dim + warps * VEC - 1) / (warps * VEC) * VEC;
    const u32 from = min(threadIdx.x / 32 * width, dim);
    return {from, min(from + width, dim)};
}

// Where nobody asks for the dots of sources and their row. Whoever does holds the first HELD pieces of a warp's span.
struct NoDots {
    static constexpr bool WANTED = false;
    static constexpr int HELD = 0;
};

#ifndef SOURCE
#define SOURCE F32
#endif
#define SOURCE_SIZE (SOURCE == BF16 ? 2 : 4)
// Sources in bf16 take half of the registers on their way: so many times as many of them are.
#define FLIGHT (SOURCE == BF16 ? 2 : 1)

// VEC values of a source as they are stored: while they are on their way they take no more registers than that.
template <int VEC> struct Source {
    Raw<VEC * SOURCE_SIZE> raw;

    // Zeros unless they are `wanted`: registers that are only written sometimes would be held for ever.
    __device__ __forceinline__ void load(const u8* p, bool wanted) {
        raw = {};
        if (!wanted) return;
        if constexpr (VEC * SOURCE_SIZE == 16) {
            const uint4 v = __ldg((const uint4*)p);
            raw.w[0] = v.x, raw.w[1] = v.y, raw.w[2] = v.z, raw.w[3] = v.w;
        } else if constexpr (VEC * SOURCE_SIZE == 8) {
            const uint2 v = __ldg((const uint2*)p);
            raw.w[0] = v.x, raw.w[1] = v.y;
        } else if constexpr (VEC * SOURCE_SIZE == 4) {
            raw.w[0] = __ldg((const u32*)p);
        } else {
            raw.w[0] = __ldg((const u16*)p);
        }
    }
    __device__ __forceinline__ float operator[](int i) const {
        if (SOURCE == F32) return __uint_as_float(raw.w[i]);
        return __uint_as_float(i % 2 == 0 ? raw.w[i / 2] << 16 : raw.w[i / 2] & 0xffff0000u);
    }
};

// Entry e adds weights[e] * sources[e / bag]; `magic` divides by the bag. `len` entries.
struct Gradient {
    const float* weights;
    const u8* sources;
    u64 magic;
    u32 dim;
    u32 len;

    // Where source `row` is at `column`.
    __device__ __forceinline__ const u8* place(u32 row, u32 column) const {
        return sources + ((u64)row * dim + column) * SOURCE_SIZE;
    }

    // The source and the weight of the entry at `at`: a plan that names an entry there is not is read as entry 0.
    __device__ __forceinline__ void entry(const Plan& plan, u32 at, u32& row, float& weight) const {
        weigh(__ldg(plan.entries + at), row, weight);
    }
    __device__ __forceinline__ void weigh(u32 e, u32& row, float& weight) const {
        if (e >= len) e = 0;
        weight = __ldg(weights + e);
        row = divide(e, magic);
    }

    // Adds `count` entries, which the lanes hold, to columns of a sum, AHEAD of them in flight. `dots`
    // gets what they read; its row is there.
    template <int VEC, int AHEAD, class D>
    __device__ __forceinline__ void add_lanes(u32 lane_row, float lane_weight, u32 count, u32 column,
                                              float (&sum)[VEC], D& dots) const {
#pragma unroll 1
        for (u32 j = 0; j < count; j += AHEAD) {
            float w[AHEAD];
            Source<VEC> x[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const u32 r = __shfl_sync(FULL, lane_row, j + a);
                w[a] = __shfl_sync(FULL, lane_weight, j + a);
                x[a].load(place(r, column), j + a < count);
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                if (j + a < count) {
#pragma unroll
                    for (int i = 0; i < VEC; i++) sum[i] += w[a] * x[a][i];
                }
            }
            if constexpr (D::WANTED) dots.multiply_all(j, x);
        }
    }

    // The sum of the first K entries, which the lanes hold: GROUP pieces of a warp's span at once, each handed to `out`.
    template <int VEC, int GROUP, int K, class Out, class D>
    __device__ __forceinline__ void sum_few(u32 lane_row, float lane_weight, Span span, const Out& out, D& dots) const {
        const u32 begin = span.from + threadIdx.x % 32 * VEC;
        const u8* p[K];
        float w[K], parts[K] = {};
#pragma unroll
        for (int k = 0; k < K; k++) {
            p[k] = place(__shfl_sync(FULL, lane_row, k), begin);
            w[k] = __shfl_sync(FULL, lane_weight, k);
        }
        u32 first = begin;
        // GROUP pieces, from number `piece` on.
        const auto pieces = [&](int piece) {
            Source<VEC> x[GROUP][K];
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
#pragma unroll
                for (int k = 0; k < K; k++) {
                    x[g][k].load(p[k] + g * 32 * VEC * SOURCE_SIZE, first + g * 32 * VEC < span.to);
                }
                if constexpr (D::WANTED) dots.load(piece, g, first + g * 32 * VEC, first + g * 32 * VEC < span.to);
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                if (first + g * 32 * VEC < span.to) {
                    if constexpr (D::WANTED) {
                        dots.take(piece, g);
#pragma unroll
                        for (int k = 0; k < K; k++) dots.multiply(x[g][k], parts[k]);
                    }
                    float sum[VEC];
#pragma unroll
                    for (int i = 0; i < VEC; i++) sum[i] = 0.0f;
#pragma unroll
                    for (int k = 0; k < K; k++) {
#pragma unroll
                        for (int i = 0; i < VEC; i++) sum[i] += w[k] * x[g][k][i];
                    }
                    out(first + g * 32 * VEC, sum);
                }
            }
#pragma unroll
            for (int k = 0; k < K; k++) p[k] += GROUP * 32 * VEC * SOURCE_SIZE;
            first += GROUP * 32 * VEC;
        };
#pragma unroll
        for (int held = 0; held < D::HELD; held += GROUP) pieces(held);
#pragma unroll 1
        while (first < span.to) pieces(D::HELD);
        if constexpr (D::WANTED) dots.add(0, parts);
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
            NoDots none;
            add_lanes<VEC, AHEAD>(row, weight, min(32u, end - k), column, sum, none);
        }
    }

    // The sum over the entries of row `u` of at most CHUNK of them, by the whole block: every column is handed to `out`.
    template <int VEC, int AHEAD, class Out>
    __device__ __forceinline__ void sum_row(const Plan& plan, u32 u, const Out& out) const {
        u32 start, end;
        plan.range(u, start, end);
        for (u32 base = 0; base < dim; base += blockDim.x * VEC) {
            const u32 column = base + threadIdx.x * VEC;
            float sum[VEC];
            sum_warp<VEC, AHEAD>(plan, start, end, column, column < dim, sum);
            if (column < dim) out(column, sum);
        }
    }

    // The sum over a short row, whose entries the lanes hold: the columns of a warp's span, as many of them in flight as
    // registers allow. A row of no entries, which is in no plan, is taken for one of the first.
    template <int VEC, class Out, class D>
    __device__ __forceinline__ void sum_short(u32 len, u32 row, float weight, Span span, const Out& out, D& dots) const {
        if (len <= 1) return sum_few<VEC, 4, 1>(row, weight, span, out, dots);
        if (len == 2) return sum_few<VEC, 2 * FLIGHT, 2>(row, weight, span, out, dots);
#pragma unroll 1
        for (u32 base = span.from; base < span.to; base += 32 * VEC) {
            const u32 column = base + threadIdx.x % 32 * VEC;
            float sum[VEC];
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[i] = 0.0f;
            if constexpr (D::WANTED) {
                dots.load(D::HELD, 0, column, column < span.to);
                dots.take(D::HELD, 0);
            }
            add_lanes<VEC, D::WANTED ? 2 * FLIGHT : 2 + FLIGHT>(row, weight, len, column < span.to ? column : 0, sum, dots);
            if (column < span.to) out(column, sum);
        }
    }
};

// A block's way through the rows of a plan. Each of the reads that a row needs waits for the one before it, so they are made
// rounds ahead: the row's place in the plan three, its entries two, their weights one. Lanes hold an entry each.
struct Walk {
    // The row in hand: its place in the plan, how many entries it has, and the lane's entry, its source and weight.
    u32 u, len, held, row;
    float weight;
    u32 next_len, next_entry, next_row;
    float next_weight;
    u32 third_start, third_end, third_entry;
    u32 last_start, last_end;

    __device__ __forceinline__ void range(const Plan& plan, u32 unique, u32 at, u32& from, u32& to) const {
        from = to = 0;
        if (at < unique) plan.range(at, from, to);
    }
    __device__ __forceinline__ u32 entry(const Plan& plan, u32 from, u32 to) const {
        const u32 at = from + threadIdx.x % 32;
        return at < to ? __ldg(plan.entries + at) : 0u;
    }
    __device__ __forceinline__ void weigh(const Gradient& gradient, u32 e, u32 count, u32& source, float& factor) const {
        source = 0, factor = 0.0f;
        if (threadIdx.x % 32 < count) gradient.weigh(e, source, factor);
    }
    __device__ __forceinline__ void begin(const Plan& plan, const Gradient& gradient, u32 unique) {
        u = blockIdx.x;
        u32 start, end;
        range(plan, unique, u, start, end);
        len = end - start;
        held = entry(plan, start, end);
        weigh(gradient, held, len, row, weight);
        range(plan, unique, u + gridDim.x, start, end);
        next_len = end - start;
        next_entry = entry(plan, start, end);
        range(plan, unique, u + 2 * gridDim.x, third_start, third_end);
    }
    // Asks for what the next rows need. Comes before the work on this row.
    __device__ __forceinline__ void look_ahead(const Plan& plan, const Gradient& gradient, u32 unique) {
        weigh(gradient, next_entry, next_len, next_row, next_weight);
        third_entry = entry(plan, third_start, third_end);
        range(plan, unique, u + 3 * gridDim.x, last_start, last_end);
    }
    // To the next row. Comes behind the work on this one.
    __device__ __forceinline__ void advance() {
        u += gridDim.x;
        len = next_len, held = next_entry, row = next_row, weight = next_weight;
        next_len = third_end - third_start, next_entry = third_entry;
        third_start = last_start, third_end = last_end;
    }
};
