// The sparse gradient of a table: a stable sort of entries by row, the rows and where each starts, and sums over them.
//
// Contract. A plan of `n` entries over a table of `rows` rows is made in three steps for each digit of the row ids
// (histogram, scan, scatter), least digit first, and two more for the unique rows (heads, write). A tile is TILE entries
// and belongs to one block of THREADS threads, a warp of it to WARP_ITEMS neighbouring entries. `counts` is
// `[digits, tiles]`. An id that is no row raises the flag and is planned as row 0. A plan of at most FEW entries is made by one
// block in one launch (plan_few), the same to the last entry.
//
// Plans stay on the device: kernels over the rows of a plan are launched for its entries and read how many rows there are.
// They trust no plan: entries and rows are checked against the lengths of the arrays. Compiled behind sums.cuh.

#define THREADS 256
#define WARPS (THREADS / 32)
#define ITEMS 8
#define TILE (THREADS * ITEMS)
#define WARP_ITEMS (32 * ITEMS)

extern "C" __global__ void __launch_bounds__(THREADS) plan_histogram(
    const u32* __restrict__ keys, u32 n, u64 rows, u32 shift, u32 digits, u32* __restrict__ counts, u32 tiles,
    u32 first_pass, u32* flag, u32 op) {
    __shared__ u32 histogram[256];
    histogram[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const u32 i = blockIdx.x * TILE + j * THREADS + threadIdx.x;
        if (i < n) {
            u32 key = keys[i];
            if (first_pass) key = checked(key, rows, flag, op);
            atomicAdd(&histogram[(key >> shift) & (digits - 1)], 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x < digits) counts[threadIdx.x * tiles + blockIdx.x] = histogram[threadIdx.x];
}

// The sum over the block of `x` of the threads before this one; `total` of all.
__device__ __forceinline__ u32 scan_block(u32 x, u32* warp_sums, u32& total) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 sum = x;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const u32 before = __shfl_up_sync(FULL, sum, o);
        if (lane >= o) sum += before;
    }
    __syncthreads();
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    u32 base = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) base += warp_sums[w];
        total += warp_sums[w];
    }
    return base + sum - x;
}

// One block a digit: its counts become the sums of the tiles before each, `totals` its sum.
extern "C" __global__ void __launch_bounds__(THREADS) plan_scan(u32* __restrict__ counts, u32 tiles,
                                                                u32* __restrict__ totals) {
    __shared__ u32 warp_sums[WARPS];
    u32* row = counts + blockIdx.x * tiles;
    u32 before = 0;
    for (u32 base = 0; base < tiles; base += THREADS) {
        const u32 i = base + threadIdx.x;
        u32 total;
        const u32 sum = scan_block(i < tiles ? row[i] : 0, warp_sums, total);
        if (i < tiles) row[i] = before + sum;
        before += total;
    }
    if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

// The lanes whose digit, of eight bits at most, is this lane's; only lanes that are `valid` count. A ballot a bit:
// `__match_any_sync` takes a turn for each digit there is.
__device__ __forceinline__ u32 lanes_alike(u32 digit, bool valid) {
    u32 alike = __ballot_sync(FULL, valid);
#pragma unroll
    for (int b = 0; b < 8; b++) {
        const bool one = digit >> b & 1u;
        const u32 ones = __ballot_sync(FULL, one);
        alike &= one ? ones : ~ones;
    }
    return alike;
}

// Puts every entry behind those of smaller digits, of earlier tiles, and of its own tile before it. In the first pass the
// entries are their own positions. A tile is put in order in shared memory first, so that what goes to neighbouring places
// is written together.
extern "C" __global__ void __launch_bounds__(THREADS) plan_scatter(
    const u32* __restrict__ keys, const u32* __restrict__ entries, u32 n, u64 rows, u32 shift, u32 digits,
    const u32* __restrict__ counts, const u32* __restrict__ totals, u32 tiles, u32 first_pass,
    u32* __restrict__ keys_out, u32* __restrict__ entries_out) {
    __shared__ u32 warp_counts[WARPS][256];
    __shared__ u32 warp_sums[WARPS];
    __shared__ u32 from_tile[256];
    __shared__ u32 tile_keys[TILE];
    __shared__ u32 tile_entries[TILE];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int w = 0; w < WARPS; w++) warp_counts[w][threadIdx.x] = 0;
    const u32 base = blockIdx.x * TILE + warp * WARP_ITEMS + lane;
    u32 key[ITEMS], entry[ITEMS], rank[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const u32 i = base + j * 32;
        key[j] = i < n ? keys[i] : 0u;
        entry[j] = first_pass || i >= n ? i : entries[i];
        if (first_pass && key[j] >= rows) key[j] = 0u;
    }
    const u32 before_tile = threadIdx.x < digits ? counts[threadIdx.x * tiles + blockIdx.x] : 0u;
    const u32 of_digit = threadIdx.x < digits ? totals[threadIdx.x] : 0u;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const bool valid = base + j * 32 < n;
        const u32 digit = (key[j] >> shift) & (digits - 1);
        const u32 peers = lanes_alike(digit, valid);
        const u32 before = __popc(peers & ((1u << lane) - 1));
        rank[j] = warp_counts[warp][digit] + before;
        __syncwarp();
        if (valid && before == 0) warp_counts[warp][digit] += __popc(peers);
        __syncwarp();
    }
    __syncthreads();
    // A digit's place among all entries, and in this tile.
    u32 all, in_tile = 0;
    const u32 digit_start = scan_block(of_digit, warp_sums, all);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const u32 count = warp_counts[w][threadIdx.x];
        warp_counts[w][threadIdx.x] = in_tile;
        in_tile += count;
    }
    const u32 tile_start = scan_block(in_tile, warp_sums, all);
