// The dense rest but its products: bias, norms and gates, forward and backward, and steps of dense parameters. All is in f32.
//
// Sums over tokens are made by one block a column in a fixed order, so results are the same every time.

#define THREADS 256
#define STRIPES 32

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
// The distribution function of the normal distribution: exact GELU is x times it.
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * (1.0f + erff(x * 0.70710678118654752f)); }

#define EACH(i, len) \
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (len); i += (u64)gridDim.x * blockDim.x)

// out[t, o] += bias[o].
extern "C" __global__ void __launch_bounds__(THREADS) add_bias(float* __restrict__ out, const float* __restrict__ bias,
                                                              u64 len, u32 width) {
    EACH(i, len) out[i] += __ldg(bias + i % width);
}

// out[t, o] = <x[t], weight[o]> + bias[o] for few tokens: a warp an output, whose weights it reads once for TOKENS tokens.
// `wide` says that rows are aligned to 16 bytes; `bias` may be null. A horizontal sum.
#define LINEAR_THREADS 128
#define FLIGHT 8
template <int TOKENS>
__device__ __forceinline__ void linear_rows(const float* x, const float* weight, const float* bias, u32 tokens, u32 inputs,
                                            u32 outputs, u32 wide, float* out) {
    let_next_begin();
    const u32 lane = threadIdx.x % 32, o = blockIdx.x * (LINEAR_THREADS / 32) + threadIdx.x / 32;
    if (o >= outputs) return wait_for_previous();
    weight += (u64)o * inputs;
    for (u32 c = lane * 32; c < inputs; c += 32 * 32) prefetch(weight + c);
    wait_for_previous();
    const float shift = bias ? load_near(bias + o) : 0.0f;
    for (u32 first = 0; first < tokens; first += TOKENS) {
        // Behind the last token that one is read again, and not written.
        const float* from[TOKENS];
        float dot[TOKENS];
#pragma unroll
        for (u32 t = 0; t < TOKENS; t++) from[t] = x + (u64)min(first + t, tokens - 1) * inputs, dot[t] = 0.0f;
        if (wide) {
            for (u32 base = lane * 4; base < inputs; base += 128 * FLIGHT) {
                Raw<16> raw[FLIGHT];
#pragma unroll
                for (u32 j = 0; j < FLIGHT; j++) {
                    if (base + 128 * j < inputs) raw[j] = load_fresh<16>(weight + base + 128 * j);
                }
#pragma unroll
                for (u32 j = 0; j < FLIGHT; j++) {
                    if (base + 128 * j < inputs) {
                        float w[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) w[i] = __uint_as_float(raw[j].w[i]);
#pragma unroll
                        for (u32 t = 0; t < TOKENS; t++) {
                            const float4 v = load_near4(from[t] + base + 128 * j);
                            dot[t] += fmaf(v.w, w[3], fmaf(v.z, w[2], fmaf(v.y, w[1], v.x * w[0])));
                        }
                    }
                }
            }
        } else {
            for (u32 c = lane; c < inputs; c += 32) {
                const float w = load_near(weight + c);
#pragma unroll
                for (u32 t = 0; t < TOKENS; t++) dot[t] = fmaf(load_near(from[t] + c), w, dot[t]);
            }
        }
#pragma unroll
        for (u32 t = 0; t < TOKENS; t++) {
            const float sum = warp_sum(dot[t]);
            if (lane == 0 && first + t < tokens) out[(first + t) * (u64)outputs + o] = sum + shift;
        }
    }
}
#define LINEAR(TOKENS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LINEAR_THREADS)                                                       \
        linear_##TOKENS(const float* x, const float* weight, const float* bias, u32 tokens, u32 inputs, u32 outputs,   \
                        u32 wide, float* out) {                                                                        \
        linear_rows<TOKENS>(x, weight, bias, tokens, inputs, outputs, wide, out);                                      \
    }
LINEAR(1)
LINEAR(4)

// out[c] = sum over rows of x[r, c]: STRIPES warps take every STRIPES-th row each, and are added in order. A block for 32 columns.
extern "C" __global__ void __launch_bounds__(STRIPES * 32) column_sums(const float* __restrict__ x, u32 rows, u32 width,
                                                                      float* __restrict__ out) {
    __shared__ float partial[STRIPES][33];
    const u32 lane = threadIdx.x % 32, stripe = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 8
        for (u32 r = stripe; r < rows; r += STRIPES) sum += __ldg(x + (u64)r * width + column);
    }
    partial[stripe][lane] = sum;
    __syncthreads();
    if (stripe == 0 && column < width) {
        for (u32 s = 1; s < STRIPES; s++) sum += partial[s][lane];
        out[column] = sum;
    }
}

