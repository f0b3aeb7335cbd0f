// Chooses a token for each row of logits, as sample.rs does.
//
// sample(logits, vocabulary, draws, slots, out, last): grid (rows), block 1024, no dynamic shared memory (8.5 KiB static).
//   logits: f32 [rows, vocabulary]. vocabulary: 1 to 2^20.
//   draws: u32 [rows, 6]: temperature (f32 bits), top-k, top-p (f32 bits), seed low, seed high, position.
//   slots: u32 [rows]: below MAX_SLOTS where the id is kept, else all ones.
//   out: u32 [rows, 2]: the id, and the logarithm of its probability (f32 bits) under softmax(logits).
//   last: u32 [MAX_SLOTS]: ids by slot.
// keep_sampled(chosen, rows, slots, last): keeps what another rank gave for `out`; grid (rows / 256), block 256.
//
// Weights e^((logit − max) / temperature) are computed anew in each pass over the row, which stays in L2. What counts is kept as
// a threshold: the bits of the lightest weight that counts, which are ordered as the weights are, and the last id that counts
// among those of just this weight. Both truncations find theirs digit by digit, with histograms of integers: exact, hence
// independent of the order of the atomics. Everything else is added in an order that depends on the vocabulary alone.
#include "sample.cuh"

static constexpr i32 THREADS = 1024;
static constexpr i32 WARPS = THREADS / 32;
static_assert(WARPS == 32, "the lanes of a warp take one warp's sum each");
// Weights are at most 1, so 30 bits tell them apart: three digits, the first of 7 bits of exponent and 3 of mantissa.
static constexpr i32 DIGIT_BITS = 10;
static constexpr i32 BINS = 1 << DIGIT_BITS;
static_assert(BINS == THREADS, "each thread clears one bin");

// Loads that a thread has under way at a time.
static constexpr i32 BATCH = 4;

// Whoever uses it leaves with a barrier after the last read.
struct Shared {
    u32 low[BINS];   // the bins' sums: of the values' lower 12 bits,
    u32 high[BINS];  // and of those above
    union {
        double sums[WARPS];
        u64 keys[WARPS];
    };
};

struct Row {
    const float* logits;
    i32 vocabulary;
    float max, temperature;
    u32 threshold;      // bits of the lightest weight that counts
    i32 last_id;        // of that weight, ids up to this one count
    float least_logit;  // lower ones certainly weigh less than the threshold

    __device__ __forceinline__ Row(const float* logits, i32 vocabulary, float max, float temperature)
        : logits(logits), vocabulary(vocabulary), max(max), temperature(temperature), threshold(0), last_id(vocabulary - 1),
          least_logit(NEGATIVE_INFINITY) {}

    // Bits of a logit's weight; of 0 where it certainly does not count.
    __device__ __forceinline__ u32 weight(float logit) const {
        return logit < least_logit ? 0 : __float_as_uint(exp_negative((logit - max) / temperature));
    }

    __device__ __forceinline__ bool counts(u32 weight, i32 id) const {
        return weight > threshold || (weight == threshold && id <= last_id);
    }

    // Raises `least_logit`, knowing that no weight below 2^(exponent − 127) counts. 0.694 > ln 2; the rest is a margin for
    // rounding, here and in the weights. With infinities or NaN this comes out as NaN or −∞: then no logit is lower.
    __device__ __forceinline__ void skip_below(u32 exponent) {
        if (exponent > 0) {
            float distance = (0.694f * static_cast<float>(127 - static_cast<i32>(exponent)) + 0.001f) * temperature;
            float least = max - distance;
            least_logit = least - fabsf(least) * 2.4e-7f - 1e-37f;
        }
    }
};

// Calls use(index, load(index)) for every STRIDE-th index from `begin` on, below `end`.
template <i32 STRIDE, class Load, class Use>
static __device__ __forceinline__ void for_each(i32 begin, i32 end, Load load, Use use) {
#pragma unroll 1
    for (i32 first = begin; first < end; first += BATCH * STRIDE) {
        decltype(load(0)) loaded[BATCH];
#pragma unroll
        for (i32 i = 0; i < BATCH; i++) {
            loaded[i] = load(min(first + i * STRIDE, end - 1));
        }
#pragma unroll
        for (i32 i = 0; i < BATCH; i++) {
            if (first + i * STRIDE < end) {
                use(first + i * STRIDE, loaded[i]);
            }
        }
    }
}

static __device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (i32 distance = 16; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(FULL_WARP, x, distance);
    }
    return x;
}

// The sum over this lane and the lower ones.
static __device__ __forceinline__ double warp_running_sum(double x) {
    i32 lane = threadIdx.x % 32;
#pragma unroll
    for (i32 distance = 1; distance < 32; distance *= 2) {
        double lower = __shfl_up_sync(FULL_WARP, x, distance);
        x += lane >= distance ? lower : 0.0;
    }
    return x;
}