#pragma unroll
    for (int w = 0; w < WARPS; w++) warp_counts[w][threadIdx.x] += tile_start;
    // May wrap around: only its sum with a place in the tile means something.
    from_tile[threadIdx.x] = digit_start + before_tile - tile_start;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        if (base + j * 32 < n) {
            const u32 at = warp_counts[warp][(key[j] >> shift) & (digits - 1)] + rank[j];
            tile_keys[at] = key[j];
            tile_entries[at] = entry[j];
        }
    }
    __syncthreads();
    const u32 len = min(n - blockIdx.x * TILE, (u32)TILE);
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const u32 at = j * THREADS + threadIdx.x;
        if (at < len) {
            const u32 to = at + from_tile[(tile_keys[at] >> shift) & (digits - 1)];
            keys_out[to] = tile_keys[at];
            entries_out[to] = tile_entries[at];
        }
    }
}

// How many rows begin in each tile of the sorted keys.
extern "C" __global__ void __launch_bounds__(THREADS) plan_heads(const u32* __restrict__ keys, u32 n,
                                                                 u32* __restrict__ heads) {
    u32 count = 0;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const u32 i = blockIdx.x * TILE + j * THREADS + threadIdx.x;
        const bool head = i < n && (i == 0 || keys[i - 1] != keys[i]);
        count += __syncthreads_count(head);
    }
    if (threadIdx.x == 0) heads[blockIdx.x] = count;
}

extern "C" __global__ void __launch_bounds__(THREADS) plan_write(
    const u32* __restrict__ keys, u32 n, const u32* __restrict__ heads, u32* __restrict__ unique,
    u32* __restrict__ rows_out, u32* __restrict__ starts) {
    __shared__ u32 warp_sums[WARPS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 sum = 0, before;
    for (u32 tile = threadIdx.x; tile < blockIdx.x; tile += THREADS) sum += heads[tile];
    scan_block(sum, warp_sums, before);

    const u32 base = blockIdx.x * TILE + warp * WARP_ITEMS + lane;
    u32 ballots[ITEMS], warp_heads = 0;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const u32 i = base + j * 32;
        ballots[j] = __ballot_sync(FULL, i < n && (i == 0 || keys[i - 1] != keys[i]));
        warp_heads += __popc(ballots[j]);
    }
    u32 total;
    const u32 offset = scan_block(lane == 0 ? warp_heads : 0u, warp_sums, total);
    u32 u = before + __shfl_sync(FULL, offset, 0);
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const u32 i = base + j * 32;
        if (ballots[j] >> lane & 1u) {
            const u32 at = u + __popc(ballots[j] & ((1u << lane) - 1));
            rows_out[at] = keys[i];
            starts[at] = i;
        }
        u += __popc(ballots[j]);
    }
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) {
        *unique = before + total;
        starts[before + total] = n;
    }
}