// 1 / sqrt(mean of squares + eps) of a row, by a warp.
__device__ __forceinline__ float inverse_rms(const float* __restrict__ x, u32 dim, float eps) {
    float sum = 0.0f;
    for (u32 c = threadIdx.x % 32; c < dim; c += 32) sum = fmaf(x[c], x[c], sum);
    return 1.0f / sqrtf(warp_sum(sum) / (float)dim + eps);
}

// A warp a row; row r has gain (r / repeat) % groups. The first pieces of a row stay in registers, and their gain is fetched
// with them: of a single token there is nothing else to hide how far they are.
#define PIECES 8
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const float* x, const float* gain, float* out, u64 rows,
                                                              u32 dim, u32 groups, u64 repeat, float eps) {
    let_next_begin();
    const u32 lane = threadIdx.x % 32;
    const u64 r = (u64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const u64 group = rows >> 32 ? r / repeat % groups : (u32)r / (u32)min(repeat, rows) % groups;
    wait_for_previous();
    if (r >= rows) return;
    x += r * dim, out += r * dim, gain += group * dim;
    float v[PIECES], g[PIECES], sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < PIECES; j++) {
        const u32 c = lane + 32 * j;
        v[j] = c < dim ? load_near(x + c) : 0.0f;
        g[j] = c < dim ? load_near(gain + c) : 0.0f;
    }
#pragma unroll
    for (u32 j = 0; j < PIECES; j++) sum = fmaf(v[j], v[j], sum);
#pragma unroll 4
    for (u32 c = lane + 32 * PIECES; c < dim; c += 32) sum = fmaf(x[c], x[c], sum);
    const float inverse = 1.0f / sqrtf(warp_sum(sum) / (float)dim + eps);
#pragma unroll
    for (u32 j = 0; j < PIECES; j++) {
        if (lane + 32 * j < dim) out[lane + 32 * j] = v[j] * inverse * g[j];
    }
    for (u32 c = lane + 32 * PIECES; c < dim; c += 32) out[c] = x[c] * inverse * gain[c];
}

