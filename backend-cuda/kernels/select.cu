// Selection: scores of sub-keys, the best K of each half, the best K pairs, their softmax; and the way back.
//
// Contract. A half is a row of `n` scores; there are `parts` (1 or 2) for a token and head. Scores of a tile of tokens lie as
// `[heads * parts, tile, n]`. Lists are `[tile, heads, parts, k]`: order keys (see `order`) and sub-keys, best first.
//
// The law: descending; a NaN is greatest; equal ones by lower index. A score and its index make one 64-bit number whose
// descending order is the law's (`composite`), so any exact selection of the greatest gives the same result in any order
// of work. A warp selects: it bounds the K-th best from below by the maxima of disjoint parts, collects what is not smaller,
// and sorts that; where ties make that too much for its list it finds the K-th best bit by bit.
//
// For finite scores the best K of each half decide, and of their pairs only those with (a + 1)(b + 1) <= K. Where a half's
// best is +inf or NaN, sub-keys of -inf can win too (+inf - inf is NaN): then all pairs of the best K and up to K more of -inf
// are tried, as core's `half_candidates` and `best_pairs` do.

#define SELECT_THREADS 128

// The lists of a block's warps, and what else the kernel says.
extern __shared__ __align__(16) u64 lists[];

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

// A part of a half in a warp's registers: x[j] is score number base + 32 j + lane, or -inf behind the end.
#define PART 1024
__device__ __forceinline__ void load_part(const float* __restrict__ scores, u32 base, u32 n, float (&x)[32]) {
    const u32 first = base + threadIdx.x % 32;
#pragma unroll
    for (u32 j = 0; j < 32; j++) x[j] = first + 32 * j < n ? __ldg(scores + first + 32 * j) : -INF;
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

// A key that at least `k` of the warp's 32 * SETS keys reach, near the greatest such.
template <int SETS> __device__ __forceinline__ u32 bound_keys(const u32 (&keys)[SETS], u32 k, int steps) {
    u32 least = keys[0], most = keys[0];
#pragma unroll
    for (int s = 1; s < SETS; s++) least = min(least, keys[s]), most = max(most, keys[s]);
    u32 low = __reduce_min_sync(FULL, least), high = __reduce_max_sync(FULL, most);
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

// The best `k` of a half into a list of `capacity` places, sorted. The maxima of 32 * SETS parts bound the K-th best: so
// many as K are not smaller, and SETS is such that not many more than K scores are not either.
template <int SETS>
__device__ __forceinline__ void select_half(const float* __restrict__ scores, u32 n, u32 k, u64* list, u32 capacity) {
    const u32 lane = threadIdx.x % 32;
    float x[32], best[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) best[s] = -INF;
    for (u32 base = 0; base < n; base += PART) {
        load_part(scores, base, n, x);
        // NaN is passed over, which only lowers the bound.
#pragma unroll
        for (int j = 0; j < 32; j++) best[j % SETS] = fmaxf(best[j % SETS], x[j]);
    }
    u32 keys[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++) keys[s] = order(best[s]);
    const float bound = score_of(bound_keys<SETS>(keys, k, 10));
    u32 len = 0;
    for (u32 base = 0; base < n; base += PART) {
        if (n > PART) load_part(scores, base, n, x);
        // Not smaller, or NaN.
        u32 taken = 0, total;
#pragma unroll
        for (int j = 0; j < 32; j++) taken |= (u32)!(x[j] < bound) << j;
        const u32 there = n - base > lane ? min((n - base - lane + 31) / 32, 32u) : 0u;
        if (there < 32) taken &= (1u << there) - 1;
        u32 at = len + scan_warp(__popc(taken), total);
        for (; taken && at < capacity; taken &= taken - 1, at++) list[at] = base + 32 * (__ffs(taken) - 1) + lane;
        len += total;
    }
    __syncwarp();
    if (len > capacity) {
        select_by_bits(n, k, [&](u32 i) { return order(scores[i]); }, list);
        len = k;
    } else {
        for (u32 p = lane; p < len; p += 32) {
            const u32 i = (u32)list[p];
            list[p] = composite(order(__ldg(scores + i)), i);
        }
    }
    finish_list(list, len);
}

// A warp a half. `row` of a tile: ((token * heads + head) * parts + part).
template <int SETS>
__device__ __forceinline__ void halves_of(const float* __restrict__ scores, u32 tile, u32 halves, u32 n, u32 k, u32 capacity,
                                          u32* __restrict__ keys_out, u32* __restrict__ ids_out) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 row = (u64)blockIdx.x * (blockDim.x / 32) + warp;
    if (row >= (u64)tile * halves) return;
    const u64 token = row / halves, half = row % halves;
    u64* list = lists + warp * capacity;
    scores += (half * tile + token) * n;
    if (SETS > 0) {
        select_half<SETS == 0 ? 1 : SETS>(scores, n, k, list, capacity);
    } else {
        select_by_bits(n, k, [&](u32 i) { return order(scores[i]); }, list);
        finish_list(list, k);
    }
    for (u32 i = lane; i < k; i += 32) {
        keys_out[row * k + i] = (u32)(list[i] >> 32);
        ids_out[row * k + i] = index_of(list[i]);
    }
}

// For K up to 32, up to 128, and above.
#define HALVES(NAME, SETS)                                                                                            \
    extern "C" __global__ void __launch_bounds__(SELECT_THREADS)                                                      \
        NAME(const float* scores, u32 tile, u32 halves, u32 n, u32 k, u32 capacity, u32* keys_out, u32* ids_out) {    \
        halves_of<SETS>(scores, tile, halves, n, k, capacity, keys_out, ids_out);                                     \
    }
HALVES(select_halves_32, 2)
HALVES(select_halves_128, 8)
HALVES(select_halves_more, 0)

// The softmax of a warp's scores, the greatest subtracted first; NaN as core's `softmax` has it.
__device__ __forceinline__ void softmax_list(const u64* list, u32 k, u64 at, float* __restrict__ scores,
                                             float* __restrict__ weights) {
    const u32 lane = threadIdx.x % 32;
    float greatest = -INF;
    for (u32 i = lane; i < k; i += 32) greatest = fmaxf(greatest, score_of((u32)(list[i] >> 32)));
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) greatest = fmaxf(greatest, __shfl_xor_sync(FULL, greatest, o));
    float sum = 0.0f;
    for (u32 i = lane; i < k; i += 32) sum += expf(score_of((u32)(list[i] >> 32)) - greatest);
    sum = warp_sum(sum);
    for (u32 i = lane; i < k; i += 32) {
        const float score = score_of((u32)(list[i] >> 32));
        scores[at + i] = score;
        weights[at + i] = expf(score - greatest) / sum;
    }
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

// The pairs of at most 32 by 32 scores that can be among the best `k`, unsorted; how many they are. There are at most 119.
__device__ __forceinline__ u32 collect_pairs(const u32* first_keys, const u32* second_keys, const u32* table, u32 pairs,
                                             u32 k, u64* list) {
    const u32 lane = threadIdx.x % 32;
    u64 mine[4];
    u32 keys[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        mine[j] = lane + 32 * j < pairs ? pair_of(first_keys, second_keys, table[lane + 32 * j]) : 0;
        keys[j] = (u32)(mine[j] >> 32);
    }
    // Keys of scores are not zero, so neither is a bound that k of them reach.
    const u32 bound = max(bound_keys<4>(keys, k, 16), 1u);
    u32 count = 0, len;
#pragma unroll
    for (int j = 0; j < 4; j++) count += keys[j] >= bound;
    u32 at = scan_warp(count, len);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (keys[j] >= bound) list[at++] = mine[j];
    }
    __syncwarp();
    return len;
}

