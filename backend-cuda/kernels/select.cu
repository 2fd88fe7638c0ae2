// Selection: scores of sub-keys, the best K of each half, the best K pairs, their softmax; and the way back.
//
// Contract. A half is a row of `n` scores; there are `parts` (1 or 2) for a token and head. Scores of a tile of tokens lie as
// `[heads * parts, tile, n]`. Lists are `[tile, heads, parts, k]`: order keys (see `order`) and sub-keys, best first.
//
// The law: descending; a NaN is greatest; equal ones by lower index. A score and its index make one 64-bit number whose
// descending order is the law's (`composite`), so any exact selection of the greatest gives the same result in any order
// of work. A warp selects: it bounds the K-th best from below by maxima of 2K disjoint parts, collects what is not
// smaller, and sorts that; where ties make that too much for its list it finds the K-th best bit by bit.
//
// For finite scores the best K of each half decide, and of their pairs only those with (a + 1)(b + 1) <= K. Where a half's
// best is +inf or NaN, sub-keys of -inf can win too (+inf - inf is NaN): then all pairs of the best K and up to K more of -inf
// are tried, as core's `half_candidates` and `best_pairs` do.

#define SELECT_THREADS 128

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

// The best `k` of a half into a list of `capacity` places, sorted.
__device__ __forceinline__ void select_half(const float* __restrict__ scores, u32 n, u32 k, u64* list, u32 capacity) {
    const u32 lane = threadIdx.x % 32;
    // Two maxima a lane bound the K-th best of K <= 32; for greater K, bits decide from the start.
    float bound = -INF;
    if (k <= 32) {
        float even = -INF, odd = -INF;
        u32 i = lane;
#pragma unroll 4
        for (; i + 32 < n; i += 64) {
            even = fmaxf(even, scores[i]);
            odd = fmaxf(odd, scores[i + 32]);
        }
        if (i < n) even = fmaxf(even, scores[i]);
        const u32 a = order(even), b = order(odd);
        u32 low = __reduce_min_sync(FULL, min(a, b)), high = __reduce_max_sync(FULL, max(a, b));
        // At least K maxima are not smaller than `low`; a few steps bring it near the K-th greatest.
#pragma unroll 1
        for (int step = 0; step < 14 && low < high; step++) {
            const u32 middle = low + (high - low + 1) / 2;
            const u32 enough = __popc(__ballot_sync(FULL, a >= middle)) + __popc(__ballot_sync(FULL, b >= middle));
            if (enough >= k) low = middle;
            else high = middle - 1;
        }
        bound = score_of(low);
    }
    u32 len = 0;
    if (k <= 32 || n <= capacity) {
#pragma unroll 4
        for (u32 base = 0; base < n; base += 32) {
            const u32 i = base + lane;
            const float score = i < n ? scores[i] : 0.0f;
            // Not smaller, or NaN.
            const bool taken = i < n && !(score < bound);
            const u32 ballot = __ballot_sync(FULL, taken);
            const u32 at = len + __popc(ballot & ((1u << lane) - 1));
            if (taken && at < capacity) list[at] = composite(order(score), i);
            len += __popc(ballot);
        }
        __syncwarp();
    } else {
        len = FULL;
    }
    if (len > capacity) {
        select_by_bits(n, k, [&](u32 i) { return order(scores[i]); }, list);
        len = k;
    }
    finish_list(list, len);
}

