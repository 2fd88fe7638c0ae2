// A table in the host's memory, and a cache of its rows on the device.
//
// Contract. `places` says where each of `rows` rows is in the cache, `names` which row is in each of `capacity` places (FULL
// where there is none), `stamps` which call used a place last; `now` is this call's number, larger than all before.
// `counts` is zeroed before each load; `missing` and `victims` have `capacity` elements. A load is four kernels: find, ages,
// choose, move. Rows of the call stay where they are, and those that have to go are the ones whose last use is longest ago,
// by powers of two. Which place a row gets is left to chance and changes no result.
//
// Host memory is read and written in place, by 16 bytes where rows allow it (`unit` divides both row sizes).

#define THREADS 256
#define EACH(i, len) for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (len); i += (u64)gridDim.x * blockDim.x)

// In `counts`: rows to load, victims among the oldest, victims among the next oldest, rows that are loaded, then places by age.
#define MISSES 0
#define OLDER 1
#define LEVEL 2
#define MOVED 3
#define AGES 4
// Ages of places: 0 is used by this call, 1 to 32 its binary digits, 33 empty.
#define EMPTY 33u

struct Cache {
    u32* places;
    u32* names;
    u32* stamps;
    u32* counts;
    u32* missing;
    u32* victims;
    u64 rows;
    u32 capacity;
    u32 now;
};

// Where rows and their states are: on the host and in the cache, with bytes a row.
struct Part {
    u8* host;
    u8* device;
    u64 bytes;
};

__device__ __forceinline__ u32 age(const Cache& cache, u64 place) {
    return cache.names[place] == FULL ? EMPTY : 32u - __clz(cache.now - cache.stamps[place]);
}

// Marks the rows of a plan that are there, and lists the others.
extern "C" __global__ void __launch_bounds__(THREADS) cache_find(Cache cache, const u32* unique, const u32* rows, u32 len,
                                                                 u32* flag, u32 op) {
    const u32 count = min(*unique, len);
    if (count > cache.capacity && blockIdx.x == 0 && threadIdx.x == 0) raise_flag(flag, op, count, cache.capacity);
    EACH(u, count) {
        const u32 id = rows[u];
        if (id >= cache.rows) {
            raise_flag(flag, op, id, cache.rows);
            continue;
        }
        const u32 place = cache.places[id];
        if (place != FULL) {
            cache.stamps[place] = cache.now;
        } else {
            const u32 miss = atomicAdd(cache.counts + MISSES, 1u);
            if (miss < cache.capacity) cache.missing[miss] = id;
        }
    }
}

// Counts places by age.
extern "C" __global__ void __launch_bounds__(THREADS) cache_ages(Cache cache) {
    __shared__ u32 ages[EMPTY + 1];
    if (cache.counts[MISSES] == 0) return;
    for (u32 i = threadIdx.x; i <= EMPTY; i += blockDim.x) ages[i] = 0;
    __syncthreads();
    EACH(place, cache.capacity) atomicAdd(ages + age(cache, place), 1u);
    __syncthreads();
    for (u32 i = threadIdx.x; i <= EMPTY; i += blockDim.x) {
        if (ages[i]) atomicAdd(cache.counts + AGES + i, ages[i]);
    }
}

// Lists as many of the oldest places as rows are missing.
extern "C" __global__ void __launch_bounds__(THREADS) cache_choose(Cache cache) {
    __shared__ u32 level, before;
    const u32 needed = min(cache.counts[MISSES], cache.capacity);
    if (needed == 0) return;
    if (threadIdx.x == 0) {
        u32 older = 0, l = EMPTY;
        while (l > 1 && older + cache.counts[AGES + l] < needed) older += cache.counts[AGES + l--];
        level = l, before = older;
        if (blockIdx.x == 0) cache.counts[MOVED] = min(needed, older + cache.counts[AGES + l]);
    }
    __syncthreads();
    EACH(place, cache.capacity) {
        const u32 a = age(cache, place);
        if (a < level) continue;
        const u32 at = a > level ? atomicAdd(cache.counts + OLDER, 1u) : before + atomicAdd(cache.counts + LEVEL, 1u);
        if (at < needed) cache.victims[at] = (u32)place;
    }
}

// Copies `bytes` by the whole block, `unit` at a time.
__device__ __forceinline__ void copy_row(u8* to, const u8* from, u64 bytes, u32 unit) {
    if (unit == 16) {
        for (u64 i = threadIdx.x; i < bytes / 16; i += blockDim.x) ((uint4*)to)[i] = ((const uint4*)from)[i];
    } else if (unit == 4) {
        for (u64 i = threadIdx.x; i < bytes / 4; i += blockDim.x) ((u32*)to)[i] = ((const u32*)from)[i];
    } else {
        for (u64 i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
    }
}

__device__ __forceinline__ void to_host(const Part& part, u32 id, u32 place, u32 unit) {
    copy_row(part.host + id * part.bytes, part.device + place * part.bytes, part.bytes, unit);
}
__device__ __forceinline__ void to_device(const Part& part, u32 id, u32 place, u32 unit) {
    copy_row(part.device + place * part.bytes, part.host + id * part.bytes, part.bytes, unit);
}

// Puts the missing rows where the victims are, which go back to the host if rows have `changed`. A block a row.
extern "C" __global__ void __launch_bounds__(128) cache_move(Cache cache, Part codes, Part state, u32 unit, u32 changed) {
    const u32 moved = cache.counts[MOVED];
    for (u32 i = blockIdx.x; i < moved; i += gridDim.x) {
        const u32 place = cache.victims[i], id = cache.missing[i], old = cache.names[place];
        if (changed && old != FULL) {
            to_host(codes, old, place, unit);
            to_host(state, old, place, unit);
        }
        __syncthreads();
        to_device(codes, id, place, unit);
        to_device(state, id, place, unit);
        if (threadIdx.x == 0) {
            if (old != FULL) cache.places[old] = FULL;
            cache.names[place] = id;
            cache.places[id] = place;
            cache.stamps[place] = cache.now;
        }
    }
}

// Where rows are, all of `ids` or the first `*count`; one that is not there raises the flag. `out` may be `ids`.
extern "C" __global__ void __launch_bounds__(THREADS) cache_translate(Cache cache, const u32* ids, u64 len, const u32* count,
                                                                      u32* out, u32* flag, u32 op) {
    const u64 wanted = count ? min(len, (u64)*count) : len;
    EACH(i, wanted) {
        const u32 id = ids[i], place = id < cache.rows ? cache.places[id] : FULL;
        if (place == FULL) raise_flag(flag, op, id, cache.rows);
        out[i] = place == FULL ? 0u : place;
    }
}

// Empties the cache; rows that may have `changed` go back to the host. A block a place.
extern "C" __global__ void __launch_bounds__(128) cache_flush(Cache cache, Part codes, Part state, u32 unit, u32 changed) {
    for (u32 place = blockIdx.x; place < cache.capacity; place += gridDim.x) {
        const u32 id = cache.names[place];
        if (id == FULL) continue;
        if (changed) {
            to_host(codes, id, place, unit);
            to_host(state, id, place, unit);
        }
        __syncthreads();
        if (threadIdx.x == 0) cache.places[id] = FULL, cache.names[place] = FULL;
    }
}
