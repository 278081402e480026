// One token a row, drawn from the whole softmax by inverting its distribution function.
#include <cmath>
#include <memory>

#include "export.h"
#include "rows.h"

namespace r1 {

// Index of the first weight with which the running sum exceeds `target`, which is below the sum of all: a weight of 0
// is never drawn. Of NaNs, the last one.
int64_t find(const float* weights, int64_t size, double target) {
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) {
        sum += weights[i];
        if (sum > target) return i;
    }
    return size - 1;
}

}  // namespace r1

// tokens[n] is drawn from softmax(logits[n] * scale) with uniform[n] in (0, 1), logp[n] its log-probability. logits
// [rows, size]. Sums are in double: with 150,000 tokens the steps of a float sum are coarser than the rare ones.
R1_EXPORT void r1_cpu_sample(r1::RunTeam run, int64_t threads, const float* logits, const double* uniform,
                             int64_t* tokens, float* logp, int64_t rows, int64_t size, float scale) {
    r1::parallel({run, threads}, rows, [&](int64_t row) {
        const int64_t padded = (size + 7) / 8 * 8;
        std::unique_ptr<float[]> weights(new float[padded]);
        std::memcpy(weights.get(), logits + row * size, size * sizeof(float));
        r1::exponentials(weights.get(), size, padded, scale);
        double total = 0;
        for (int64_t i = 0; i < size; ++i) total += weights[i];
        tokens[row] = r1::find(weights.get(), size, uniform[row] * total);
        logp[row] = static_cast<float>(std::log(weights[tokens[row]] / total));
    });
}