static __device__ __forceinline__ u64 warp_max(u64 x) {
#pragma unroll
    for (i32 distance = 16; distance > 0; distance /= 2) {
        u64 other = __shfl_xor_sync(FULL_WARP, x, distance);
        x = other > x ? other : x;
    }
    return x;
}

// The id of the highest logit.
static __device__ __forceinline__ i32 argmax(const float* logits, i32 vocabulary, Shared& shared) {
    u64 best = 0;
    auto load = [&](i32 id) { return logits[id]; };
    for_each<THREADS>(threadIdx.x, vocabulary, load, [&](i32 id, float logit) {
        u64 key = static_cast<u64>(order_key(logit)) << 32 | ~static_cast<u32>(id);  // the lower id wins
        best = key > best ? key : best;
    });
    best = warp_max(best);
    if (threadIdx.x % 32 == 0) {
        shared.keys[threadIdx.x / 32] = best;
    }
    __syncthreads();
    best = warp_max(shared.keys[threadIdx.x % 32]);
    __syncthreads();
    return static_cast<i32>(~static_cast<u32>(best));
}

// ln Σ e^logit.
static __device__ __forceinline__ float log_sum_exp(const float* logits, i32 vocabulary, float max, Shared& shared) {
    double sum = 0.0;
    auto load = [&](i32 id) { return logits[id]; };
    for_each<THREADS>(threadIdx.x, vocabulary, load, [&](i32, float logit) {
        sum += static_cast<double>(exp_negative(logit - max));
    });
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        shared.sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    sum = warp_sum(shared.sums[threadIdx.x % 32]);
    __syncthreads();
    return static_cast<float>(static_cast<double>(max) + natural_logarithm(sum));
}

// Where a running sum reaches what is asked for.
struct Reached {
    i32 index;
    double before;  // sum of the values before it
    double enough;  // the sum that was asked for
};

// The first lane with which `before` and the sum of the lanes' values reach `enough`; adds the lower lanes to `before`. Only
// lanes with values above 0 come into question. Should rounding keep the sum from reaching it, then it is the last of them.
static __device__ __forceinline__ i32 lane_that_reaches(double value, double enough, double& before) {
    double running = warp_running_sum(value);
    u32 filled = __ballot_sync(FULL_WARP, value > 0.0);
    u32 reached = __ballot_sync(FULL_WARP, value > 0.0 && before + running >= enough);
    i32 lane = reached != 0 ? __ffs(reached) - 1 : 31 - __clz(filled);
    double lower = __shfl_sync(FULL_WARP, running, lane - 1);
    before += lane > 0 ? lower : 0.0;
    return lane;
}

// The first index below `count` at which `before` and the sum of value(0..=index) reach `enough`, which may be given as a share
// of the whole sum (with `before` = 0). The whole sum is above 0. A value is value(index, load(index)). Each warp adds up a part
// of the indices; the part where it happens is divided again, down to 32.
template <class Load, class Value>
static __device__ __forceinline__ Reached reach(i32 count, double before, double enough, bool is_share, Shared& shared,
                                                Load load, Value value) {
    i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i32 begin = 0, end = count;
#pragma unroll 1
    do {
        i32 width = ceil_div(end - begin, THREADS) * 32;
        i32 part_begin = begin + warp * width;
        i32 part_end = min(part_begin + width, end);
        double sum = 0.0;
        for_each<32>(part_begin + lane, part_end, load, [&](i32 index, auto loaded) { sum += value(index, loaded); });
        sum = warp_sum(sum);
        if (lane == 0) {
            shared.sums[warp] = sum;
        }
        __syncthreads();
        sum = shared.sums[lane];
        if (is_share) {
            enough *= warp_sum(sum);
            is_share = false;
        }
        begin += lane_that_reaches(sum, enough, before) * width;
        end = min(begin + width, end);
        __syncthreads();
    } while (end - begin > 32);
    double own = begin + lane < end ? value(begin + lane, load(begin + lane)) : 0.0;
    i32 index = begin + lane_that_reaches(own, enough, before);
    return {index, before, enough};
}

