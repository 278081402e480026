// What the softmax of a row of logits sums up to, and the gradient of it: each logit is read once and exponentiated
// once in either direction.
#include <algorithm>
#include <cmath>

#include "export.h"
#include "simd.h"

namespace r1 {

constexpr int64_t BLOCK = 1024;      // logits whose largest is looked for before they are summed up; they fit L1
constexpr float UNLIKELY = -87.3f;   // below it e^t is 0 here
constexpr float FORBIDDEN = -1e30f;  // stands for the largest of a row of which all is -inf
constexpr float NOTHING = -__builtin_inff();

struct RowSums {
    float top = NOTHING;                          // the largest z so far
    double total = 0, weighted = 0, squared = 0;  // of e^t, e^t t and e^2t, with t = z - top
};

// Which rows of which tensor.
struct Rows {
    const int64_t* places;  // null: all
    int64_t count, size, inner, outer_stride, inner_stride;

    int64_t row(int64_t i) const { return places ? places[i] : i; }
    int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

void raise_top(RowSums& sums, float top) {
    if (sums.total != 0) {  // also if it is NaN
        const double shift = static_cast<double>(sums.top) - top, factor = std::exp(shift);
        sums.weighted = (sums.weighted + shift * sums.total) * factor;
        sums.total *= factor;
        sums.squared *= factor * factor;
    }
    sums.top = top;
}

// t = x * scale - top where it is above UNLIKELY, else UNLIKELY, which 0 is multiplied by: 0 * -inf is NaN; and e^t.
struct Weight {
    Float8 t, e;
};

// For t up to about 0, within 2 ulp: 2^n e^r with |r| <= ln(2) / 2 and the polynomial of degree 6 that is nearest to
// e^r.
R1_INLINE Weight weight(Float8 x, Float8 scale, Float8 top) {
    const Float8 wide = x * scale - top;
    const Int8 is_unlikely = wide < all(UNLIKELY);
    const Float8 t = is_unlikely ? all(UNLIKELY) : wide;
    const Float8 shift = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which its lowest bits then are
    const Float8 rounded = t * all(1.44269504f) + shift, n = rounded - shift;
    const Float8 r = t - n * all(0.693359375f) - n * all(-2.12194440e-4f);
    Float8 p = all(1.3836835e-3f);
    p = p * r + all(8.3748242e-3f);
    p = p * r + all(4.1668225e-2f);
    p = p * r + all(1.6666420e-1f);
    p = p * r + all(4.9999991e-1f);
    p = p * r + all(1.f);
    p = p * r + all(1.f);
    Int8 bits, exponent;
    std::memcpy(&bits, &p, sizeof(bits));
    std::memcpy(&exponent, &rounded, sizeof(exponent));
    bits = (bits + (exponent << 23)) & ~is_unlikely;
    Float8 e;
    std::memcpy(&e, &bits, sizeof(e));
    return {t, e};
}

R1_INLINE Float8 larger(Float8 a, Float8 b) { return a > b ? a : b; }

// Of `size` numbers, a multiple of 8; in four parts, as each step waits for the one before it.
R1_INLINE float largest_of(const float* x, int64_t size) {
    Float8 most[4] = {load(x), load(x), load(x), load(x)};
    int64_t i = 0;
    for (; i + 32 <= size; i += 32) {
        for (int k = 0; k < 4; ++k) most[k] = larger(load(x + i + 8 * k), most[k]);
    }
    for (; i < size; i += 8) most[0] = larger(load(x + i), most[0]);
    return most_of(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

// Adds `size` logits, a multiple of 8.
template <bool weighted, bool squared>
void add(RowSums& sums, const float* x, int64_t size, float scale) {
    const float top = largest_of(x, size) * scale;
    if (top > sums.top) raise_top(sums, top);
    if (sums.top == NOTHING) {
        for (int64_t i = 0; i < size; ++i) sums.total += x[i] != x[i] ? x[i] : 0.f;
        return;
    }
    const Float8 wide_scale = all(scale), wide_top = all(sums.top);
    Float8 total{}, products{}, squares{};
    for (int64_t i = 0; i < size; i += 8) {
        const Weight w = weight(load(x + i), wide_scale, wide_top);
        total += w.e;
        if (weighted) products += w.e * w.t;
        if (squared) squares += w.e * w.e;
    }
    sums.total += sum(total);
    if (weighted) sums.weighted += sum(products);
    if (squared) sums.squared += sum(squares);
}

template <bool weighted, bool squared>
RowSums sums_of(const float* x, int64_t size, float scale) {
    RowSums found;
    const int64_t whole = size / 8 * 8;
    for (int64_t at = 0; at < whole; at += BLOCK) {
        add<weighted, squared>(found, x + at, std::min(BLOCK, whole - at), scale);
    }
    if (whole < size) {
        float rest[8];
        for (int64_t i = 0; i < 8; ++i) rest[i] = whole + i < size ? x[whole + i] : NOTHING;
        add<weighted, squared>(found, rest, 8, scale);
    }
    return found;
}

// to = e^t (slope + slope_t t); `to` may be `x`.
void gradient(const float* x, float* to, int64_t size, float scale, float top, float slope, float slope_t) {
    const Float8 wide_scale = all(scale), wide_top = all(top), wide = all(slope), wide_t = all(slope_t);
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        const Weight w = weight(load(x + i), wide_scale, wide_top);
        store(to + i, w.e * (wide + wide_t * w.t));
    }
    if (i < size) {
        float rest[8] = {};
        std::copy(x + i, x + size, rest);
        const Weight w = weight(load(rest), wide_scale, wide_top);
        store(rest, w.e * (wide + wide_t * w.t));
        std::copy(rest, rest + (size - i), to + i);
    }
}

}  // namespace r1

// out [5, all], of the rows that are asked for: top, sum e^t, sum e^t t, sum e^2t, z at the row's column (column < 0:
// 0), with z = logits * scale and t = z - top. What is not asked for (has_weighted, has_squared) is 0.
R1_EXPORT void r1_cpu_logprob_sums(r1::RunTeam run, int64_t threads, const float* logits, const int64_t* places,
                                   const int64_t* columns, float* out, int64_t count, int64_t all, int64_t size,
                                   int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t has_weighted,
                                   int64_t has_squared, float scale) {
    const r1::Rows rows{places, count, size, inner, outer_stride, inner_stride};
    const auto sum_up = has_weighted ? (has_squared ? r1::sums_of<true, true> : r1::sums_of<true, false>)
                                     : (has_squared ? r1::sums_of<false, true> : r1::sums_of<false, false>);
    r1::parallel({run, threads}, count, [&](int64_t i) {
        const int64_t row = rows.row(i), column = columns[row];
        const float* x = logits + rows.offset(row);
        const r1::RowSums sums = sum_up(x, size, scale);
        out[row] = sums.top == r1::NOTHING ? r1::FORBIDDEN : sums.top;
        out[all + row] = static_cast<float>(sums.total);
        out[2 * all + row] = static_cast<float>(sums.weighted);
        out[3 * all + row] = static_cast<float>(sums.squared);
        out[4 * all + row] = column < 0 ? 0.f : x[column] * scale;
    });
}

// grad = e^t (slope + slope_t t), and slope_label more at the row's column (column < 0: nowhere). by_row [4, all]: top,
// slope, slope_t, slope_label. grad has strides of its own and may be logits.
R1_EXPORT void r1_cpu_logprob_gradient(r1::RunTeam run, int64_t threads, const float* logits, const int64_t* places,
                                       const int64_t* columns, const float* by_row, float* grad, int64_t count,
                                       int64_t all, int64_t size, int64_t inner, int64_t outer_stride,
                                       int64_t inner_stride, int64_t grad_outer_stride, int64_t grad_inner_stride,
                                       float scale) {
    const r1::Rows rows{places, count, size, inner, outer_stride, inner_stride};
    const r1::Rows grad_rows{places, count, size, inner, grad_outer_stride, grad_inner_stride};
    r1::parallel({run, threads}, count, [&](int64_t i) {
        const int64_t row = rows.row(i), column = columns[row];
        float* to = grad + grad_rows.offset(row);
        r1::gradient(logits + rows.offset(row), to, size, scale, by_row[row], by_row[all + row], by_row[2 * all + row]);
        if (column >= 0) to[column] += by_row[3 * all + row];
    });
}