// Plans of few entries. The block is as wide as they need, from 256 threads on, and all is in its shared memory: eleven
// launches, one behind the other, would take far longer than what they do.
#define FEW_THREADS 1024
#define FEW_ITEMS 4
#define FEW (FEW_THREADS * FEW_ITEMS)

// The sum over the block of `x` of the threads before this one; `total` of all. For blocks of any number of warps.
__device__ __forceinline__ u32 scan_warps(u32 x, u32* warp_sums, u32& total) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto scan = [&](u32 sum) {
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            const u32 before = __shfl_up_sync(FULL, sum, o);
            if (lane >= o) sum += before;
        }
        return sum;
    };
    const u32 sum = scan(x);
    __syncthreads();
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    const u32 sums = scan(lane < blockDim.x / 32 ? warp_sums[lane] : 0u);
    total = __shfl_sync(FULL, sums, 31);
    const u32 base = __shfl_sync(FULL, sums, (warp + 31) % 32);
    return (warp > 0 ? base : 0u) + sum - x;
}

// A warp takes `items` times 32 neighbouring entries; a lane holds every 32nd of them, and in each pass those that are
// there in the order so far.
extern "C" __global__ void __launch_bounds__(FEW_THREADS) plan_few(
    const u32* __restrict__ ids, u32 n, u64 rows, u32 passes, u32 bits, u32* __restrict__ unique,
    u32* __restrict__ rows_out, u32* __restrict__ starts, u32* __restrict__ entries_out, u32* flag, u32 op) {
    __shared__ u32 keys[FEW];
    __shared__ u16 entries[FEW];
    __shared__ u16 warp_counts[FEW_THREADS / 32][256];
    __shared__ u32 digit_starts[256];
    __shared__ u32 warp_sums[32];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const u32 items = (n + blockDim.x - 1) / blockDim.x, base = warp * items * 32 + lane, digits = 1u << bits;
    u32 key[FEW_ITEMS], entry[FEW_ITEMS];
    const auto valid = [&](int j) { return j < items && base + j * 32 < n; };
#pragma unroll
    for (int j = 0; j < FEW_ITEMS; j++) {
        entry[j] = base + j * 32;
        key[j] = valid(j) ? checked(__ldg(ids + entry[j]), rows, flag, op) : 0u;
    }
    for (u32 pass = 0; pass < passes; pass++) {
        const u32 shift = pass * bits;
        u32 rank[FEW_ITEMS];
        for (u32 digit = lane; digit < digits; digit += 32) warp_counts[warp][digit] = 0;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < FEW_ITEMS; j++) {
            if (j >= items) break;
            const u32 digit = (key[j] >> shift) & (digits - 1);
            const u32 peers = lanes_alike(digit, valid(j));
            const u32 before = __popc(peers & ((1u << lane) - 1));
            rank[j] = warp_counts[warp][digit] + before;
            __syncwarp();
            if (valid(j) && before == 0) warp_counts[warp][digit] += __popc(peers);
            __syncwarp();
        }
        __syncthreads();
        // A digit's place among all entries, and of each warp's among those of the digit.
        u32 count = 0, all;
        if (threadIdx.x < digits) {
#pragma unroll 8
            for (u32 w = 0; w < warps; w++) {
                const u32 of_warp = warp_counts[w][threadIdx.x];
                warp_counts[w][threadIdx.x] = (u16)count;
                count += of_warp;
            }
        }
        const u32 start = scan_warps(count, warp_sums, all);
        if (threadIdx.x < digits) digit_starts[threadIdx.x] = start;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < FEW_ITEMS; j++) {
            if (!valid(j)) continue;
            const u32 digit = (key[j] >> shift) & (digits - 1), at = digit_starts[digit] + warp_counts[warp][digit] + rank[j];
            keys[at] = key[j];
            entries[at] = (u16)entry[j];
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < FEW_ITEMS; j++) {
            if (!valid(j)) continue;
            key[j] = keys[base + j * 32];
            entry[j] = entries[base + j * 32];
        }
    }
    // Rows begin where a key is not the one before it.
    u32 ballots[FEW_ITEMS], heads = 0, total;