// The best pairs of a token and head, a warp each. `pairs` is the number of (a, b) with (a+1)(b+1) <= k, and
// `capacity` a power of two that is not less. Shared memory: for each warp a list of `capacity` places and four times 2k
// numbers, and one table of the pairs.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    select_pairs(const float* __restrict__ scores, u32 tile, u32 heads, u32 parts, u32 n, u32 k, u32 pairs, u32 capacity,
                 const u32* __restrict__ keys, const u32* __restrict__ ids, u32* __restrict__ ids_out,
                 float* __restrict__ scores_out, float* __restrict__ weights_out) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u64* list = lists + warp * (capacity + 4 * k);
    u32* first_keys = (u32*)(list + capacity);
    u32* first_ids = first_keys + 2 * k;
    u32* second_keys = first_keys + 4 * k;
    u32* second_ids = first_keys + 6 * k;
    u32* table = (u32*)(lists + warps * (capacity + 4 * k));
    // Row a of the table has the pairs (a, 0), (a, 1), ...: in order of position.
    if (parts == 2) {
        if (k <= 32) {
            if (warp == 0) {
                u32 total;
                const u32 count = lane < k ? k / (lane + 1) : 0u, at = scan_warp(count, total);
                for (u32 b = 0; b < count; b++) table[at + b] = lane << 16 | b;
            }
        } else {
            for (u32 a = threadIdx.x; a < k; a += blockDim.x) {
                u32 at = 0;
                for (u32 before = 0; before < a; before++) at += k / (before + 1);
                for (u32 b = 0; b < k / (a + 1); b++) table[at + b] = a << 16 | b;
            }
        }
    }
    __syncthreads();
    for (u64 row = (u64)blockIdx.x * warps + warp; row < (u64)tile * heads; row += (u64)gridDim.x * warps) {
        const u64 from = row * parts * k, to = row * k;
        __syncwarp();
        if (parts == 1) {
            for (u32 i = lane; i < k; i += 32) {
                list[i] = composite(keys[from + i], i);
                ids_out[to + i] = ids[from + i];
            }
            __syncwarp();
            softmax_list(list, k, to, scores_out, weights_out);
            continue;
        }
        for (u32 i = lane; i < k; i += 32) {
            first_keys[i] = keys[from + i];
            first_ids[i] = ids[from + i];
            second_keys[i] = keys[from + k + i];
            second_ids[i] = ids[from + k + i];
        }
        __syncwarp();
        if (first_keys[0] < PLUS_INF && second_keys[0] < PLUS_INF) {
            const u32 len = k <= 32 ? collect_pairs(first_keys, second_keys, table, pairs, k, list) : pairs;
            if (k > 32) {
                for (u32 p = lane; p < pairs; p += 32) list[p] = pair_of(first_keys, second_keys, table[p]);
            }
            finish_list(list, len);
            for (u32 i = lane; i < k; i += 32) {
                const u32 pair = index_of(list[i]);
                ids_out[to + i] = first_ids[pair >> 16] * n + second_ids[pair & 0xffffu];
            }
        } else {
            const u64 token = row / heads, head = row % heads;
            const float* half = scores + (head * 2 * tile + token) * n;
            const u32 firsts = add_lowest(half, n, k, first_keys, first_ids);
            const u32 seconds = add_lowest(half + (u64)tile * n, n, k, second_keys, second_ids);
            select_by_bits(firsts * seconds, k, [&](u32 i) {
                return order(score_of(first_keys[i / seconds]) + score_of(second_keys[i % seconds]));
            }, list);
            finish_list(list, k);
            for (u32 i = lane; i < k; i += 32) {
                const u32 pair = index_of(list[i]);
                ids_out[to + i] = first_ids[pair / seconds] * n + second_ids[pair % seconds];
            }
        }
        softmax_list(list, k, to, scores_out, weights_out);
    }
}