// Of what counts, keeps the smallest set of the heaviest (the lower id first among equals) that is enough: so many, or, for
// `by_weight`, those that together have at least this share of the whole weight.
static __device__ __forceinline__ void keep_heaviest(Row& row, bool by_weight, double enough, Shared& shared) {
    auto load = [&](i32 id) { return row.logits[id]; };
    u32 prefix = 0;       // the digits of the new threshold, as far as they are known
    double above = 0.0;   // sum of what is heavier
    double equals = 0.0;  // sum of what has the same digits
#pragma unroll 1
    for (i32 shift = 2 * DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        shared.low[threadIdx.x] = 0;
        shared.high[threadIdx.x] = 0;
        __syncthreads();
        for_each<THREADS>(threadIdx.x, row.vocabulary, load, [&](i32 id, float logit) {
            u32 weight = row.weight(logit);
            if (weight >> shift >> DIGIT_BITS == prefix && row.counts(weight, id)) {
                u32 bin = weight >> shift & (BINS - 1);
                u32 mantissa = weight == 0 ? 0 : (weight & 0x7fffffu) | 0x800000u;
                atomicAdd(&shared.low[bin], by_weight ? mantissa & 0xfffu : 1);
                if (by_weight) {
                    atomicAdd(&shared.high[bin], mantissa >> 12);
                }
            }
        });
        __syncthreads();
        // All weights of a bin have the same exponent, so its sum is exact.
        auto bin_sum = [&](i32 index) {
            u32 bin = BINS - 1 - index;  // heavier ones first
            i64 exponent = (prefix << DIGIT_BITS | bin) << shift >> 23;
            double unit = by_weight ? __longlong_as_double((exponent - 150 + 1023) << 52) : 1.0;
            return (shared.low[bin] + 4096.0 * shared.high[bin]) * unit;
        };
        bool is_share = by_weight && shift == 2 * DIGIT_BITS;
        Reached reached = reach(BINS, above, enough, is_share, shared, bin_sum, [](i32, double sum) { return sum; });
        above = reached.before;
        enough = reached.enough;
        equals = bin_sum(reached.index);
        prefix = prefix << DIGIT_BITS | static_cast<u32>(BINS - 1 - reached.index);
        row.skip_below(prefix << shift >> 23);
        __syncthreads();
    }
    if (prefix != row.threshold) {
        row.threshold = prefix;
        row.last_id = row.vocabulary - 1;
    }
    // How many ids of just this weight it takes: the lowest.
    double one = by_weight ? static_cast<double>(__uint_as_float(prefix)) : 1.0;
    double wanted = ceil((enough - above) / one);
    if (wanted < equals / one) {
        auto is_equal = [&](i32 id, float logit) {
            u32 weight = row.weight(logit);
            return weight == row.threshold && row.counts(weight, id) ? 1.0 : 0.0;
        };
        row.last_id = reach(row.vocabulary, 0.0, wanted, false, shared, load, is_equal).index;
    }
}

static const u32 NO_SLOT = 0xffffffffu;

KERNEL(1024, 1, sample,
       (const float* logits, i32 vocabulary, const u32* draws, const u32* slots, u32* out, u32* last)) {
    after_previous();
    __shared__ Shared shared;
    logits += static_cast<i64>(blockIdx.x) * vocabulary;
    const u32* draw = draws + blockIdx.x * 6;
    float temperature = __uint_as_float(draw[0]);
    u32 top_k = draw[1];
    float top_p = __uint_as_float(draw[2]);
    u64 seed = static_cast<u64>(draw[4]) << 32 | draw[3];
    u32 position = draw[5];

    i32 id = argmax(logits, vocabulary, shared);
    float max = logits[id];
    float whole = log_sum_exp(logits, vocabulary, max, shared);
    if (temperature > 0.0f) {
        Row row(logits, vocabulary, max, temperature);
        // First top-k, then top-p of what is left: in a loop, so that there is one copy of the code.
#pragma unroll 1
        for (i32 truncation = 0; truncation < 2; truncation++) {
            bool by_weight = truncation == 1;
            if (by_weight ? top_p < 1.0f : top_k > 0 && top_k < static_cast<u32>(vocabulary)) {
                keep_heaviest(row, by_weight, by_weight ? static_cast<double>(top_p) : static_cast<double>(top_k), shared);
            }
        }
        auto load = [&](i32 candidate) { return logits[candidate]; };
        auto weight = [&](i32 candidate, float logit) {
            u32 bits = row.weight(logit);
            return row.counts(bits, candidate) ? static_cast<double>(__uint_as_float(bits)) : 0.0;
        };
        // It reaches the target where sample.rs's sum exceeds it: the same, unless they are equal to the last bit of an f64.
        id = reach(vocabulary, 0.0, uniform(seed, position), true, shared, load, weight).index;
    }
    if (threadIdx.x == 0) {
        out[blockIdx.x * 2] = static_cast<u32>(id);
        out[blockIdx.x * 2 + 1] = __float_as_uint(logits[id] - whole);
        if (slots[blockIdx.x] != NO_SLOT) {
            last[slots[blockIdx.x]] = static_cast<u32>(id);
        }
    }
}

KERNEL(256, 4, keep_sampled, (const u32* chosen, i32 rows, const u32* slots, u32* last)) {
    after_previous();
    i32 row = static_cast<i32>(blockIdx.x * 256 + threadIdx.x);
    if (row < rows && slots[row] != NO_SLOT) {
        last[slots[row]] = chosen[row * 2];
    }
}
