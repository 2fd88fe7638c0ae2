// What every kernel file needs: names of types, the error flag, and codes of rows as floats.
//
// All files are compiled with contraction off (`--fmad=false`): a product and a sum written apart stay apart, as the law
// of vertical sums wants. Where fusing is allowed it is written `fmaf`. No header of a CUDA toolkit is needed.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL 0xffffffffu
#define INF __int_as_float(0x7f800000)

// Formats of rows, as numbered in `kernels.rs`.
#define F32 0
#define F16 1
#define BF16 2
#define I8 3
#define E4M3 4
#define E5M2 5
// 4-bit integers in groups of 32 or 64 values, each group with its scale in front: two bytes of binary16, then the codes.
#define I4 6
#define I4X64 7
#ifndef ELEM
#define ELEM F32
#endif

#if ELEM == F32
#define SIZE 4
#elif ELEM == F16 || ELEM == BF16
#define SIZE 2
#else
#define SIZE 1
#endif

// Remembers the first row id that is out of range: `flag` is { operation, id, rows, rows >> 32 }. Whoever raises it goes
// on with a row that exists; the host finds it when it synchronizes.
__device__ __forceinline__ void raise_flag(u32* flag, u32 op, u32 id, u64 rows) {
    if (atomicCAS(flag, 0u, op) == 0u) {
        flag[1] = id;
        flag[2] = (u32)rows;
        flag[3] = (u32)(rows >> 32);
    }
}

// Whether an operation before this one, or one of this kernel's own blocks, raised the flag.
__device__ __forceinline__ bool flagged(const u32* flag) { return *(volatile const u32*)flag != 0u; }

// `id`, or row 0 and a raised flag. The host launches nothing over a table of no rows.
__device__ __forceinline__ u32 checked(u32 id, u64 rows, u32* flag, u32 op) {
    if (id >= rows) {
        raise_flag(flag, op, id, rows);
        return 0u;
    }
    return id;
}

// `n / d` for a divisor whose `magic` the host made: floor(2^64 / d) + 1, or 0 for d = 1. Exact for all 32-bit n.
__device__ __forceinline__ u32 divide(u32 n, u64 magic) { return magic == 0 ? n : (u32)__umul64hi((u64)n, magic); }

// So many bytes, as they are loaded.
template <int BYTES> struct Raw {
    u32 w[(BYTES + 3) / 4];
};

// Reads bytes that no thread of this kernel writes and that will not be read again soon.
template <int BYTES> __device__ __forceinline__ Raw<BYTES> load_once(const void* p) {
    Raw<BYTES> r;
    if constexpr (BYTES == 16) {
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3]) : "l"(p));
    } else if constexpr (BYTES == 8) {
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "l"(p));
    } else if constexpr (BYTES == 4) {
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r.w[0]) : "l"(p));
    } else if constexpr (BYTES == 2) {
        r.w[0] = __ldg((const u16*)p);
    } else {
        r.w[0] = __ldg((const u8*)p);
    }
    return r;
}

// The same, 16 bytes of a line whose rest another warp of the block reads at about the same time: by way of the first-level
// cache, where they meet.
__device__ __forceinline__ Raw<16> load_beside(const void* p) {
    Raw<16> r;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3]) : "l"(p));
    return r;
}

// Kernels that are launched "early" (see `Shape::early`) begin while the one before them still runs: before this wait they
// touch nothing but prefetches, behind it all that was launched before is over and seen. What the kernel before may have
// written is then read by `load_fresh`, for the loads of data that is constant while a kernel runs are not theirs.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets an early kernel that was launched next begin when all blocks of this one have.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// A wish: nothing is read, so it may come before the wait.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// As `load_once`, of what the kernel before may have written.
template <int BYTES> __device__ __forceinline__ Raw<BYTES> load_fresh(const void* p) {
    Raw<BYTES> r;
    if constexpr (BYTES == 16) {
        asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3]) : "l"(p) : "memory");
    } else if constexpr (BYTES == 8) {
        asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "l"(p) : "memory");
    } else if constexpr (BYTES == 4) {
        asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(r.w[0]) : "l"(p) : "memory");
    } else if constexpr (BYTES == 2) {
        u16 x;
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(p) : "memory");
        r.w[0] = x;
    } else {
        asm volatile("ld.global.u8 %0, [%1];" : "=r"(r.w[0]) : "l"(p) : "memory");
    }
    return r;
}
// Floats that many warps read: kept near.
__device__ __forceinline__ float4 load_near4(const float* p) {
    float4 v;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float load_near(const float* p) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ float half_to_float(u32 bits) {
    float f;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(bits));
    return f;
}