// A warp a half. `row` of a tile: ((token * heads + head) * parts + part).
extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    select_halves(const float* __restrict__ scores, u32 tile, u32 halves, u32 n, u32 k, u32 capacity,
                  u32* __restrict__ keys_out, u32* __restrict__ ids_out) {
    extern __shared__ __align__(16) u64 lists[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 row = (u64)blockIdx.x * (blockDim.x / 32) + warp;
    if (row >= (u64)tile * halves) return;
    const u64 token = row / halves, half = row % halves;
    u64* list = lists + warp * capacity;
    select_half(scores + (half * tile + token) * n, n, k, list, capacity);
    for (u32 i = lane; i < k; i += 32) {
        keys_out[row * k + i] = (u32)(list[i] >> 32);
        ids_out[row * k + i] = index_of(list[i]);
    }
}

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

// The best pairs of a token and head, a warp each. `pairs` is the number of (a, b) with (a+1)(b+1) <= k, and
// `capacity` a power of two that is not less. Shared memory: for each warp a list of `capacity` places and four times 2k
// numbers, and one table of the pairs.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    select_pairs(const float* __restrict__ scores, u32 tile, u32 heads, u32 parts, u32 n, u32 k, u32 pairs, u32 capacity,
                 const u32* __restrict__ keys, const u32* __restrict__ ids, u32* __restrict__ ids_out,
                 float* __restrict__ scores_out, float* __restrict__ weights_out) {
    extern __shared__ __align__(16) u64 lists[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u64* list = lists + warp * (capacity + 4 * k);
    u32* first_keys = (u32*)(list + capacity);
    u32* first_ids = first_keys + 2 * k;
    u32* second_keys = first_keys + 4 * k;
    u32* second_ids = first_keys + 6 * k;
    u32* table = (u32*)(lists + warps * (capacity + 4 * k));
    // Row a of the table has the pairs (a, 0), (a, 1), ...: in order of position.
    if (parts == 2) {
        for (u32 a = threadIdx.x; a < k; a += blockDim.x) {
            u32 at = 0;
            for (u32 before = 0; before < a; before++) at += k / (before + 1);
            for (u32 b = 0; b < k / (a + 1); b++) table[at + b] = a << 16 | b;
        }
    }
    __syncthreads();
    const u64 row = (u64)blockIdx.x * warps + warp;
    if (row >= (u64)tile * heads) return;
    const u64 from = row * parts * k, to = row * k;
    if (parts == 1) {
        for (u32 i = lane; i < k; i += 32) {
            list[i] = composite(keys[from + i], i);
            ids_out[to + i] = ids[from + i];
        }
        __syncwarp();
        softmax_list(list, k, to, scores_out, weights_out);
        return;
    }
    for (u32 i = lane; i < k; i += 32) {
        first_keys[i] = keys[from + i];
        first_ids[i] = ids[from + i];
        second_keys[i] = keys[from + k + i];
        second_ids[i] = ids[from + k + i];
    }
    __syncwarp();
    if (first_keys[0] < PLUS_INF && second_keys[0] < PLUS_INF) {
        for (u32 p = lane; p < pairs; p += 32) {
            const u32 a = table[p] >> 16, b = table[p] & 0xffffu;
            list[p] = composite(order(score_of(first_keys[a]) + score_of(second_keys[b])), table[p]);
        }
        finish_list(list, pairs);
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

// Scores for few tokens: a warp a sub-key, which it reads once for up to four tokens. Every score is a horizontal sum.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    select_scores(const u8* __restrict__ keys, const float* __restrict__ scales, u32 group, const float* __restrict__ queries,
                  u32 tokens, u32 halves, u32 n, u32 dim, u32 wide, float* __restrict__ scores) {
    const u32 lane = threadIdx.x % 32;
    const u64 row = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= (u64)halves * n) return;
    const u32 half = (u32)(row / n), key = (u32)(row % n);
    const u32 groups = scales ? (dim + group - 1) / group : 0;
    const float* scale = scales + row * groups;
    const u8* codes = keys + row * dim * SIZE;
    for (u32 first = 0; first < tokens; first += 4) {
        float dot[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (wide) {
#pragma unroll 2
            for (u32 c = lane * 4; c < dim; c += 128) {
                float x[4];
                decode<ELEM, 4>(load_once<4 * SIZE>(codes + (u64)c * SIZE), x);
#pragma unroll
                for (u32 t = 0; t < 4; t++) {
                    if (first + t < tokens) {
                        const float4 q = __ldg((const float4*)(queries + ((u64)(first + t) * halves + half) * dim + c));
                        float part = fmaf(q.w, x[3], fmaf(q.z, x[2], fmaf(q.y, x[1], q.x * x[0])));
                        dot[t] = groups > 1 ? fmaf(__ldg(scale + c / group), part, dot[t]) : dot[t] + part;
                    }
                }
            }
        } else {
            for (u32 c = lane; c < dim; c += 32) {
                float x[1];
                decode<ELEM, 1>(load_once<SIZE>(codes + (u64)c * SIZE), x);
                if (groups > 1) x[0] *= __ldg(scale + c / group);
#pragma unroll
                for (u32 t = 0; t < 4; t++) {
                    if (first + t < tokens)
                        dot[t] = fmaf(__ldg(queries + ((u64)(first + t) * halves + half) * dim + c), x[0], dot[t]);
                }
            }
        }
#pragma unroll
        for (u32 t = 0; t < 4; t++) {
            const float sum = warp_sum(dot[t]);
            if (lane == 0 && first + t < tokens)
                scores[((u64)half * tokens + first + t) * n + key] = groups == 1 ? __ldg(scale) * sum : sum;
        }
    }
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