// Scores for few tokens: a warp takes KEYS neighbouring sub-keys of a half, and reads them once for up to four tokens. Every
// score is a horizontal sum.
#define KEYS 4
extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    select_scores(const u8* keys, const float* scales, u32 group, const float* queries, u32 tokens, u32 halves, u32 n, u32 dim,
                  u32 wide, float* scores) {
    let_next_begin();
    const u32 lane = threadIdx.x % 32, warps = (n + KEYS - 1) / KEYS;
    const u64 warp = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp >= (u64)halves * warps) return wait_for_previous();
    const u32 half = (u32)(warp / warps), key = (u32)(warp % warps) * KEYS, count = min((u32)KEYS, n - key);
    const u32 groups = scales ? (dim + group - 1) / group : 0;
    const u64 row = (u64)half * n + key, stride = (u64)dim * SIZE;
    const u8* codes = keys + row * stride;
    for (u64 at = lane * 128; at < count * stride; at += 32 * 128) prefetch(codes + at);
    wait_for_previous();
    for (u32 first = 0; first < tokens; first += 4) {
        float dot[KEYS][4];
#pragma unroll
        for (u32 r = 0; r < KEYS; r++) {
#pragma unroll
            for (u32 t = 0; t < 4; t++) dot[r][t] = 0.0f;
        }
        // Behind the last sub-key that one is read again, and not written.
        if (wide) {
#pragma unroll 2
            for (u32 c = lane * 4; c < dim; c += 128) {
                Raw<4 * SIZE> raw[KEYS];
#pragma unroll
                for (u32 r = 0; r < KEYS; r++) raw[r] = load_fresh<4 * SIZE>(codes + min(r, count - 1) * stride + (u64)c * SIZE);
                float4 q[4];
#pragma unroll
                for (u32 t = 0; t < 4; t++) {
                    if (first + t < tokens) q[t] = load_near4(queries + ((u64)(first + t) * halves + half) * dim + c);
                }
#pragma unroll
                for (u32 r = 0; r < KEYS; r++) {
                    float x[4];
                    decode<ELEM, 4>(raw[r], x);
                    const float scale = groups > 1 ? load_near(scales + (row + min(r, count - 1)) * groups + c / group) : 1.0f;
#pragma unroll
                    for (u32 t = 0; t < 4; t++) {
                        if (first + t < tokens) {
                            const float part = fmaf(q[t].w, x[3], fmaf(q[t].z, x[2], fmaf(q[t].y, x[1], q[t].x * x[0])));
                            dot[r][t] = groups > 1 ? fmaf(scale, part, dot[r][t]) : dot[r][t] + part;
                        }
                    }
                }
            }
        } else {
            for (u32 c = lane; c < dim; c += 32) {
#pragma unroll
                for (u32 r = 0; r < KEYS; r++) {
                    float x[1];
                    decode<ELEM, 1>(load_fresh<SIZE>(codes + min(r, count - 1) * stride + (u64)c * SIZE), x);
                    if (groups > 1) x[0] *= load_near(scales + (row + min(r, count - 1)) * groups + c / group);
#pragma unroll
                    for (u32 t = 0; t < 4; t++) {
                        if (first + t < tokens)
                            dot[r][t] = fmaf(load_near(queries + ((u64)(first + t) * halves + half) * dim + c), x[0], dot[r][t]);
                    }
                }
            }
        }
#pragma unroll
        for (u32 t = 0; t < 4; t++) {
            if (first + t >= tokens) break;
            float mine = 0.0f;
#pragma unroll
            for (u32 r = 0; r < KEYS; r++) {
                const float sum = warp_sum(dot[r][t]);
                if (lane == r) mine = sum;
            }
            if (groups == 1 && lane < count) mine *= load_near(scales + row + lane);
            if (lane < count) scores[((u64)half * tokens + first + t) * n + key + lane] = mine;
        }
    }
}