// Two codes of 16 bits each in `w`, or four of 8 bits, as floats.
template <int FORMAT, int NV> __device__ __forceinline__ void decode(const Raw<NV * SIZE>& raw, float (&x)[NV]) {
    if constexpr (FORMAT == F32) {
#pragma unroll
        for (int i = 0; i < NV; i++) x[i] = __uint_as_float(raw.w[i]);
    } else if constexpr (FORMAT == BF16) {
#pragma unroll
        for (int i = 0; i < NV; i++)
            x[i] = __uint_as_float(i % 2 == 0 ? raw.w[i / 2] << 16 : raw.w[i / 2] & 0xffff0000u);
    } else if constexpr (FORMAT == F16) {
#pragma unroll
        for (int i = 0; i < NV; i++) x[i] = half_to_float(i % 2 == 0 ? raw.w[i / 2] & 0xffffu : raw.w[i / 2] >> 16);
    } else if constexpr (FORMAT == I8) {
#pragma unroll
        for (int i = 0; i < NV; i++) {
            // Code + 128 as the low byte of 2^23's fraction: exact, and cheaper than the conversion unit.
            u32 biased = raw.w[i / 4] ^ 0x80808080u;
            x[i] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7650 | (i % 4))) - 8388736.0f;
        }
    } else if constexpr (FORMAT == E5M2) {
        // The upper byte of a half.
#pragma unroll
        for (int i = 0; i < NV; i++) x[i] = half_to_float(((raw.w[i / 4] >> (8 * (i % 4))) & 0xffu) << 8);
    } else {
#pragma unroll
        for (int i = 0; i < NV; i++) {
#if __CUDA_ARCH__ >= 890
            if (i % 2 == 0) {
                u32 pair = (raw.w[i / 4] >> (8 * (i % 4))) & 0xffffu, halves;
                asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.rn.f16x2.e4m3x2 %0, h; }" : "=r"(halves) : "r"(pair));
                x[i] = half_to_float(halves & 0xffffu);
                if (i + 1 < NV) x[i + 1 < NV ? i + 1 : i] = half_to_float(halves >> 16);
            }
#else
            // Exponent and fraction sit 2^120 too low once aligned; the product mends it, for subnormal codes too.
            u32 bits = (raw.w[i / 4] >> (8 * (i % 4))) & 0xffu;
            float finite = __uint_as_float((bits & 0x7fu) << 20) * __uint_as_float((127u + 120u) << 23);
            u32 value = (bits & 0x7fu) == 0x7fu ? 0x7fc00000u : __float_as_uint(finite);
            x[i] = __uint_as_float(value | ((bits & 0x80u) << 24));
#endif
        }
    }
}

// `n` floats in a row of memory, which 16-byte accesses may be used for if `aligned`.
template <int NV> __device__ __forceinline__ void read_floats(const float* p, bool aligned, float (&x)[NV]) {
    if (NV % 4 == 0 && aligned) {
#pragma unroll
        for (int i = 0; i < NV; i += 4) {
            float4 v = __ldg((const float4*)(p + i));
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < NV; i++) x[i] = __ldg(p + i);
    }
}
template <int NV> __device__ __forceinline__ void write_floats(float* p, bool aligned, const float (&x)[NV]) {
    if (NV % 4 == 0 && aligned) {
#pragma unroll
        for (int i = 0; i < NV; i += 4) *(float4*)(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < NV; i++) p[i] = x[i];
    }
}

// Writes what will not be read again soon, aligned to NV floats.
template <int NV> __device__ __forceinline__ void write_once(float* p, const float (&x)[NV]) {
    if constexpr (NV == 4) __stcs((float4*)p, make_float4(x[0], x[1], x[2], x[3]));
    else __stcs(p, x[0]);
}

// The code of `bits`, by what is added below the cut: it carries as it must, up to infinity. NaN stays NaN. The upper half
// counts.
__device__ __forceinline__ u32 round_up(u32 bits, u32 below) {
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits << 9 ? bits | 0x400000u : bits;
    return bits + below;
}

// What `round_up` rounds to nearest by, ties to even.
__device__ __forceinline__ u32 half_below(float x) { return 0x7fffu + (__float_as_uint(x) >> 16 & 1u); }

// Writes VEC values as bf16, each rounded by what is added below the cut; aligned to VEC codes. TAME: all of them are finite.
template <int VEC, bool TAME = false>
__device__ __forceinline__ void write_bf16(u16* p, const float (&x)[VEC], const u32 (&below)[VEC]) {
    u32 c[VEC];
    // Zero unless a value is infinite or NaN: one question for all of them.
    float finite = 0.0f;
#pragma unroll
    for (int i = 0; i < VEC; i++) finite = TAME ? 0.0f : fmaf(x[i], 0.0f, finite);
    if (TAME || finite == 0.0f) {
#pragma unroll
        for (int i = 0; i < VEC; i++) c[i] = __float_as_uint(x[i]) + below[i];
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i++) c[i] = round_up(__float_as_uint(x[i]), below[i]);
    }
    if constexpr (VEC == 4) {
        __stcs((uint2*)p, make_uint2(__byte_perm(c[0], c[1], 0x7632), __byte_perm(c[2], c[3], 0x7632)));
    } else {
        *p = (u16)(c[0] >> 16);
    }
}

// The bijection of core's `random::mix`.
__device__ __forceinline__ u64 mix(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// The sum over a warp; its order is fixed, so the same bits every time.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
    return x;
}

// A value's sum over a team of lanes, the value's number, and how many lanes beside each other have it.
struct TeamSum {
    float sum;
    u32 number, lanes;
};

// Sums over teams of `team` lanes, a power of two, of N values at once, no more than lanes and a power of two too: halves of
// the lanes take half of the values each, until a value is a group of lanes' own.
template <int N> __device__ __forceinline__ TeamSum team_sums(float (&x)[N], u32 team) {
    u32 offset = team / 2, number = 0;
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
        const bool upper = threadIdx.x & offset;
#pragma unroll
        for (int r = 0; r < half; r++) {
            const float keep = upper ? x[r + half] : x[r], give = upper ? x[r] : x[r + half];
            x[r] = keep + __shfl_xor_sync(FULL, give, offset);
        }
        number += upper ? half : 0;
        offset /= 2;
    }
    float sum = x[0];
    const u32 lanes = max(offset * 2, 1u);
    for (; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL, sum, offset);
    return {sum, number, lanes};
}
