// Selection of many tokens on Hopper: scores made on tensor cores, of operands rounded to bf16, and never stored.
//
// Scores are made twice. The first time only the maxima of disjoint parts of a half are kept, whose K-th greatest bounds the
// K-th best from below; the second time what is not below it is written down, a few more than K scores of each half. Two
// products without the scores on the way cost less than one with them. Then a warp for each token and head puts these
// survivors in order, and their pairs. What does not fit the lists, for ties, and where there are infinities, is listed, and
// done again by `choose_rest`, which has all scores of a token and head in memory.
//
// Contract. `image` has the sub-keys of each half in bf16, as `tile_keys` writes them: for each TILE_KEYS sub-keys and each
// DEPTH of their values a piece of PIECE bytes, which lies there as the tensor cores want it in shared memory: rows of 128
// bytes, whose 16-byte units are swapped by the row's number modulo 8. `n` is a multiple of TILE_KEYS, `dim` of 8.
// Survivors of a row (token * halves + half) are four segments of SEGMENT entries, { score, sub-key }, in any order, at a
// multiple of 256 bytes; counts are four a row, and a full segment is taken for one in which entries are missing.

#define TILE_TOKENS 128
#define TILE_KEYS 256
#define DEPTH 64
#define PIECE (TILE_KEYS * 128)
#define SEGMENT 32
#define CHOOSE_THREADS 128

// Where 16 bytes, number `unit` of a row, lie among rows of pieces of `rows` rows.
__device__ __forceinline__ u32 swapped(u32 rows, u32 row, u32 unit) {
    return unit / 8 * rows * 128 + row * 128 + ((unit ^ row) % 8) * 16;
}

// What reads no keys of a format is compiled once.
#if ELEM == F32
#if __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Branches and loops are inside of these, so that the compiler sees no divergence where products are under way.
__device__ __forceinline__ void arrive(u32 barrier, u32 lane) {
    asm volatile("{ .reg .pred p; setp.eq.u32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 _, [%0]; }" ::"r"(barrier), "r"(lane)
                 : "memory");
}
__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    asm volatile("{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra AGAIN; DONE: }"
                 ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void fetch(u32 to, const u8* from, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(PIECE) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(PIECE), "r"(barrier) : "memory");
}

// A matrix in shared memory, of rows of 128 bytes swapped as above; eight rows are 1024 bytes.
__device__ __forceinline__ u64 matrix_at(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// acc [64, 256] = or += a [64, 16] b [256, 16]^T, by four warps. Warp w of them has rows 16 w; lane l has of rows l / 4 and
// l / 4 + 8 the columns 8 j + 2 (l % 4) and the next, in acc[4 j] to acc[4 j + 3].
__device__ __forceinline__ void multiply(float (&acc)[128], u64 a, u64 b, u32 add) {
#define F4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define F32S(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12), F4(i + 16), F4(i + 20), F4(i + 24), F4(i + 28)
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
                 "}, %128, %129, p, 1, 1, 0, 0; }"
                 : F32S(0), F32S(32), F32S(64), F32S(96) : "l"(a), "l"(b), "r"(add));
}

// A number that at least `k` of a row's 64 maxima reach, near the greatest such. Four lanes have 16 each.
__device__ __forceinline__ float bound_row(const float (&most)[16], u32 k) {
    // One of each of 32 couples is not below the least of their greater ones, and k is not above 32.
    u32 keys[16], low = FULL, high = 0;
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
        keys[i] = order(most[i]), keys[i + 1] = order(most[i + 1]);
        low = min(low, max(keys[i], keys[i + 1]));
        high = max(high, max(keys[i], keys[i + 1]));
    }
#pragma unroll
    for (int o = 1; o < 4; o *= 2) {
        low = min(low, __shfl_xor_sync(FULL, low, o));
        high = max(high, __shfl_xor_sync(FULL, high, o));
    }
#pragma unroll 1
    for (int step = 0; step < 10; step++) {
        const u32 middle = low + (high - low + 1) / 2;
        u32 enough = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) enough += keys[i] >= middle;
        enough += __shfl_xor_sync(FULL, enough, 1);
        enough += __shfl_xor_sync(FULL, enough, 2);
        if (enough >= k) low = middle;
        else high = middle - 1;
    }
    return score_of(low);
}