// dx holds the gradient of the output, and then that of x.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_backward(const float* __restrict__ x, const float* __restrict__ gain, float* __restrict__ dx, u64 rows, u32 dim,
                      u32 groups, u64 repeat, float eps) {
    const u64 r = (u64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (r >= rows) return;
    x += r * dim, dx += r * dim, gain += r / repeat % groups * dim;
    const float inverse = inverse_rms(x, dim, eps);
    float mean = 0.0f;
    for (u32 c = threadIdx.x % 32; c < dim; c += 32) mean += dx[c] * __ldg(gain + c) * (x[c] * inverse);
    mean = warp_sum(mean) / (float)dim;
    for (u32 c = threadIdx.x % 32; c < dim; c += 32)
        dx[c] = (dx[c] * __ldg(gain + c) - x[c] * inverse * mean) * inverse;
}

// dgain[g, c] = sum over the rows of group g of dout * x / rms, before `rms_norm_backward` overwrites dout. A block for a
// group and 32 columns; its warps take stripes of rows.
extern "C" __global__ void __launch_bounds__(STRIPES * 32)
    rms_norm_dgain(const float* __restrict__ x, const float* __restrict__ dout, float* __restrict__ dgain, u64 rows, u32 dim,
                   u32 groups, u64 repeat, float eps) {
    __shared__ float partial[STRIPES][33];
    const u32 lane = threadIdx.x % 32, stripe = threadIdx.x / 32, column = blockIdx.x * 32 + lane, group = blockIdx.y;
    float sum = 0.0f;
    // Runs of `repeat` rows of this group follow each other at a distance of `repeat * groups`.
    const u64 runs = (rows + repeat * groups - 1) / (repeat * groups);
    for (u64 i = stripe; i < runs * repeat; i += STRIPES) {
        const u64 r = (i / repeat * groups + group) * repeat + i % repeat;
        if (r >= rows) break;
        const float inverse = inverse_rms(x + r * dim, dim, eps);
        if (column < dim) sum += dout[r * dim + column] * (x[r * dim + column] * inverse);
    }
    partial[stripe][lane] = sum;
    __syncthreads();
    if (stripe == 0 && column < dim) {
        for (u32 s = 1; s < STRIPES; s++) sum += partial[s][lane];
        dgain[(u64)group * dim + column] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_gate(const float* y, const float* gate, float* out, u64 len) {
    let_next_begin();
    wait_for_previous();
    EACH(i, len) out[i] = y[i] * (gate[i] * sigmoid(gate[i]));
}
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_gate_backward(const float* __restrict__ y, const float* __restrict__ gate, const float* __restrict__ dout,
                       float* __restrict__ dy, float* __restrict__ dgate, u64 len) {
    EACH(i, len) {
        const float g = gate[i], s = sigmoid(g), d = dout[i];
        const float dg = d * y[i] * (s + g * s * (1.0f - s));
        dy[i] = d * (g * s);
        dgate[i] = dg;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gelu_gate(const float* y, const float* gate, float* out, u64 len) {
    let_next_begin();
    wait_for_previous();
    EACH(i, len) out[i] = y[i] * (gate[i] * normal_cdf(gate[i]));
}
extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_gate_backward(const float* __restrict__ y, const float* __restrict__ gate, const float* __restrict__ dout,
                       float* __restrict__ dy, float* __restrict__ dgate, u64 len) {
    EACH(i, len) {
        const float g = gate[i], d = dout[i], cdf = normal_cdf(g);
        // The density of the normal distribution is exp(-g^2 / 2) / sqrt(2 pi).
        const float density = 0.39894228040143268f * expf(g * g * -0.5f);
        const float dg = d * y[i] * (cdf + g * density);
        dy[i] = d * (g * cdf);
        dgate[i] = dg;
    }
}

// One gate a token.
extern "C" __global__ void __launch_bounds__(THREADS) sigmoid_gate(const float* y, const float* gate, float* out, u64 len,
                                                                  u32 width) {
    let_next_begin();
    wait_for_previous();
    EACH(i, len) out[i] = y[i] * sigmoid(gate[i / width]);
}
// A warp a token.
extern "C" __global__ void __launch_bounds__(THREADS)
    sigmoid_gate_backward(const float* __restrict__ y, const float* __restrict__ gate, const float* __restrict__ dout,
                          float* __restrict__ dy, float* __restrict__ dgate, u64 tokens, u32 width) {
    const u64 t = (u64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (t >= tokens) return;
    const float s = sigmoid(gate[t]);
    float sum = 0.0f;
    for (u32 c = threadIdx.x % 32; c < width; c += 32) {
        const u64 i = t * width + c;
        sum += dout[i] * y[i] * (s * (1.0f - s));
        dy[i] = dout[i] * s;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) dgate[t] = sum;
}

// The factors of `AdamW` in `ops/adamw.rs`.
struct AdamW {
    float rate, eps, beta1, beta2, scale, keep;
};

// A step of `len` values and their moments, each operation apart.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(AdamW s, const float* __restrict__ grad, float* __restrict__ x, float* __restrict__ first,
          float* __restrict__ second, u64 len) {
    EACH(i, len) {
        const float g = grad[i] * s.scale;
        const float m = s.beta1 * first[i] + (1.0f - s.beta1) * g;
        const float v = s.beta2 * second[i] + (1.0f - s.beta2) * g * g;
        first[i] = m;
        second[i] = v;
        x[i] = s.keep * x[i] - s.rate * m / (sqrtf(v) + s.eps);
    }
}

// The sum over a block, in its first thread.
__device__ __forceinline__ float sum_block(float x) {
    __shared__ float warp_sums[THREADS / 32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < THREADS / 32; w++) sum += warp_sums[w];
    return sum;
}

// The sums of the squares of `len` values, one for each block. Horizontal, their order fixed by the launch.
extern "C" __global__ void __launch_bounds__(THREADS) squares(const float* __restrict__ x, u64 len, float* __restrict__ sums) {
    float sum = 0.0f;
    EACH(i, len) sum = fmaf(x[i], x[i], sum);
    sum = sum_block(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The sum of `len` sums, by one block.
extern "C" __global__ void __launch_bounds__(THREADS) total(const float* __restrict__ sums, u64 len, float* __restrict__ out) {
    float sum = 0.0f;
    EACH(i, len) sum += sums[i];
    sum = sum_block(sum);
    if (threadIdx.x == 0) *out = sum;
}
