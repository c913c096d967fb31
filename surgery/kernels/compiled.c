/* Arithmetic of bfloat16 in one pass: what combine, trim and drop of merging.py, scale_and_square of
 * updates.py and Window of selection.py do with up to some thirty operations of torch and numpy, each
 * of which goes through memory, and hands the interpreter to another thread.
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

/* As in compiled.py: one more with every change of what a function takes or gives. */
const int surgery_interface = 1;

#define TILE 512
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

/* How weighted task vectors become one: see fuse. divisor: what a plain sum is divided by, 1 if by
 * nothing; with elect and normalize it is the sum of the weights that count: at least `least` if that
 * isn't 0, or else 1 where it is 0. */
struct fusing {
    int elect, normalize;
    float divisor, least, scale;
};

/* A tile of them, whose sum is total, fused and added to the base. */
static inline __attribute__((always_inline)) void fuse_tile(
    int64_t n, int64_t models, float taus[][TILE], const float *total, const float *weights,
    const struct fusing *how, const float *base, uint16_t *out
) {
    float fused[TILE], counted[TILE], divisor = how->divisor, least = how->least;
    float scale = how->scale;
    if (!how->elect) {
        for (int64_t i = 0; i < n; i++) out[i] = rounded(total[i] / divisor * scale + base[i]);
        return;
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
    if (how->normalize && least > 0)
        for (int64_t i = 0; i < n; i++) fused[i] /= counted[i] < least ? least : counted[i];
    else if (how->normalize)
        for (int64_t i = 0; i < n; i++) fused[i] /= counted[i] == 0 ? 1 : counted[i];
    for (int64_t i = 0; i < n; i++)
        out[i] = rounded(fused[i] * copysignf(1, total[i]) * scale + base[i]);
}

/* Task vectors trimmed to magnitudes from low to high, and fused: see trim. bounds: (low, high) of
 * each model. */
VECTORISED void surgery_trim(
    int64_t count, int64_t models, const uint16_t *first, const uint16_t *const *others,
    const float *bounds, const float *weights, const struct fusing *fusing, uint16_t *out
) {
    float base[TILE], total[TILE], taus[MOST_MODELS][TILE];
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
        fuse_tile(n, models, taus, total, weights, fusing, base, out + at);
    }
}

/* The probability to keep each entry of a row: low for the smallest magnitude |model - base|, slope
 * more for each one after it; those of one magnitude come as they stand. pairs has room for 2 n. */
static inline __attribute__((always_inline)) void by_rank(
    int64_t n, const uint16_t *base, const uint16_t *model, float slope, float low,
    uint64_t *pairs, float *kept
) {
    uint32_t counts[4][256] = {{0}};
    for (int64_t i = 0; i < n; i++) {
        float size = fabsf(widened(model[i]) - widened(base[i]));
        uint32_t bits; /* in the order of the magnitudes */
        memcpy(&bits, &size, 4);
        pairs[i] = (uint64_t)bits << 32 | (uint32_t)i;
    }
    for (int64_t i = 0; i < n; i++)
        for (int digit = 0; digit < 4; digit++) counts[digit][pairs[i] >> (32 + 8 * digit) & 255]++;
    uint64_t *from = pairs, *to = pairs + n;
    for (int digit = 0; digit < 4; digit++) { /* from the lowest byte to the highest */
        int shift = 32 + 8 * digit;
        if (counts[digit][from[0] >> shift & 255] == n) continue; /* all have the same one */
        uint32_t place = 0;
        for (int value = 0; value < 256; value++) {
            uint32_t next = place + counts[digit][value];
            counts[digit][value] = place;
            place = next;
        }
        for (int64_t i = 0; i < n; i++) to[counts[digit][from[i] >> shift & 255]++] = from[i];
        uint64_t *sorted = to;
        to = from;
        from = sorted;
    }
    for (int64_t rank = 0; rank < n; rank++) kept[(uint32_t)from[rank]] = (float)rank * slope + low;
}

/* Task vectors of which entries are dropped at random, and fused: see drop.
 *
 * noises: uniform in [-1, 1), for each model, or NULL where nothing is dropped. Entries are kept with
 * the probability `densities` of the model, or, where there are slopes, by their rank in a row of
 * `width`: pairs has room for 2 width, and kept for width for each model. */