// Writes down what is not smaller than the limit, or NaN, if the segment has room: of 256 bytes at a multiple of as many, so
// that only the lower half of the address moves. Without branches: of the lanes of a warp nearly always one has something.
__device__ __forceinline__ void keep(float score, float limit, u32 column, u64& to, u32 end) {
    asm volatile("{ .reg .pred p; .reg .b32 low, high; mov.b64 {low, high}, %0; setp.geu.f32 p, %1, %2;"
                 "setp.ne.and.u32 p, low, %3, p; @p st.global.v2.b32 [%0], {%4, %5}; @p add.u32 low, low, 8;"
                 "mov.b64 %0, {low, high}; }"
                 : "+l"(to) : "f"(score), "f"(limit), "r"(end), "r"(__float_as_uint(score)), "r"(column) : "memory");
}

// The queries of a tile, rounded, as `a` of the products.
__device__ __forceinline__ void load_queries(const float* queries, u64 stride, u32 count, u32 dim, u32 units, u32 wide, u8* to) {
#pragma unroll 2
    for (u32 i = threadIdx.x; i < TILE_TOKENS * units; i += blockDim.x) {
        const u32 row = i / units, unit = i % units;
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = 0.0f;
        if (row < count && unit * 8 < dim) read_floats<8>(queries + row * stride + unit * 8, wide, x);
        *(uint4*)(to + swapped(TILE_TOKENS, row, unit)) =
            make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
    }
}