#pragma unroll
    for (int j = 0; j < FEW_ITEMS; j++) {
        const u32 i = base + j * 32;
        ballots[j] = __ballot_sync(FULL, valid(j) && (i == 0 || keys[i - 1] != key[j]));
        heads += __popc(ballots[j]);
    }
    const u32 before = scan_warps(lane == 0 ? heads : 0u, warp_sums, total);
    u32 u = __shfl_sync(FULL, before, 0);
#pragma unroll
    for (int j = 0; j < FEW_ITEMS; j++) {
        const u32 i = base + j * 32;
        if (valid(j)) entries_out[i] = entry[j];
        if (ballots[j] >> lane & 1u) {
            const u32 at = u + __popc(ballots[j] & ((1u << lane) - 1));
            rows_out[at] = key[j];
            starts[at] = i;
        }
        u += __popc(ballots[j]);
    }
    if (threadIdx.x == 0) {
        *unique = total;
        starts[total] = n;
    }
}

// Sources of a long row that a warp reads ahead, and blocks of such warps that a multiprocessor must hold: as many as
// registers allow without spilling.
#if __CUDA_ARCH__ == 900
#define LONG_AHEAD 5
#define LONG_BLOCKS 2
#else
#define LONG_AHEAD 4
#define LONG_BLOCKS 1
#endif

// Where the gradient of row `u` of the plan goes: out[u], or out[rows[u]] if `scatter`. At most `limit` rows fit.
struct Destination {
    u8* out;
    u64 limit;
    u32 scatter;

    // FULL, and a raised flag, if it does not fit.
    __device__ __forceinline__ u64 of(const Plan& plan, u32 u, u32* flag, u32 op) const {
        const u64 to = scatter ? __ldg(plan.rows + u) : u;
        if (to < limit) return to;
        if (threadIdx.x == 0) raise_flag(flag, op, (u32)to, limit);
        return FULL;
    }
    // VEC columns of row `row`, in ELEM: floats, or bf16 rounded to nearest.
    template <int VEC> __device__ __forceinline__ void write(u64 row, u32 dim, u32 column, const float (&sum)[VEC]) const {
        u8* p = out + (row * dim + column) * SIZE;
#if ELEM == F32
        write_once<VEC>((float*)p, sum);
#else
        u32 below[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) below[i] = half_below(sum[i]);
        write_bf16<VEC>((u16*)p, sum, below);
#endif
    }
};

// A warp a row. Blocks of one `blockIdx.y` take `slice` columns of all rows, and blocks start in order: what they read of the
// sources at about the same time is these columns, which fit into the second-level cache where all may not.
template <int VEC>
__device__ __forceinline__ void reduce_short(const Plan& plan, const Gradient& gradient, const Lists& lists,
                                             const Destination& to, u32 slice, u32* flag, u32 op) {
    __shared__ u32 share;
    const u32 unique = plan.count(), from = blockIdx.y * slice;
    const Span span = {from, min(from + slice, gradient.dim)};
    NoDots none;
    Walk at;
    for (at.begin(plan, gradient, unique); at.u < unique; at.advance()) {
        at.look_ahead(plan, gradient, unique);
        // The first slice's blocks put longer rows on the lists, and sum all of what does not fit there.
        if (at.len > SHORT && (from > 0 || lists.take(at.u, at.len, &share))) continue;
        const u64 row = to.of(plan, at.u, flag, op);
        if (row == FULL) continue;
        const auto write = [&](u32 column, float(&sum)[VEC]) { to.write<VEC>(row, gradient.dim, column, sum); };
        if (at.len > SHORT) gradient.sum_row<VEC, 1>(plan, at.u, write);
        else gradient.sum_short<VEC>(at.len, at.row, at.weight, span, write, none);
    }
}

template <int VEC>
__device__ __forceinline__ void reduce_middle(const Plan& plan, const Gradient& gradient, const Lists& lists,
                                              const Destination& to, u32* flag, u32 op) {
    for (u32 i = blockIdx.x; i < lists.middles(); i += gridDim.x) {
        const u32 u = __ldg(lists.middle + i);
        const u64 row = to.of(plan, u, flag, op);
        if (row == FULL) continue;
        gradient.sum_row<VEC, 8>(plan, u, [&](u32 column, float(&sum)[VEC]) {
            to.write<VEC>(row, gradient.dim, column, sum);
        });
    }
}

