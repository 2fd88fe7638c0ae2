// Selection: scores of sub-keys, the best K of each half, the best K pairs, their softmax; and the way back.
//
// Contract. A half is a row of `n` scores; there are `parts` (1 or 2) for a token and head. Scores of a tile of tokens lie as
// `[heads * parts, tile, n]`. Lists are `[tile, heads, parts, k]`: order keys (see `order`) and sub-keys, best first.

#define SELECT_THREADS 128

// The lists of a block's warps, and what else the kernel says.
extern __shared__ __align__(16) u64 lists[];

// A part of a half in a warp's registers: x[j] is score number base + 32 j + lane, or -inf behind the end.
#define PART 1024
__device__ __forceinline__ void load_part(const float* __restrict__ scores, u32 base, u32 n, float (&x)[32]) {
    const u32 first = base + threadIdx.x % 32;
#pragma unroll
    for (u32 j = 0; j < 32; j++) x[j] = first + 32 * j < n ? __ldg(scores + first + 32 * j) : -INF;
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
    u32 keys[SETS], least = FULL;
#pragma unroll
    for (int s = 0; s < SETS; s++) keys[s] = order(best[s]), least = min(least, keys[s]);
    const float bound = score_of(bound_keys<SETS>(keys, __reduce_min_sync(FULL, least), k, 10));
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
    // The pairs (0, b) are k that the last of them bounds.
    const u32 bound = bound_keys<4>(keys, order(score_of(first_keys[0]) + score_of(second_keys[k - 1])), k, 10);
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
            if (warp == 0) list_pairs(k, table);
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

// Scores for few tokens: a warp takes KEYS neighbouring sub-keys of a half, and reads them once for TOKENS tokens. Every score
// is a horizontal sum.
#define KEYS 4
template <int TOKENS>
__device__ __forceinline__ void score_keys(const u8* keys, const float* scales, u32 group, const float* queries, u32 tokens,
                                           u32 halves, u32 n, u32 dim, u32 wide, float* scores) {
    let_next_begin();
    const u32 lane = threadIdx.x % 32, warps = (n + KEYS - 1) / KEYS, warp = blockIdx.x * (SELECT_THREADS / 32) + threadIdx.x / 32;
    if (warp >= halves * warps) return wait_for_previous();
    const u32 half = warp / warps, key = warp % warps * KEYS, count = min((u32)KEYS, n - key);
    const u32 groups = scales ? (dim + group - 1) / group : 0;
    const u64 row = (u64)half * n + key, stride = (u64)dim * SIZE;
    const u8* codes = keys + row * stride;
    for (u64 at = lane * 128; at < count * stride; at += 32 * 128) prefetch(codes + at);
    wait_for_previous();
    for (u32 first = 0; first < tokens; first += TOKENS) {
        // Behind the last token and the last sub-key those are read again, and not written.
        const float* q[TOKENS];
        float dot[KEYS][TOKENS];
#pragma unroll
        for (u32 t = 0; t < TOKENS; t++) {
            q[t] = queries + ((u64)min(first + t, tokens - 1) * halves + half) * dim;
#pragma unroll
            for (u32 r = 0; r < KEYS; r++) dot[r][t] = 0.0f;
        }
        if (wide) {
#pragma unroll 2
            for (u32 c = lane * 4; c < dim; c += 128) {
                Raw<4 * SIZE> raw[KEYS];
                float4 v[TOKENS];
#pragma unroll
                for (u32 r = 0; r < KEYS; r++) raw[r] = load_fresh<4 * SIZE>(codes + min(r, count - 1) * stride + (u64)c * SIZE);
#pragma unroll
                for (u32 t = 0; t < TOKENS; t++) v[t] = load_near4(q[t] + c);
#pragma unroll
                for (u32 r = 0; r < KEYS; r++) {
                    float x[4];
                    decode<ELEM, 4>(raw[r], x);
                    const float scale = groups > 1 ? load_near(scales + (row + min(r, count - 1)) * groups + c / group) : 1.0f;
#pragma unroll
                    for (u32 t = 0; t < TOKENS; t++) {
                        const float part = fmaf(v[t].w, x[3], fmaf(v[t].z, x[2], fmaf(v[t].y, x[1], v[t].x * x[0])));
                        dot[r][t] = fmaf(scale, part, dot[r][t]);
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
                    for (u32 t = 0; t < TOKENS; t++) dot[r][t] = fmaf(load_near(q[t] + c), x[0], dot[r][t]);
                }
            }
        }
#pragma unroll
        for (u32 t = 0; t < TOKENS; t++) {
            float mine = 0.0f;
#pragma unroll
            for (u32 r = 0; r < KEYS; r++) {
                const float sum = warp_sum(dot[r][t]);
                if (lane == r) mine = sum;
            }
            if (groups == 1 && lane < count) mine *= load_near(scales + row + lane);
            if (lane < count && first + t < tokens) scores[((u64)half * tokens + first + t) * n + key + lane] = mine;
        }
    }
}
// With a bound of four blocks, for the compiler takes 64 registers of its own accord, and spills.
#define SCORES(TOKENS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 4)                                                   \
        select_scores_##TOKENS(const u8* keys, const float* scales, u32 group, const float* queries, u32 tokens,      \
                               u32 halves, u32 n, u32 dim, u32 wide, float* scores) {                                 \
        score_keys<TOKENS>(keys, scales, group, queries, tokens, halves, n, dim, wide, scores);                       \
    }
SCORES(1)
SCORES(4)

// The choice for few tokens and K up to 32: a block a token and head.
extern "C" __global__ void __launch_bounds__(FEW_THREADS)
    select_few(const float* scores, u32 tile, u32 heads, u32 parts, u32 n, u32 k, u32 pairs, u32* ids_out, float* scores_out,
               float* weights_out) {
    let_next_begin();
    const u64 head = blockIdx.x % heads, token = blockIdx.x / heads, to = (u64)blockIdx.x * k;
    choose_block(scores + (head * parts * tile + token) * n, (u64)tile * n, parts, n, k, pairs, ids_out + to, scores_out + to,
                 weights_out + to);
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

// Floats rounded to bf16, four at once where both sides are aligned to that.
extern "C" __global__ void __launch_bounds__(256) to_bf16(const float* __restrict__ x, u64 len, u16* __restrict__ out) {
    const u64 fours = (u64)x % 16 == 0 && (u64)out % 8 == 0 ? len / 4 : 0;
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x, threads = (u64)gridDim.x * blockDim.x;
    for (u64 i = first; i < fours; i += threads) {
        const float4 v = __ldg((const float4*)x + i);
        ((uint2*)out)[i] = make_uint2(bf16_bits(v.x) | bf16_bits(v.y) << 16, bf16_bits(v.z) | bf16_bits(v.w) << 16);
    }
    for (u64 i = 4 * fours + first; i < len; i += threads) out[i] = (u16)bf16_bits(x[i]);
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