VECTORISED void surgery_drop(
    int64_t count, int64_t width, int64_t models, const uint16_t *first,
    const uint16_t *const *others, const float *const *noises, const float *densities,
    const float *slopes, int rescale, const float *weights, const struct fusing *fusing,
    uint64_t *pairs, float *kept, uint16_t *out
) {
    float base[TILE], total[TILE], taus[MOST_MODELS][TILE];
    for (int64_t row = 0; row < count; row += width) {
        for (int64_t m = 0; slopes && m < models; m++)
            if (noises[m])
                by_rank(width, first + row, others[m] + row, slopes[m], densities[m], pairs,
                        kept + m * width);
        for (int64_t at = row; at < row + width; at += TILE) {
            int64_t n = tile_at(at, row + width);
            for (int64_t i = 0; i < n; i++) base[i] = widened(first[at + i]);
            for (int64_t m = 0; m < models; m++) {
                const uint16_t *model = others[m] + at;
                float density = densities[m], weight = weights[m], *tau = taus[m];
                for (int64_t i = 0; i < n; i++) tau[i] = widened(model[i]) - base[i];
                if (noises[m] && slopes) {
                    const float *noise = noises[m] + at, *odds = kept + m * width + (at - row);
                    for (int64_t i = 0; i < n; i++) {
                        float left = odds[i] - (noise[i] + 1) * 0.5f;
                        tau[i] = tau[i] * (left > 0 ? 1.0f : 0.0f) / (rescale ? odds[i] : 1);
                    }
                } else if (noises[m]) {
                    const float *noise = noises[m] + at;
                    for (int64_t i = 0; i < n; i++) {
                        float left = density - (noise[i] + 1) * 0.5f;
                        tau[i] = tau[i] * (left > 0 ? 1.0f : 0.0f) / (rescale ? density : 1);
                    }
                }
                for (int64_t i = 0; i < n; i++) {
                    tau[i] = tau[i] * weight;
                    total[i] = m ? total[i] + tau[i] : tau[i];
                }
            }
            fuse_tile(n, models, taus, total, weights, fusing, base, out + at);
        }
    }
}

/* Noise in [-1, 1) of 24 bits: PCG64 (O'Neill 2014), its DXSM variant, of which a step gives 64 bits
 * and an entry takes half of them, the lower first. Skips the first half of the first step if `odd`. */
void surgery_noise(int64_t count, int odd, const uint64_t *state, float *out) {
    const uint64_t multiplier = 0xDA942042E4DD58B5;
    unsigned __int128 at = (unsigned __int128)state[0] << 64 | state[1];
    unsigned __int128 step = (unsigned __int128)state[2] << 64 | state[3];
    for (int64_t i = -odd; i < count; i += 2) {
        uint64_t high = (uint64_t)(at >> 64), low = (uint64_t)at | 1;
        high ^= high >> 32;
        high *= multiplier;
        high ^= high >> 48;
        high *= low;
        at = at * multiplier + step;
        if (i >= 0) out[i] = (float)((uint32_t)high >> 8) * 0x1p-23f - 1;
        if (i + 1 < count) out[i + 1] = (float)(high >> 40) * 0x1p-23f - 1;
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

/* The sums of one * other in float64, or of their differences from a base if it isn't NULL: of entries
 * TILE apart in order, so it is the same however wide the vectors are. */
VECTORISED void surgery_products(
    int64_t count, const uint16_t *base, const uint16_t *one, const uint16_t *other, double *sums
) {
    for (int64_t i = 0; i < TILE; i++) sums[i] = 0;
    for (int64_t at = 0; at < count; at += TILE) {
        int64_t n = tile_at(at, count);
        if (base)
            for (int64_t i = 0; i < n; i++) {
                double start = widened(base[at + i]);
                sums[i] += (widened(one[at + i]) - start) * (widened(other[at + i]) - start);
            }
        else
            for (int64_t i = 0; i < n; i++)
                sums[i] += (double)widened(one[at + i]) * (double)widened(other[at + i]);
    }
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