// A block for TILE_TOKENS tokens (x) and a half (y): two times four warps multiply; of four more, which give them their
// registers, one thread fetches pieces of keys ahead.
#define MULTIPLIERS 256
extern "C" __global__ void __launch_bounds__(MULTIPLIERS + 128, 1)
    score_tiles(const u8* __restrict__ image, const float* __restrict__ queries, u32 tokens, u32 halves, u32 n, u32 dim,
                u32 wide, u32 stages, u32 k, uint2* __restrict__ survivors, u32* __restrict__ counts) {
    extern __shared__ u8 room[];
    __shared__ __align__(8) u64 barriers[16];
    const u32 depths = (dim + DEPTH - 1) / DEPTH, chunks = n / TILE_KEYS, pieces = chunks * depths;
    const u32 half = blockIdx.y, token = blockIdx.x * TILE_TOKENS, count = min((u32)TILE_TOKENS, tokens - token);
    // Matrices begin at multiples of 1024.
    u8* a = room + (1024 - shared_address(room) % 1024) % 1024;
    const u32 rows = shared_address(a), keys = rows + depths * TILE_TOKENS * 128;
    const u32 full = shared_address(barriers), empty = full + 8 * 8;
    const u8* from = image + (u64)half * pieces * PIECE;
    const u32 ahead = min(stages, 2 * pieces);
    if (threadIdx.x == MULTIPLIERS) {
        for (u32 s = 0; s < stages; s++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * s) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * s), "r"(MULTIPLIERS / 32) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
        for (u32 i = 0; i < ahead; i++) fetch(keys + i * PIECE, from + (u64)(i % pieces) * PIECE, full + 8 * i);
    }
    const u64 stride = (u64)halves * dim;
    load_queries(queries + token * stride + half * dim, stride, count, dim, depths * 8, wide, a);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();

    if (__shfl_sync(FULL, threadIdx.x / 128, 0) == MULTIPLIERS / 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x > MULTIPLIERS) return;
        for (u32 i = ahead; i < 2 * pieces; i++) {
            const u32 s = i % stages;
            wait_for(empty + 8 * s, (i / stages - 1) % 2);
            fetch(keys + s * PIECE, from + (u64)(i % pieces) * PIECE, full + 8 * s);
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const u32 lane = threadIdx.x % 32, mine = rows + threadIdx.x / 128 * (64 * 128);
    // This lane's rows of the tile are `row` and `row + 8`.
    const u32 row = threadIdx.x / 32 * 16 + lane / 4;
    float acc[128], most[2][16], limit[2];
    u64 to[2];
    u32 start[2], end[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int i = 0; i < 16; i++) most[r][i] = -INF;
        const bool here = row + 8 * r < count;
        const u64 of = ((u64)token + (here ? row + 8 * r : 0)) * halves + half;
        to[r] = (u64)(survivors + (of * 4 + lane % 4) * SEGMENT);
        start[r] = (u32)to[r];
        // Of a row that there is not, nothing is written.
        end[r] = here ? start[r] + SEGMENT * 8 : start[r];
        limit[r] = INF;
    }
    u32 stage = 0, parity = 0;
    for (u32 chunk = 0; chunk < 2 * chunks; chunk++) {
        for (u32 d = 0; d < depths; d++) {
            wait_for(full + 8 * stage, parity);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            const u64 left = matrix_at(mine + d * TILE_TOKENS * 128), right = matrix_at(keys + stage * PIECE);
#pragma unroll
            for (u32 i = 0; i < DEPTH / 16; i++) multiply(acc, left + 2 * i, right + 2 * i, d + i);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            // The piece before is not needed any more.
            if (d > 0) {
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                arrive(empty + 8 * (stage == 0 ? stages - 1 : stage - 1), lane);
            }
            if (++stage == stages) stage = 0, parity ^= 1;
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        arrive(empty + 8 * (stage == 0 ? stages - 1 : stage - 1), lane);
        if (chunk < chunks) {
#pragma unroll
            for (int i = 0; i < 128; i++) {
                float& most_of = most[i % 4 / 2][i / 4 % 8 * 2 + i % 2];
                most_of = fmaxf(most_of, acc[i]);
            }
            if (chunk + 1 == chunks) limit[0] = bound_row(most[0], k), limit[1] = bound_row(most[1], k);
        } else {
            const u32 column = (chunk - chunks) * TILE_KEYS + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < 128; i++) {
                const int r = i % 4 / 2;
                keep(acc[i], limit[r], column + i / 4 * 8 + i % 2, to[r], end[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (row + 8 * r < count) counts[(((u64)token + row + 8 * r) * halves + half) * 4 + lane % 4] = ((u32)to[r] - start[r]) / 8;
    }
}
#endif

// What a warp chooses among: numbers by their keys, equal ones by lower tags.
struct List {
    u32 keys[4 * SEGMENT];
    u32 tags[4 * SEGMENT];
};

// Two instructions, where the compiler makes three.
__device__ __forceinline__ void count_if_greater(u32& count, u32 a, u32 b) {
    asm("{ .reg .pred p; setp.gt.u32 p, %1, %2; @p add.u32 %0, %0, 1; }" : "+r"(count) : "r"(a), "r"(b));
}

// Of a list of `total` numbers, this lane's are those at lane + 32 s: how many go before each. The list is padded with keys
// of zero to a multiple of four.
template <int SETS> __device__ __forceinline__ void places(const List& list, u32 total, u32 (&place)[SETS]) {
    const u32 lane = threadIdx.x % 32;
    u32 key[SETS], sum = 0;
#pragma unroll
    for (int s = 0; s < SETS; s++) key[s] = lane + 32 * s < total ? list.keys[lane + 32 * s] : FULL, place[s] = 0;
    for (u32 i = 0; i < total; i += 4) {
        const uint4 four = *(const uint4*)&list.keys[i];
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            count_if_greater(place[s], four.x, key[s]);
            count_if_greater(place[s], four.y, key[s]);
            count_if_greater(place[s], four.z, key[s]);
            count_if_greater(place[s], four.w, key[s]);
        }
    }
#pragma unroll
    for (int s = 0; s < SETS; s++) sum += lane + 32 * s < total ? place[s] : 0u;
    // All different?
    if (__reduce_add_sync(FULL, sum) == total * (total - 1) / 2) return;
    u32 tag[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) tag[s] = lane + 32 * s < total ? list.tags[lane + 32 * s] : 0u;
    for (u32 i = 0; i < total; i++) {
        const u32 other = list.keys[i], other_tag = list.tags[i];
#pragma unroll
        for (int s = 0; s < SETS; s++) place[s] += other == key[s] && other_tag < tag[s];
    }
}

// Hands the best `k` of a list to `out(place, key, tag)`, each to one lane.
template <class Out> __device__ __forceinline__ void put_in_order(const List& list, u32 total, u32 k, const Out& out) {
    const u32 lane = threadIdx.x % 32;
    if (total <= 64) {
        u32 place[2];
        places<2>(list, total, place);
#pragma unroll
        for (u32 s = 0; s < 2; s++) {
            const u32 i = lane + 32 * s;
            if (i < total && place[s] < k) out(place[s], list.keys[i], list.tags[i]);
        }
    } else {
        u32 place[4];
        places<4>(list, total, place);
#pragma unroll
        for (u32 s = 0; s < 4; s++) {
            const u32 i = lane + 32 * s;
            if (i < total && place[s] < k) out(place[s], list.keys[i], list.tags[i]);
        }
    }
    __syncwarp();
}

// Number `i` of a row's survivors, or nothing.
__device__ __forceinline__ uint2 survivor(const uint2* row, const uint4& counts, u32 i) {
    const u32 second = counts.x, third = second + counts.y, fourth = third + counts.z;
    if (i >= fourth + counts.w) return make_uint2(0, 0);
    const u32 place = i < second  ? i
                      : i < third ? SEGMENT + i - second
                      : i < fourth ? 2 * SEGMENT + i - third : 3 * SEGMENT + i - fourth;
    return __ldg(row + min(place, 4u * SEGMENT - 1));
}

// A warp for each token and head.
extern "C" __global__ void __launch_bounds__(CHOOSE_THREADS)
    choose_tiles(const uint2* __restrict__ survivors, const uint4* __restrict__ counts, u32 tokens, u32 heads, u32 parts, u32 n,
                 u32 k, u32 pairs, u32* __restrict__ failed, u32* __restrict__ ids_out, float* __restrict__ scores_out,
                 float* __restrict__ weights_out) {
    __shared__ __align__(16) List lists[CHOOSE_THREADS / 32];
    __shared__ float halves[CHOOSE_THREADS / 32][2][32], best_scores[CHOOSE_THREADS / 32][32];
    __shared__ u32 keys[CHOOSE_THREADS / 32][2][32], best_ids[CHOOSE_THREADS / 32][32], table[FEW_LIST];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp == 0) list_pairs(k, table);
    __syncthreads();
    const u64 row = (u64)blockIdx.x * (CHOOSE_THREADS / 32) + warp, to = row * k;
    if (row >= (u64)tokens * heads) return;
    List& list = lists[warp];
    // All that is far away is asked for at once: two survivors a lane of each half, more than most have.
    uint4 c[2];
    uint2 early[2][2];
#pragma unroll
    for (u32 part = 0; part < 2; part++) c[part] = part < parts ? __ldg(counts + row * parts + part) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (u32 part = 0; part < 2; part++) {
#pragma unroll
        for (u32 s = 0; s < 2; s++) early[part][s] = survivor(survivors + (row * parts + part) * (4 * SEGMENT), c[part], lane + 32 * s);
    }
    bool fail = false;
#pragma unroll
    for (u32 part = 0; part < 2; part++) {
        fail |= max(max(c[part].x, c[part].y), max(c[part].z, c[part].w)) >= SEGMENT;
        if (fail || part == parts) break;
        const u32 total = c[part].x + c[part].y + c[part].z + c[part].w;
#pragma unroll
        for (u32 s = 0; s < 4; s++) {
            const u32 i = lane + 32 * s;
            if (i >= (total + 3) / 4 * 4) break;
            const uint2 entry = s < 2 ? early[part][s] : survivor(survivors + (row * parts + part) * (4 * SEGMENT), c[part], i);
            list.keys[i] = i < total ? order(__uint_as_float(entry.x)) : 0u;
            list.tags[i] = entry.y;
        }
        __syncwarp();
        put_in_order(list, total, k, [&](u32 place, u32 key, u32 tag) {
            halves[warp][part][place] = score_of(key);
            keys[warp][part][place] = tag;
        });
    }
    if (fail || (parts == 2 && !(halves[warp][0][0] < INF && halves[warp][1][0] < INF))) {
        if (lane == 0) failed[1 + atomicAdd(failed, 1u)] = (u32)row;
        return;
    }
    if (parts == 1) {
        if (lane < k) ids_out[to + lane] = keys[warp][0][lane];
        return softmax_lanes(lane < k ? halves[warp][0][lane] : 0.0f, k, scores_out + to, weights_out + to);
    }
    u32 mine[4], pair[4], count = 0, total;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        pair[j] = lane + 32 * j < pairs ? table[lane + 32 * j] : 0u;
        mine[j] = lane + 32 * j < pairs ? order(halves[warp][0][pair[j] >> 16] + halves[warp][1][pair[j] & 0xffffu]) : 0u;
    }
    // The pairs (0, b) are k that the last of them bounds.
    const u32 bound = bound_keys<4>(mine, order(halves[warp][0][0] + halves[warp][1][k - 1]), k, 6);
#pragma unroll
    for (int j = 0; j < 4; j++) count += mine[j] >= bound;
    u32 at = scan_warp(count, total);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (mine[j] >= bound) list.keys[at] = mine[j], list.tags[at++] = pair[j];
    }
    if (lane < (4 - total % 4) % 4) list.keys[total + lane] = 0;
    __syncwarp();
    put_in_order(list, total, k, [&](u32 place, u32 key, u32 tag) {
        best_scores[warp][place] = score_of(key);
        best_ids[warp][place] = keys[warp][0][tag >> 16] * n + keys[warp][1][tag & 0xffffu];
    });
    if (lane < k) ids_out[to + lane] = best_ids[warp][lane];
    softmax_lanes(lane < k ? best_scores[warp][lane] : 0.0f, k, scores_out + to, weights_out + to);
}

