// Rows of x as a product takes them: gathered in the matrix's order of inputs, and with the sums of their groups.
//
//     value * x summed over a group  =  scale * (codes . x) + offset * sum(x)
//
// Quantised, a group of x has one scale: the largest magnitude is 127. Where a number is NaN or infinite the scale is
// NaN, so that no answer which depends on it looks right.
#pragma once

#include "packed.hpp"

#include <limits>

namespace quantized {

// What `prepare` leaves in a scratch memory: [rows][stride] elements, [rows][G] sums, and of int8 [rows][G] scales.
struct Prepared {
    const void* x;
    int64_t stride;             // in elements
    const float *sums, *scales; // sums of what x stands for; scales null where x is exact
};

// One row, at some place in scratch memory.
struct Room {
    char* x;
    float *sums, *scales;
    int64_t x_bytes, stride;    // of a row; in elements

    Room(const Weights& w, char* memory, int64_t num_rows, int64_t element_bytes) {
        const int64_t size = w.int8 ? 1 : element_bytes;
        x_bytes = w.int8 || w.order ? whole_lines((w.inner + VL) * size) : 0;
        stride = x_bytes / size;
        x = memory;
        sums = (float*)(memory + num_rows * x_bytes);
        scales = sums + num_rows * w.num_groups();
    }
    static int64_t bytes(const Weights& w, int64_t num_rows, int64_t element_bytes) {
        const Room room(w, nullptr, num_rows, element_bytes);
        return whole_lines(num_rows * (room.x_bytes + 2 * w.num_groups() * (int64_t)sizeof(float)));
    }
};

static inline float wide(float x) { return x; }
static inline float wide(widened x) { return x.value; }
static inline float wide(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    return load_as<float>(&bits);
}

static inline int32_t sum(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    typedef int32_t v4i __attribute__((vector_size(16)));
    v4i part[VL / 4];
    std::memcpy(part, &x, sizeof(x));
    for (int i = 1; i < VL / 4; i++) part[0] += part[i];
    return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
#endif
}

static inline uint32_t max(vu x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epu32((__m512i)x);
#else
    typedef uint32_t v4u __attribute__((vector_size(16)));
    v4u part[VL / 4];
    std::memcpy(part, &x, sizeof(x));
    for (int i = 1; i < VL / 4; i++) part[0] = part[0] > part[i] ? part[0] : part[i];
    return std::max(std::max(part[0][0], part[0][1]), std::max(part[0][2], part[0][3]));
#endif
}

// The bytes of VL small integers, each four of them in the order of packed.hpp.
static inline void store_bytes(int8_t* to, vi x) {
    typedef int8_t vb __attribute__((vector_size(VL)));
    typedef uint32_t vw __attribute__((vector_size(VL)));
    const vb bytes = __builtin_convertvector(x, vb);
    vw words;
    std::memcpy(&words, &bytes, VL);
    words = (words & 0xff0000ffu) | ((words >> 8) & 0xff00u) | ((words & 0xff00u) << 8);
    std::memcpy(to, &words, VL);
}

// A group of x, in vectors -> its bytes, the number that one of them stands for, and what all of them do. VL bytes are
// written at a time. load(i): the numbers [i, i + VL) of the group, zeros behind its end.
template <class Load>
static inline __attribute__((always_inline)) void quantise_group(Load&& load, int group, int8_t* to, float& scale,
                                                                 float& total) {
    constexpr uint32_t INFINITE = 0x7f800000;
    constexpr float TINY = 1e-30f;              // less than any number that matters, and 127 / TINY is finite
    vu largest{};
    for (int i = 0; i < group; i += VL) {
        const vf numbers = load(i);
        const vu magnitude = load_as<vu>(&numbers) & 0x7fffffffu;
        largest = largest > magnitude ? largest : magnitude;
    }
    const uint32_t bits = max(largest);
    const float most = load_as<float>(&bits);
    const bool finite = bits < INFINITE, some = finite && most > TINY;
    const vf inverse = splat(some ? 127.0f / most : 0.0f);
    scale = finite ? some ? most * (1.0f / 127.0f) : 0.0f : std::numeric_limits<float>::quiet_NaN();
    vi sums{};
    for (int i = 0; i < group; i += VL) {
        // 2^23 + 2^22 leaves no room for a fraction: the sum is rounded to the nearest integer, ties to the even one.
        const vf shifted = load(i) * inverse + splat(12582912.0f);
        const vi whole = load_as<vi>(&shifted) - 0x4b400000;
        sums += whole;
        store_bytes(to + i, whole);
    }
    total = scale * (float)sum(sums);
}

// The sum of a group, its numbers by VL.
template <class Load> static inline float sum_group(Load&& load, int group) {
    vf all{};
    for (int i = 0; i < group; i += VL) all += load(i);
    return ::sum(all);
}

// Row `r` of x into its place in the room.
template <class Input> static void prepare_row(const Weights& w, const Input* x, const Room& room, int64_t r) {
    const int64_t groups = w.num_groups();
    const int group = w.group;
    const bool in_place = !w.order && group % VL == 0;
    alignas(64) float values[MAX_GROUP + VL] = {};
    Input* gathered = (Input*)(room.x + r * room.x_bytes);
    int8_t* bytes = (int8_t*)(room.x + r * room.x_bytes);
    float *totals = room.sums + r * groups, *scales = room.scales + r * groups;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * group;
        const Input* from = x + first;
        auto direct = [=](int i) { return load(from + i); };
        auto copied = [&](int i) { return load(values + i); };
        for (int i = 0; i < group && !in_place; i++) {
            const int64_t input = w.order ? w.order[first + i] : first + i;
            const Input number = input < 0 ? Input{} : x[input];
            values[i] = wide(number);
            if (w.order && !w.int8) gathered[first + i] = number;
        }
        if (w.int8 && in_place) quantise_group(direct, group, bytes + first, scales[g], totals[g]);
        else if (w.int8) quantise_group(copied, group, bytes + first, scales[g], totals[g]);
        else totals[g] = in_place ? sum_group(direct, group) : sum_group(copied, group);
    }
}

}  // namespace quantized