// A block for 32 * VEC columns of row number `first + blockIdx.x` of the longest. Its warps sum chunks at the same time and
// add them in order. If `slots`, the gradient goes to out[blockIdx.x].
template <int VEC>
__device__ __forceinline__ void reduce_long(const Plan& plan, const Gradient& gradient, const Lists& lists,
                                            const Destination& to, u32 first, u32 slots, u32* flag, u32 op) {
    __shared__ float partial[HOT_WARPS][32 * VEC];
    const u32 u = lists.long_row(first + blockIdx.x);
    if (u == FULL) return;
    u32 start, end;
    plan.range(u, start, end);
    const u64 row = slots ? blockIdx.x : to.of(plan, u, flag, op);
    if (row == FULL) return;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 column = (blockIdx.y * 32 + lane) * VEC;
    const bool mine = column < gradient.dim;
    float total[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) total[i] = 0.0f;
    for (u32 chunks = start; chunks < end; chunks += HOT_WARPS * CHUNK) {
        const u32 from = chunks + warp * CHUNK;
        if (from < end) {
            float sum[VEC];
            gradient.sum_warp<VEC, LONG_AHEAD>(plan, from, min(from + CHUNK, end), column, mine, sum);
#pragma unroll
            for (int i = 0; i < VEC; i++) partial[warp][lane * VEC + i] = sum[i];
        }
        __syncthreads();
        if (warp == 0) {
            const u32 count = min((end - chunks + CHUNK - 1) / CHUNK, (u32)HOT_WARPS);
            for (u32 w = 0; w < count; w++) {
#pragma unroll
                for (int i = 0; i < VEC; i++) total[i] += partial[w][lane * VEC + i];
            }
        }
        __syncthreads();
    }
    if (warp == 0 && mine) to.write<VEC>(row, gradient.dim, column, total);
}

#define REDUCE(VEC)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(32, 32) reduce_short_##VEC(                                          \
        Plan plan, Gradient gradient, Lists lists, Destination to, u32 slice, u32* flag, u32 op) {                    \
        reduce_short<VEC>(plan, gradient, lists, to, slice, flag, op);                                                \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512, 1) reduce_middle_##VEC(                                            \
        Plan plan, Gradient gradient, Lists lists, Destination to, u32* flag, u32 op) {                               \
        reduce_middle<VEC>(plan, gradient, lists, to, flag, op);                                                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(HOT_WARPS * 32, LONG_BLOCKS) reduce_long_##VEC(                      \
        Plan plan, Gradient gradient, Lists lists, Destination to, u32 first, u32 slots, u32* flag, u32 op) {         \
        reduce_long<VEC>(plan, gradient, lists, to, first, slots, flag, op);                                          \
    }
REDUCE(1)
REDUCE(4)

// The sum of the squares of the first `unique * dim` of `grads`: a sum for each block, then their sum. Horizontal, its
// order fixed by the launch.
extern "C" __global__ void __launch_bounds__(THREADS) square_sums(const u32* __restrict__ unique, u32 dim, u64 len,
                                                                  const float* __restrict__ grads,
                                                                  float* __restrict__ sums, u32* flag, u32 op) {
    __shared__ float warp_sums[WARPS];
    const u64 wanted = (u64)*unique * dim;
    if (wanted > len && blockIdx.x == 0 && threadIdx.x == 0) raise_flag(flag, op, *unique, len / dim);
    const u64 end = wanted < len ? wanted : len;
    float sum = 0.0f;
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < end; i += (u64)gridDim.x * THREADS)
        sum = fmaf(grads[i], grads[i], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < WARPS; w++) sum += warp_sums[w];
        sums[blockIdx.x] = sum;
    }
}
extern "C" __global__ void __launch_bounds__(32) square_total(const float* __restrict__ sums, u32 count,
                                                              float* __restrict__ out) {
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < count; i += 32) sum += sums[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) *out = sum;
}
