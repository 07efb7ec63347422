// How a quantised matrix lies in memory: one format for every number of rows of x.
//
//     panel of 2 VL columns:   scales [G][2 VL] | offsets [G][2 VL] | codes
//
//     codes, 4 bits   [K / 8][2][VL][4]    a byte holds two codes, of k and of k + 4
//     codes, 8 bits   [K / 4][2][VL][4]
//
// A lane of 32 bits is what vpdpbusd multiplies with four neighbours of x: four codes of one column, in the order
// k, k + 2, k + 1, k + 3. So are its even bytes and its odd ones pairs of neighbours, as vdpbf16ps wants them.
//
// value = scale * code + offset. Scales take two bytes where fp16 holds them exactly, else four. Offsets are zero points
// of a byte (offset = -scale * zero), minimums of two bytes or four; or no memory at all where every zero point is the
// same. kernels/packed.py writes the same layout.
#pragma once

#include "linear.hpp"

namespace quantized {

using linear::PANEL;

constexpr int MAX_GROUP = 128;      // inputs that share a scale; a longer group is cut in pieces with the same scale

enum Offsets { SAME_ZERO = 0, ZEROS = 1, HALF_MINIMUMS = 2, MINIMUMS = 4 };     // and their bytes

// A layer as Python hands it over.
struct Weights {
    const char* packed;
    const float* bias;          // for all columns of all panels, or null
    const int32_t* order;       // [inner]: the input at each place, -1 where there is none; null: place k is input k
    int32_t columns, depth;     // N, K; of a gated layer N is the number of its outputs, half of the weights' columns
    int32_t inner, group;       // places, a multiple of the places that share a scale; that is a multiple of 8
    int32_t bits;               // 4 or 8; 0: not quantised, packed as m4's weights
    int32_t scale_bytes;        // 2 or 4
    int32_t offsets;            // of enum Offsets
    int32_t zero;               // the zero point that is everywhere the same
    int32_t int8;               // rows of x are quantised too

    int64_t num_groups() const { return inner / group; }
};

static inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where the parts of a panel begin.
struct Layout {
    int64_t offsets, codes, bytes;

    explicit Layout(const Weights& w)
        : offsets(whole_lines(w.num_groups() * PANEL * w.scale_bytes)),
          codes(offsets + whole_lines(w.num_groups() * PANEL * w.offsets)),
          bytes(codes + whole_lines(int64_t(w.inner) * PANEL * w.bits / 8)) {}
};

// VL numbers in fp16, none of them infinite or NaN: Python has looked.
static inline vf load_halves(const uint16_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
    const vu bits = __builtin_convertvector(load_as<vh>(p), vu);
    const vu magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    const vf scaled = load_as<vf>(&magnitude) * splat(0x1p112f);    // an exponent counted from -15, and denormals
    const vu whole = load_as<vu>(&scaled) | sign;
    return load_as<vf>(&whole);
#endif
}

// The scales and offsets of some groups of a panel as floats: [groups][2 VL] each.
struct Grid {
    static constexpr int GROUPS = 32;       // at most
    alignas(64) float scales[GROUPS * PANEL], offsets[GROUPS * PANEL];

    // The groups [first, end).
    __attribute__((noinline)) void read(const Weights& w, const Layout& layout, const char* panel, int64_t first,
                                        int64_t end) {
        const int64_t count = (end - first) * PANEL;
        if (w.scale_bytes == 2) {
            const uint16_t* from = (const uint16_t*)panel + first * PANEL;
            read_offsets(w, panel + layout.offsets, first, count, [=](int64_t i) { return load_halves(from + i); });
        } else {
            const float* from = (const float*)panel + first * PANEL;
            read_offsets(w, panel + layout.offsets, first, count, [=](int64_t i) { return load(from + i); });
        }
    }

  private:
    template <class Scale>
    void read_offsets(const Weights& w, const char* from, int64_t first, int64_t count, Scale&& scale) {
        typedef uint8_t vb __attribute__((vector_size(VL)));
        from += first * PANEL * w.offsets;
        const vf minus_zero = splat(float(-w.zero));
        switch (w.offsets) {
            case SAME_ZERO: return fill(count, scale, [=](int64_t, vf s) { return s * minus_zero; });
            case ZEROS: return fill(count, scale, [=](int64_t i, vf s) {
                return -s * __builtin_convertvector(load_as<vb>(from + i), vf);
            });
            case HALF_MINIMUMS: return fill(count, scale, [=](int64_t i, vf) {
                return load_halves((const uint16_t*)from + i);
            });
            default: return fill(count, scale, [=](int64_t i, vf) { return load((const float*)from + i); });
        }
    }
    template <class Scale, class Offset> void fill(int64_t count, Scale&& scale, Offset&& offset) {
        for (int64_t i = 0; i < count; i += VL) {
            const vf s = scale(i);
            store(scales + i, s);
            store(offsets + i, offset(i, s));
        }
    }
};

}  // namespace quantized