// The whole choice for few tokens and K up to 32: a block a token and head. What takes a warp long chains of steps, all
// threads do at once here: a number's place is how many are greater, which is counted. Halves have FEW_HALF threads each.
#define FEW_THREADS 512
#define FEW_HALF 256
#define FEW_K 32
#define FEW_LIST 128

// How many of `len` different numbers are greater than `mine`: each lane of four counts a quarter.
__device__ __forceinline__ u32 count_greater(const u64* list, u32 len, u64 mine) {
    u32 greater = 0;
#pragma unroll 8
    for (u32 j = threadIdx.x % 4; j < len; j += 4) greater += list[j] > mine;
    greater += __shfl_xor_sync(FULL, greater, 1);
    return greater + __shfl_xor_sync(FULL, greater, 2);
}

extern "C" __global__ void __launch_bounds__(FEW_THREADS)
    select_few(const float* scores, u32 tile, u32 heads, u32 parts, u32 n, u32 k, u32 pairs, u32* ids_out, float* scores_out,
               float* weights_out) {
    __shared__ __align__(16) u32 maxima[2][FEW_HALF / 4];
    __shared__ u32 bound[2], found[2], keys[2][2 * FEW_K], ids[2][2 * FEW_K], table[FEW_LIST];
    __shared__ u64 list[2][FEW_LIST], sums[FEW_LIST], best[FEW_K];
    let_next_begin();
    const u32 lane = threadIdx.x % 32, t = threadIdx.x % FEW_HALF, half = threadIdx.x / FEW_HALF, warp = threadIdx.x / 32;
    const u64 head = blockIdx.x % heads, token = blockIdx.x / heads, to = (u64)blockIdx.x * k;
    if (threadIdx.x < 2) found[threadIdx.x] = 0;
    if (warp == 0) {
        u32 total;
        const u32 count = lane < k ? k / (lane + 1) : 0u, at = scan_warp(count, total);
        for (u32 b = 0; b < count; b++) table[at + b] = lane << 16 | b;
    }
    wait_for_previous();

    // The K-th greatest of 64 maxima of disjoint parts bounds the K-th best.
    const bool here = half < parts;
    const float* mine = scores + ((head * parts + (here ? half : 0)) * tile + token) * n;
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
        if (len > FEW_LIST && t < 32) select_by_bits(n, k, [&](u32 i) { return order(__ldcg(mine + i)); }, list[half]);
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
            ids_out[to + threadIdx.x] = ids[0][threadIdx.x];
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
            ids_out[to + place] = ids[0][pair >> 16] * n + ids[1][pair & 0xffffu];
        }
    } else if (warp == 0) {
        const u32 firsts = add_lowest(mine, n, k, keys[0], ids[0]);
        const u32 seconds = add_lowest(mine + (u64)tile * n, n, k, keys[1], ids[1]);
        select_by_bits(firsts * seconds, k, [&](u32 i) {
            return order(score_of(keys[0][i / seconds]) + score_of(keys[1][i % seconds]));
        }, best);
        finish_list(best, k);
        for (u32 i = lane; i < k; i += 32) {
            const u32 pair = index_of(best[i]);
            ids_out[to + i] = ids[0][pair / seconds] * n + ids[1][pair % seconds];
        }
    }
    __syncthreads();
    if (warp == 0) softmax_list(best, k, to, scores_out, weights_out);
}