// A block for each token and head that `choose_tiles` listed, in turns. `room` holds [parts, n] scores for each block.
extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1)
    choose_rest(const u8* image, const float* queries, u32 heads, u32 parts, u32 n, u32 dim, u32 k, u32 pairs, const u32* failed,
                float* room, u32* ids_out, float* scores_out, float* weights_out) {
    const u32 lane = threadIdx.x % 32, units = (dim + DEPTH - 1) / DEPTH * 8, count = failed[0];
    float* scores = room + (u64)blockIdx.x * parts * n;
    for (u32 i = blockIdx.x; i < count; i += gridDim.x) {
        const u64 row = failed[1 + i], to = row * k;
        // A warp takes four sub-keys at once.
        for (u32 key = threadIdx.x / 32 * 4; key < parts * n; key += FEW_THREADS / 32 * 4) {
            const u32 part = key / n;
            const u64 line = (row % heads * parts + part) * n + key % n;
            const u8* piece = image + line / TILE_KEYS * (units / 8) * PIECE;
            const float* query = queries + (row * parts + part) * dim;
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            for (u32 unit = lane; unit * 8 < dim; unit += 32) {
                float q[8];
#pragma unroll
                for (int j = 0; j < 8; j++) q[j] = __uint_as_float(bf16_bits(query[unit * 8 + j]) << 16);
#pragma unroll
                for (u32 r = 0; r < 4; r++) {
                    const uint4 codes = *(const uint4*)(piece + swapped(TILE_KEYS, line % TILE_KEYS + r, unit));
                    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        sum[r] = fmaf(q[j], __uint_as_float(j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u), sum[r]);
                }
            }
#pragma unroll
            for (u32 r = 0; r < 4; r++) {
                sum[r] = warp_sum(sum[r]);
                if (lane == r) scores[key + r] = sum[r];
            }
        }
        __syncthreads();
        choose_block(scores, n, parts, n, k, pairs, ids_out + to, scores_out + to, weights_out + to);
        __syncthreads();
    }
}
#endif

