// Choosing the best, for select.cu and tiles.cu.
//
// The law: descending; a NaN is greatest; equal ones by lower index. A score and its index make one 64-bit number whose
// descending order is the law's (`composite`), so any exact selection of the greatest gives the same result in any order
// of work. A warp selects: it bounds the K-th best from below by the maxima of disjoint parts, collects what is not smaller,
// and sorts that; where ties make that too much for its list it finds the K-th best bit by bit.
//
// For finite scores the best K of each half decide, and of their pairs only those with (a + 1)(b + 1) <= K. Where a half's
// best is +inf or NaN, sub-keys of -inf can win too (+inf - inf is NaN): then all pairs of the best K and up to K more of -inf
// are tried, as core's `half_candidates` and `best_pairs` do.

// Ascending with the law's order of scores. NaNs are all one, zeros are all one.
__device__ __forceinline__ u32 order(float score) {
    if (score != score) return FULL;
    const u32 bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of(u32 key) {
    if (key == FULL) return __int_as_float(0x7fc00000);
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
#define PLUS_INF 0xff800000u
#define MINUS_INF 0x007fffffu

__device__ __forceinline__ u64 composite(u32 key, u32 index) { return (u64)key << 32 | (u32)~index; }
__device__ __forceinline__ u32 index_of(u64 composite) { return ~(u32)composite; }

// Sorts `len` numbers, a power of two, descending: a bitonic network of one warp.
__device__ __forceinline__ void sort_list(u64* list, u32 len) {
    const u32 lane = threadIdx.x % 32;
    for (u32 size = 2; size <= len; size *= 2) {
        for (u32 stride = size / 2; stride > 0; stride /= 2) {
            __syncwarp();
            for (u32 pair = lane; pair < len / 2; pair += 32) {
                const u32 i = 2 * pair - (pair & (stride - 1));
                const u64 a = list[i], b = list[i + stride];
                if ((a < b) == ((i & size) == 0)) {
                    list[i] = b;
                    list[i + stride] = a;
                }
            }
        }
    }
    __syncwarp();
}

// Fills the list from `len` to the next power of two with what sorts last, and sorts it.
__device__ __forceinline__ void finish_list(u64* list, u32 len) {
    u32 whole = 1;
    while (whole < len) whole *= 2;
    for (u32 i = len + threadIdx.x % 32; i < whole; i += 32) list[i] = 0;
    sort_list(list, whole);
}

// The best `k` of `count` candidates with keys `key(i)`, whatever they are, unsorted into `list`: the K-th best key bit by
// bit, then how far down its ties reach.
template <class F> __device__ __forceinline__ void select_by_bits(u32 count, u32 k, const F& key, u64* list) {
    const u32 lane = threadIdx.x % 32;
    u32 least = 0;
    for (u32 bit = 0x80000000u; bit > 0; bit >>= 1) {
        u32 enough = 0;
        for (u32 i = lane; i < count; i += 32) enough += key(i) >= (least | bit);
        if (__reduce_add_sync(FULL, enough) >= k) least |= bit;
    }
    u32 greater = 0;
    for (u32 i = lane; i < count; i += 32) greater += key(i) > least;
    const u32 ties = k - __reduce_add_sync(FULL, greater);
    u32 low = 0, high = count;
    while (low < high) {
        const u32 middle = low + (high - low) / 2;
        u32 before = 0;
        for (u32 i = lane; i <= middle; i += 32) before += key(i) == least;
        if (__reduce_add_sync(FULL, before) >= ties) high = middle;
        else low = middle + 1;
    }
    u32 len = 0;
    for (u32 base = 0; base < count; base += 32) {
        const u32 i = base + lane;
        const u32 mine = i < count ? key(i) : 0u;
        const bool taken = i < count && (mine > least || (mine == least && i <= low));
        const u32 ballot = __ballot_sync(FULL, taken);
        if (taken) list[len + __popc(ballot & ((1u << lane) - 1))] = composite(mine, i);
        len += __popc(ballot);
    }
    __syncwarp();
}

// The place of the first of this lane's `count` items among those of the warp; `total` of all.
__device__ __forceinline__ u32 scan_warp(u32 count, u32& total) {
    u32 sum = count;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const u32 before = __shfl_up_sync(FULL, sum, o);
        if (threadIdx.x % 32 >= o) sum += before;
    }
    total = __shfl_sync(FULL, sum, 31);
    return sum - count;
}

// A key that at least `k` of the warp's 32 * SETS keys reach, near the greatest such and not below `low`, which is one.
template <int SETS> __device__ __forceinline__ u32 bound_keys(const u32 (&keys)[SETS], u32 low, u32 k, int steps) {
    u32 most = keys[0];
#pragma unroll
    for (int s = 1; s < SETS; s++) most = max(most, keys[s]);
    u32 high = __reduce_max_sync(FULL, most);
#pragma unroll 1
    for (int step = 0; step < steps && low < high; step++) {
        const u32 middle = low + (high - low + 1) / 2;
        u32 enough = 0;
#pragma unroll
        for (int s = 0; s < SETS; s++) enough += __popc(__ballot_sync(FULL, keys[s] >= middle));
        if (enough >= k) low = middle;
        else high = middle - 1;
    }
    return low;
}

// The candidates of a half for the case of infinities: its best k, and up to k more of -inf, by index. Their number.
__device__ __noinline__ u32 add_lowest(const float* __restrict__ half, u32 n, u32 k, u32* keys, u32* ids) {
    const u32 lane = threadIdx.x % 32;
    u32 taken = 0;
    for (u32 i = lane; i < k; i += 32) taken += keys[i] == MINUS_INF;
    taken = __reduce_add_sync(FULL, taken);
    u32 seen = 0, len = k;
    for (u32 base = 0; base < n && len < 2 * k; base += 32) {
        const u32 i = base + lane;
        const bool lowest = i < n && order(half[i]) == MINUS_INF;
        const u32 ballot = __ballot_sync(FULL, lowest);
        const u32 rank = seen + __popc(ballot & ((1u << lane) - 1));
        if (lowest && rank >= taken && k + rank - taken < 2 * k) {
            keys[k + rank - taken] = MINUS_INF;
            ids[k + rank - taken] = i;
        }
        seen += __popc(ballot);
        len = k + min(k, seen > taken ? seen - taken : 0u);
    }
    __syncwarp();
    return len;
}

// A pair of the table as a composite: the sum of its scores, and its position.
__device__ __forceinline__ u64 pair_of(const u32* first_keys, const u32* second_keys, u32 pair) {
    return composite(order(score_of(first_keys[pair >> 16]) + score_of(second_keys[pair & 0xffffu])), pair);
}

// The pairs (a, b) with (a + 1)(b + 1) <= k <= 32, in order of their position, by a warp.
__device__ __forceinline__ void list_pairs(u32 k, u32* table) {
    const u32 lane = threadIdx.x % 32;
    u32 total;
    const u32 count = lane < k ? k / (lane + 1) : 0u, at = scan_warp(count, total);
    for (u32 b = 0; b < count; b++) table[at + b] = lane << 16 | b;
}

// The softmax of `k` scores, one a lane, the greatest subtracted first; NaN as core's `softmax` has it.
__device__ __forceinline__ void softmax_lanes(float score, u32 k, float* scores, float* weights) {
    const u32 lane = threadIdx.x % 32, key = lane < k ? order(score) : 0u;
    const u32 greatest = __reduce_max_sync(FULL, key == FULL ? 0u : key);
    const float power = expf(score - (greatest == 0 ? -INF : score_of(greatest)));
    const float sum = warp_sum(lane < k ? power : 0.0f);
    if (lane < k) {
        scores[lane] = score;
        weights[lane] = power / sum;
    }
}

// Two floats rounded to bf16, the first in the lower half.
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// A float rounded to bf16, to the nearest even.
__device__ __forceinline__ u32 bf16_bits(float x) {
    const u32 bits = __float_as_uint(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return (nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16) & 0xffffu;
}

// The whole choice of a token and head by a block, for K up to 32. What takes a warp long chains of steps, all
// threads do at once here: a number's place is how many are greater, which is counted. Halves have FEW_HALF threads each.
#define FEW_THREADS 512
#define FEW_HALF 256
#define FEW_K 32
#define FEW_LIST 128

// How many of `len` different numbers are greater than `mine`: each lane of four counts a quarter.
__device__ __forceinline__ u32 count_greater(const u64* list, u32 len, u64 mine) {
    u32 greater = 0;
#pragma unroll 4
    for (u32 j = threadIdx.x % 4; j < len; j += 4) greater += list[j] > mine;
    greater += __shfl_xor_sync(FULL, greater, 1);
    return greater + __shfl_xor_sync(FULL, greater, 2);
}

// What is rare is kept out of the way: the best of a half with too many ties for the list, by one warp.
__device__ __noinline__ void few_by_bits(const float* half, u32 n, u32 k, u64* list) {
    select_by_bits(n, k, [&](u32 i) { return order(__ldcg(half + i)); }, list);
}
// And the best pairs where a half's best is +inf or NaN. Keys and ids have room for twice as many.
__device__ __noinline__ void few_with_infinities(const float* half, u64 stride, u32 n, u32 k, u32 (*keys)[2 * FEW_K],
                                                 u32 (*ids)[2 * FEW_K], u64* best, u32* ids_out) {
    const u32 firsts = add_lowest(half, n, k, keys[0], ids[0]);
    const u32 seconds = add_lowest(half + stride, n, k, keys[1], ids[1]);
    select_by_bits(firsts * seconds, k, [&](u32 i) {
        return order(score_of(keys[0][i / seconds]) + score_of(keys[1][i % seconds]));
    }, best);
    finish_list(best, k);
    for (u32 i = threadIdx.x % 32; i < k; i += 32) {
        const u32 pair = index_of(best[i]);
        ids_out[i] = ids[0][pair / seconds] * n + ids[1][pair % seconds];
    }
}

// Of a token and head whose `parts` halves of `n` scores lie `stride` from each other. Called by all of a block.
__device__ __forceinline__ void choose_block(const float* scores, u64 stride, u32 parts, u32 n, u32 k, u32 pairs, u32* ids_out,
                                             float* scores_out, float* weights_out) {
    __shared__ __align__(16) u32 maxima[2][FEW_HALF / 4];
    __shared__ u32 bound[2], found[2], keys[2][2 * FEW_K], ids[2][2 * FEW_K], table[FEW_LIST];
    __shared__ u64 list[2][FEW_LIST], sums[FEW_LIST], best[FEW_K];
    const u32 lane = threadIdx.x % 32, t = threadIdx.x % FEW_HALF, half = threadIdx.x / FEW_HALF, warp = threadIdx.x / 32;
    if (threadIdx.x < 2) found[threadIdx.x] = 0;
    if (warp == 0) list_pairs(k, table);
    wait_for_previous();

    // The K-th greatest of 64 maxima of disjoint parts bounds the K-th best.
    const bool here = half < parts;
    const float* mine = scores + (here ? half : 0) * stride;
    float x[4], most = -INF;
    for (u32 base = 0; base < n; base += 4 * FEW_HALF) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) x[j] = base + t + FEW_HALF * j < n ? __ldcg(mine + base + t + FEW_HALF * j) : -INF;
        most = fmaxf(fmaxf(fmaxf(most, x[0]), fmaxf(x[1], x[2])), x[3]);
    }
    most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
    most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
    if (t % 4 == 0) maxima[half][t / 4] = order(most);
    __syncthreads();
    {
        const u32 i = t / 4, key = maxima[half][i];
        u32 before = 0;
#pragma unroll
        for (u32 j = 0; j < FEW_HALF / 16; j += 4) {
            const u32 from = t % 4 * (FEW_HALF / 16) + j;
            const uint4 four = *(const uint4*)&maxima[half][from];
            before += four.x + (from < i) > key;
            before += four.y + (from + 1 < i) > key;
            before += four.z + (from + 2 < i) > key;
            before += four.w + (from + 3 < i) > key;
        }
        before += __shfl_xor_sync(FULL, before, 1);
        before += __shfl_xor_sync(FULL, before, 2);
        if (t % 4 == 0 && before == k - 1) bound[half] = key;
    }
    __syncthreads();

    // What is not smaller, or NaN, in any order.
    const float limit = score_of(bound[half]);
    for (u32 base = 0; here && base < n; base += 4 * FEW_HALF) {
        if (n > 4 * FEW_HALF) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) x[j] = base + t + FEW_HALF * j < n ? __ldcg(mine + base + t + FEW_HALF * j) : -INF;
        }
        u32 taken = 0;