// Packed keys as floats: row r of `out` is scale * code.
extern "C" __global__ void __launch_bounds__(256) decode_keys(const u8* __restrict__ keys, const float* __restrict__ scales,
                                                             u32 dim, u32 group, u64 len, float* __restrict__ out) {
    const u32 groups = scales ? (dim + group - 1) / group : 0;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += (u64)gridDim.x * blockDim.x) {
        float x[1];
        decode<ELEM, 1>(load_once<SIZE>(keys + i * SIZE), x);
        out[i] = scales ? __ldg(scales + i / dim * groups + (u32)(i % dim) / group) * x[0] : x[0];
    }
}

// Floats rounded to bf16, for the mode in which tensor cores make the scores.
extern "C" __global__ void __launch_bounds__(256) to_bf16(const float* __restrict__ x, u64 len, u16* __restrict__ out) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += (u64)gridDim.x * blockDim.x) {
        const u32 bits = __float_as_uint(x[i]);
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        out[i] = (u16)(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}

// The gradient of softmax weights becomes that of the scores: w * (dw - <w, dw>). A warp a token and head.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    softmax_backward(const float* __restrict__ weights, float* __restrict__ dweights, u64 rows, u32 k) {
    const u32 lane = threadIdx.x % 32;
    const u64 row = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    weights += row * k;
    dweights += row * k;
    float dot = 0.0f;
    for (u32 i = lane; i < k; i += 32) dot += weights[i] * dweights[i];
    dot = warp_sum(dot);
    for (u32 i = lane; i < k; i += 32) dweights[i] = weights[i] * (dweights[i] - dot);
}

// Entries `[T, H, P, K]` of the key table: which row each slot's sub-keys are, and the gradient of its score.
extern "C" __global__ void __launch_bounds__(256)
    key_entries(const u32* __restrict__ ids, const float* __restrict__ dscores, u64 entries, u32 heads, u32 parts, u32 n,
                u32 k, u64 slots, u32* __restrict__ rows, float* __restrict__ weights, u32* flag, u32 op) {
    for (u64 e = (u64)blockIdx.x * blockDim.x + threadIdx.x; e < entries; e += (u64)gridDim.x * blockDim.x) {
        const u64 half = e / k, th = half / parts;
        const u32 part = (u32)(half % parts), slot = (u32)(e % k);
        const u32 id = checked(ids[th * k + slot], slots, flag, op);
        const u32 key = parts == 1 ? id : part == 0 ? id / n : id % n;
        rows[e] = ((u32)(th % heads) * parts + part) * n + key;
        weights[e] = dscores[th * k + slot];
    }
}
