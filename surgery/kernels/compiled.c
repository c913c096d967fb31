/* Merges of bfloat16 in one pass: what combine and trim of merging.py and Window of selection.py do
 * with some twenty-five operations of torch and numpy, each of which goes through memory, and hands
 * the interpreter to another thread.
 *
 * The same operations in the same order on every entry, so the same bits; nothing may be contracted
 * or reassociated (-ffp-contract=off, no -ffast-math). Entries are taken TILE at a time, which stay
 * in the first-level cache; the loops are written for the compiler to vectorise. Called by
 * compiled.py, which checks what it passes.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if !(defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__)) || defined(__clang__)
#define VECTORISED
#elif __GNUC__ < 12 /* knows no levels of the architecture here */
#define VECTORISED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#endif

#define TILE 512
#define LANES 16
#define MOST_MODELS 16

static inline float widened(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* To the nearest, ties to even; NaN becomes the one that torch makes of it. */
static inline uint16_t rounded(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    uint16_t nearest = (uint16_t)((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
    return value != value ? 0x7FC0 : nearest;
}

static inline int64_t tile_at(int64_t at, int64_t count) {
    return count - at < TILE ? count - at : TILE;
}

/* start * first + the sum of steps[i] * (others[i] - first), scaled and added to the first. */
VECTORISED void surgery_combine(
    int64_t count, int64_t models, const uint16_t *first, const uint16_t *const *others,
    float start, const float *steps, float scale, uint16_t *out
) {
    float base[TILE], total[TILE];
    for (int64_t at = 0; at < count; at += TILE) {
        int64_t n = tile_at(at, count);
        for (int64_t i = 0; i < n; i++) base[i] = widened(first[at + i]);
        int64_t from = 0;
        if (start != 0) {
            for (int64_t i = 0; i < n; i++) total[i] = base[i] * start;
        } else if (models > 0) {
            const uint16_t *model = others[from] + at;
            float step = steps[from++];
            for (int64_t i = 0; i < n; i++) total[i] = (widened(model[i]) - base[i]) * step;
        } else {
            for (int64_t i = 0; i < n; i++) total[i] = 0;
        }
        for (; from < models; from++) {
            const uint16_t *model = others[from] + at;
            float step = steps[from];
            for (int64_t i = 0; i < n; i++) total[i] += (widened(model[i]) - base[i]) * step;
        }
        for (int64_t i = 0; i < n; i++) out[at + i] = rounded(total[i] * scale + base[i]);
    }
}

/* Task vectors trimmed to magnitudes from low to high, and fused: see trim and fuse.
 *
 * bounds: (low, high) of each model. divisor: what a plain sum is divided by, 1 if by nothing;
 * with elect and normalize, the sum of the weights that count: at least `least` if that isn't 0, or
 * else 1 where it is 0. */
VECTORISED void surgery_trim(
    int64_t count, int64_t models, const uint16_t *first, const uint16_t *const *others,
    const float *bounds, const float *weights, int elect, int normalize, float divisor,
    float least, float scale, uint16_t *out
) {
    float base[TILE], total[TILE], fused[TILE], counted[TILE], taus[MOST_MODELS][TILE];
    for (int64_t at = 0; at < count; at += TILE) {
        int64_t n = tile_at(at, count);
        for (int64_t i = 0; i < n; i++) base[i] = widened(first[at + i]);
        for (int64_t m = 0; m < models; m++) {
            const uint16_t *model = others[m] + at;
            float low = bounds[2 * m], high = bounds[2 * m + 1], weight = weights[m];
            float *tau = taus[m];
            for (int64_t i = 0; i < n; i++) {
                float value = widened(model[i]) - base[i], size = fabsf(value);
                value = size < low ? 0 : value;
                value -= size > high ? value : 0;
                tau[i] = value * weight;
                total[i] = m ? total[i] + tau[i] : tau[i];
            }
        }
        if (!elect) {
            for (int64_t i = 0; i < n; i++)
                out[at + i] = rounded(total[i] / divisor * scale + base[i]);
            continue;
        }
        for (int64_t m = 0; m < models; m++) {
            const float *tau = taus[m];
            float weight = weights[m];
            for (int64_t i = 0; i < n; i++) {
                float agreeing = tau[i] * copysignf(1, total[i]);
                agreeing = agreeing < 0 ? 0 : agreeing;
                float share = agreeing > 0 ? weight : 0;
                fused[i] = m ? fused[i] + agreeing : agreeing;
                counted[i] = m ? counted[i] + share : share;
            }
        }
        if (normalize && least > 0)
            for (int64_t i = 0; i < n; i++) fused[i] /= counted[i] < least ? least : counted[i];
        else if (normalize)
            for (int64_t i = 0; i < n; i++) fused[i] /= counted[i] == 0 ? 1 : counted[i];
        for (int64_t i = 0; i < n; i++)
            out[at + i] = rounded(fused[i] * copysignf(1, total[i]) * scale + base[i]);
    }
}

/* Of the magnitudes |model - base|: how many are below the first mark (returned), how many are equal
 * to each of the three marks, which ascend (NaN is equal to none), and those that lie between the
 * first and the last and aren't the middle one, in order, at near, which has room for count of
 * them; *found says how many. *finite: whether all magnitudes are. */
VECTORISED int64_t surgery_window(
    int64_t count, const uint16_t *base, const uint16_t *model, const float *marks,
    int64_t *equal, float *near, int64_t *found, int *finite
) {
    float sizes[TILE], first = marks[0], middle = marks[1], last = marks[2];
    int32_t wide[TILE], largest = 0;
    uint8_t inside[TILE];
    int64_t below = 0, used = 0;
    equal[0] = equal[1] = equal[2] = 0;
    for (int64_t at = 0; at < count; at += TILE) {
        int64_t n = tile_at(at, count);
        int32_t fewer = 0, firsts = 0, middles = 0, lasts = 0;
        for (int64_t i = 0; i < n; i++) {
            float size = fabsf(widened(model[at + i]) - widened(base[at + i]));
            int32_t bits; /* in the order of the magnitudes, NaN above infinity */
            memcpy(&bits, &size, 4);
            largest = bits > largest ? bits : largest;
            fewer += size < first;
            firsts += size == first;
            middles += size == middle;
            lasts += size == last;
            wide[i] = (size > first) & (size < last) & (size != middle);
            sizes[i] = size;
        }
        below += fewer;
        equal[0] += firsts;
        equal[1] += middles;
        equal[2] += lasts;
        for (int64_t i = 0; i < n; i++) inside[i] = (uint8_t)wide[i];
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) { /* few are inside: eight are passed over at a time */
            uint64_t any;
            memcpy(&any, inside + i, 8); /* the first is in the lowest byte */
            for (; any; any &= any - 1) near[used++] = sizes[i + __builtin_ctzll(any) / 8];
        }
        for (; i < n; i++)
            if (inside[i]) near[used++] = sizes[i];
    }
    *found = used;
    *finite = largest < 0x7F800000;
    return below;
}

/* The sum of the squares of model - base, in float64: entries LANES apart are added up in order, and
 * then these sums, so it is the same however wide the vectors are. */
VECTORISED double surgery_square(int64_t count, const uint16_t *base, const uint16_t *model) {
    double sums[LANES] = {0}, total = 0;
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float tau = widened(model[at + lane]) - widened(base[at + lane]);
            sums[lane] += (double)tau * tau;
        }
    for (int lane = 0; at < count; at++, lane++) {
        float tau = widened(model[at]) - widened(base[at]);
        sums[lane] += (double)tau * tau;
    }
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return total;
}

/* Whether every value is finite. */
VECTORISED int surgery_finite(int64_t count, const uint16_t *values) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint16_t size = values[i] & 0x7FFF; /* in the order of the magnitudes, NaN above infinity */
        largest = size > largest ? size : largest;
    }
    return largest < 0x7F80;
}