#pragma unroll
        for (u32 j = 0; j < 4; j++) taken |= (u32)(base + t + FEW_HALF * j < n && !(x[j] < limit)) << j;
        u32 at = taken ? atomicAdd(&found[half], (u32)__popc(taken)) : 0u;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if ((taken >> j & 1) && at < FEW_LIST) list[half][at++] = composite(order(x[j]), base + t + FEW_HALF * j);
        }
    }
    __syncthreads();
    u32 len = found[half];
    if (max(found[0], found[1]) > FEW_LIST) {
        if (len > FEW_LIST && t < 32) few_by_bits(mine, n, k, list[half]);
        if (len > FEW_LIST) len = k;
        __syncthreads();
    }
    for (u32 base = 0; here && base < len; base += FEW_HALF / 4) {
        const u32 i = base + t / 4;
        const u64 number = i < len ? list[half][i] : 0;
        const u32 place = count_greater(list[half], len, number);
        if (i < len && place < k && t % 4 == 0) {
            keys[half][place] = (u32)(number >> 32);
            ids[half][place] = index_of(number);
        }
    }
    __syncthreads();

    if (parts == 1) {
        if (threadIdx.x < k) {
            best[threadIdx.x] = composite(keys[0][threadIdx.x], threadIdx.x);
            ids_out[threadIdx.x] = ids[0][threadIdx.x];
        }
    } else if (keys[0][0] < PLUS_INF && keys[1][0] < PLUS_INF) {
        if (threadIdx.x < pairs) sums[threadIdx.x] = pair_of(keys[0], keys[1], table[threadIdx.x]);
        __syncthreads();
        const u32 i = threadIdx.x / 4;
        const u64 number = i < pairs ? sums[i] : 0;
        const u32 place = count_greater(sums, pairs, number);
        if (i < pairs && place < k && threadIdx.x % 4 == 0) {
            const u32 pair = index_of(number);
            best[place] = number;
            ids_out[place] = ids[0][pair >> 16] * n + ids[1][pair & 0xffffu];
        }
    } else if (warp == 0) {
        few_with_infinities(mine, stride, n, k, keys, ids, best, ids_out);
    }
    __syncthreads();
    if (warp > 0) return;
    softmax_lanes(lane < k ? score_of((u32)(best[lane] >> 32)) : 0.0f, k, scores_out, weights_out);
}
