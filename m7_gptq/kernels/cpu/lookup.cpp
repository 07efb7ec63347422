// Rows of a packed matrix as numbers: the embedding, where it is the output matrix.
#include "elementwise.hpp"
#include "packed.hpp"

namespace quantized {

static inline float half_at(const char* p, int64_t i) {
    uint16_t halves[VL] = {load_as<uint16_t>(p + 2 * i)};
    return load_halves(halves)[0];
}

static inline float number_at(const char* p, int64_t i, int bytes) {
    return bytes == 2 ? half_at(p, i) : load_as<float>(p + 4 * i);
}

// scale * (code - zero), or scale * code + minimum: as grid.py says, bit for bit.
template <class T> static void row(const Weights& w, const Layout& layout, int64_t number, T* to) {
    const char* panel = w.packed + number / PANEL * layout.bytes;
    const int column = number % PANEL;
    const uint8_t* codes = (const uint8_t*)panel + layout.codes + column * 4;
    for (int64_t g = 0; g < w.num_groups(); g++) {
        const int64_t at = g * PANEL + column;
        const float scale = number_at(panel, at, w.scale_bytes);
        const char* offsets = panel + layout.offsets;
        const bool has_zero = w.offsets <= ZEROS;
        const float zero = w.offsets == ZEROS ? (float)(uint8_t)offsets[at] : (float)w.zero;
        const float minimum = has_zero ? 0.0f : number_at(offsets, at, w.offsets);
        for (int64_t k = g * w.group; k < (g + 1) * w.group; k++) {
            const int64_t input = w.order ? w.order[k] : k;
            if (input < 0) continue;
            const int byte = k % 4 % 2 * 2 + k % 4 / 2;
            int code = codes[(w.bits == 4 ? k / 8 : k / 4) * PANEL * 4 + byte];
            if (w.bits == 4) code = code >> (k / 4 % 2 * 4) & 15;
            elementwise::put(to + input, has_zero ? scale * ((float)code - zero) : scale * (float)code + minimum);
        }
    }
}

template <class T> static int64_t rows(const Weights& w, const int64_t* ids, int64_t num_ids, T* to) {
    const Layout layout(w);
    for (int64_t i = 0; i < num_ids; i++) {
        if (ids[i] < 0 || ids[i] >= w.columns) return i;
        row(w, layout, ids[i], to + i * w.depth);
    }
    return -1;
}

// The rows `ids` [num_ids] of the matrix -> [num_ids, K]. Returns -1, or which id is none.
extern "C" int64_t quantized_lookup(const Weights* weights, const int64_t* ids, int64_t num_ids, void* to,
                                    int32_t is_bf16) {
    return is_bf16 ? rows(*weights, ids, num_ids, (bf16*)to) : rows(*weights, ids, num_ids, (float*)to);
}

}  // namespace quantized