// Sub-keys of any format as `score_tiles` wants them.
extern "C" __global__ void __launch_bounds__(256)
    tile_keys(const u8* __restrict__ keys, const float* __restrict__ scales, u32 dim, u32 group, u32 rows, u32 wide,
              u8* __restrict__ image) {
    const u32 groups = scales ? (dim + group - 1) / group : 0, units = (dim + DEPTH - 1) / DEPTH * 8;
    const u64 len = (u64)rows * units;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += (u64)gridDim.x * blockDim.x) {
        const u32 row = (u32)(i / units), unit = (u32)(i % units);
        u32 bits[8];
#pragma unroll
        for (u32 j = 0; j < 8; j += 4) {
            const u32 c = unit * 8 + j;
            const u64 at = (u64)row * dim + c;
            float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (c < dim && wide) {
                decode<ELEM, 4>(load_once<4 * SIZE>(keys + at * SIZE), x);
            } else if (c < dim) {
#pragma unroll
                for (u32 e = 0; e < 4; e++) {
                    float one[1];
                    decode<ELEM, 1>(load_once<SIZE>(keys + (at + e) * SIZE), one);
                    x[e] = one[0];
                }
            }
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                if (scales && c < dim) x[e] *= __ldg(scales + (u64)row * groups + (c + e) / group);
                bits[j + e] = bf16_bits(x[e]);
            }
        }
        *(uint4*)(image + (u64)(row / TILE_KEYS) * (units / 8) * PIECE + swapped(TILE_KEYS, row % TILE_KEYS, unit)) =
            make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16);
    }
}
