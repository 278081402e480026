// SwiGLU, RMSNorm and the rotary embedding of training, forward and backward: one pass over memory each.
#include <algorithm>

#include "export.h"
#include "rows.h"

namespace r1 {

constexpr int64_t PIECE = 32;  // rows of a piece of work

void swiglu(const float* gate, const float* up, float* out, int64_t size) {
    for (int64_t i = 0; i < size; i += 8) {
        Float8 g = load(gate + i);
        store(out + i, g * sigmoid(g) * load(up + i));
    }
}

// With s = sigmoid(gate), t = gate s: d gate = grad up (s + t (1 - s)), d up = grad t.
void swiglu_backward(const float* gate, const float* up, const float* grad, float* grad_gate, float* grad_up,
                     int64_t size) {
    for (int64_t i = 0; i < size; i += 8) {
        Float8 g = load(gate + i), d = load(grad + i), s = sigmoid(g), t = g * s;
        store(grad_gate + i, d * load(up + i) * (s + t - t * s));
        store(grad_up + i, d * t);
    }
}

void rms_norm(const float* x, const float* weight, float* out, float* rstd, int64_t size, float eps) {
    *rstd = reciprocal_rms(x, size, eps);
    for (int64_t i = 0; i < size; i += 8) store(out + i, load(x + i) * all(*rstd) * load(weight + i));
}

// dx = rstd (grad weight) - x rstd^3 / size sum(grad weight x); adds grad x rstd to grad_weight.
void rms_norm_backward(const float* x, const float* weight, const float* grad, float rstd, float* grad_x,
                       float* grad_weight, int64_t size) {
    Float8 products = all(0.f);
    for (int64_t i = 0; i < size; i += 8) products += load(grad + i) * load(weight + i) * load(x + i);
    const Float8 scale = all(rstd), shift = all(-sum(products) * rstd * rstd * rstd / static_cast<float>(size));
    for (int64_t i = 0; i < size; i += 8) {
        Float8 g = load(grad + i), value = load(x + i);
        store(grad_x + i, g * load(weight + i) * scale + value * shift);
        store(grad_weight + i, load(grad_weight + i) + g * value * scale);
    }
}

// Dimension i turns with i + half, by the angle whose cosine and sine are given.
void rotate(const float* x, const float* cosine, const float* sine, float* out, int64_t half, float sign) {
    for (int64_t i = 0; i < half; i += 8) {
        Float8 a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i) * all(sign);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
}

template <class Body>
void over_rows(const Team& team, int64_t rows, const Body& body) {
    parallel(team, (rows + PIECE - 1) / PIECE, [&](int64_t piece) {
        for (int64_t row = PIECE * piece; row < std::min(PIECE * (piece + 1), rows); ++row) body(row, piece);
    });
}

}  // namespace r1

// silu(gate) * up. gate_up [rows, 2 * size], the gate first; out [rows, size]. Sizes are multiples of 8 in this file.
R1_EXPORT void r1_cpu_swiglu(r1::RunTeam run, int64_t threads, const float* gate_up, float* out, int64_t rows,
                             int64_t size) {
    r1::over_rows(r1::Team{run, threads}, rows, [&](int64_t row, int64_t) {
        const float* gate = gate_up + row * 2 * size;
        r1::swiglu(gate, gate + size, out + row * size, size);
    });
}

// grad [rows, size] -> grad_gate_up [rows, 2 * size]
R1_EXPORT void r1_cpu_swiglu_backward(r1::RunTeam run, int64_t threads, const float* gate_up, const float* grad,
                                      float* grad_gate_up, int64_t rows, int64_t size) {
    r1::over_rows(r1::Team{run, threads}, rows, [&](int64_t row, int64_t) {
        const float* gate = gate_up + row * 2 * size;
        float* to = grad_gate_up + row * 2 * size;
        r1::swiglu_backward(gate, gate + size, grad + row * size, to, to + size, size);
    });
}

// out [rows, size] and rstd [rows] of x [rows, size].
R1_EXPORT void r1_cpu_rms_norm(r1::RunTeam run, int64_t threads, const float* x, const float* weight, float* out,
                               float* rstd, int64_t rows, int64_t size, float eps) {
    r1::over_rows(r1::Team{run, threads}, rows, [&](int64_t row, int64_t) {
        r1::rms_norm(x + row * size, weight, out + row * size, rstd + row, size, eps);
    });
}

// grad_x [rows, size], and the gradient of the weight in parts of 32 rows, [ceil(rows / 32), size], which start as 0.
R1_EXPORT void r1_cpu_rms_norm_backward(r1::RunTeam run, int64_t threads, const float* x, const float* weight,
                                        const float* rstd, const float* grad, float* grad_x, float* grad_weight,
                                        int64_t rows, int64_t size) {
    r1::over_rows(r1::Team{run, threads}, rows, [&](int64_t row, int64_t piece) {
        const int64_t at = row * size;
        r1::rms_norm_backward(x + at, weight, grad + at, rstd[row], grad_x + at, grad_weight + piece * size, size);
    });
}

// out [rows, heads, 2 * half], contiguous, of x, whose rows are `stride` elements apart and heads `head_stride`;
// cosine, sine [rows, half]; sign -1 turns back.
R1_EXPORT void r1_cpu_rotate(r1::RunTeam run, int64_t threads, const float* x, const float* cosine, const float* sine,
                             float* out, int64_t rows, int64_t heads, int64_t half, int64_t stride, int64_t head_stride,
                             float sign) {
    r1::over_rows(r1::Team{run, threads}, rows, [&](int64_t row, int64_t) {
        for (int64_t head = 0; head < heads; ++head) {
            r1::rotate(x + row * stride + head * head_stride, cosine + row * half, sine + row * half,
                       out + (row * heads + head) * 2 * half, half, sign);
        }
    });
}
