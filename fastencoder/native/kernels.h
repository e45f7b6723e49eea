// What the kernels are given. Pointers are to the first element; strides count elements, and the last dimension of every
// tensor is contiguous. A null pointer means that the feature is not asked for.
#pragma once
#include <cstdint>

namespace fastencoder {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFixed16 = 3 };  // kFixed16: of packed weights only

// varlen_attention of kernels/varlen_attention/__init__.py, without softcap.
struct Attention {
    const void *q, *k, *v;  // [T, H, d], [T, Hk, d], [T, Hk, d] of `dtype`
    void* out;              // [T, H, d], contiguous, of `dtype`
    const int32_t* offsets;  // [B + 1]
    int64_t dtype, sequences, heads, kv_heads, dim;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides
    int64_t left, right;  // how far a query sees; negative: without limit
    double scale;
    const float *cos, *sin;  // [T, rotated / 2], contiguous
    int64_t rotated, interleaved;
    const float* relative_bias;  // [H, 2 * reach - 1], contiguous
    int64_t reach;
    const float* bias;  // by strides, 0 for a dimension of one
    int64_t bias_sequence, bias_head, bias_query;
    const void *c2p, *p2c;  // [T, H, P] of `dtype`
    int64_t c2p_token, c2p_head, p2c_token, p2c_head;
    const int32_t* columns;  // [2 * column_reach - 1]
    int64_t column_reach;
    const float *rel_h, *rel_w;  // [T, H, Kh], [T, H, Kw]
    int64_t rel_h_token, rel_h_head, rel_w_token, rel_w_head, grid_width;
    int64_t threads;
};

// add_norm of kernels/add_norm/__init__.py, for x [T, D].
struct AddNorm {
    const void *x, *residual;  // [T, D], contiguous, of `dtype`
    const void *weight, *bias, *scale, *x_bias;  // [D] of `vector_dtype`: float32, `dtype`, or any if that is float32
    void *normed, *sum;  // [T, D] of `dtype`; either may be x itself
    int64_t dtype, vector_dtype, rows, dim, rms;
    double eps;
    int64_t threads;
};

// embed_norm of kernels/embed_norm/__init__.py, for T rows.
struct Table {
    const void *values, *ids;  // [rows, D] of `dtype`; [T]
    int64_t rows, row, wide;   // row: stride; wide: the ids are int64, otherwise int32
};
struct EmbedNorm {
    Table table[3];
    int64_t tables;
    const void *weight, *bias;  // [D] of `vector_dtype`: float32 or `dtype`
    void* out;                  // [T, D] of `dtype`
    int64_t dtype, vector_dtype, rows, dim;
    double eps;
    int64_t threads;
};
enum Outcome { kDone, kNoMemory, kOutside };  // kOutside: an id is not in its table

// linear of kernels/linear/__init__.py in float32, not gated. The weight is [N, K] by rows, or packed: [N / P, K, P] with
// P = panel_width(), rows beyond N zero.
struct Linear {
    const float* x;  // [T, K], contiguous
    const void* weight;
    const void *bias, *scale;  // [N] of `vector_dtype`, which is float32 or `weight_dtype`
    const float* residual;     // [T, N], contiguous
    float* out;                // [T, N], contiguous
    int64_t weight_dtype, vector_dtype, weight_row, packed;  // weight_row: stride between rows, where it is not packed
    int64_t rows, outputs, inputs, activation;
    int64_t threads;
    float* fixed;  // of a weight of kFixed16: room for vnni::fixed_floats(rows, inputs)
};

// Outputs of a weight [count, inputs] that become those from `first` on of a packed one in fixed point, as `fixed.inc` says.
struct Packing {
    const void* weight;
    int16_t* out;
    int64_t dtype, row, count, inputs, first, threads;  // row: stride
};

// A whole layer with plain attention: x [T, D] -> out [T, D] in float32, as `layers/program.py` says. Weights are packed, all of
// them, or contiguous; vectors beside them are float32 or of their dtype. Null where there is none.
struct Layer {
    int64_t pre_norm, dim, heads, kv_heads, head_dim, inner, activation, weight_dtype, vector_dtype, norm_dtype, rms, packed;
    const void *qkv, *projection, *up, *down;
    const void *query_bias, *key_bias, *value_bias, *projection_bias, *up_bias, *down_bias;  // all or none of the first three
    const void *norm1, *norm1_bias, *norm2, *norm2_bias;
    double scale, eps1, eps2;
    const void *scale1, *scale2;  // [D] of vector_dtype
};
struct LayerCall {
    const float* x;
    float* out;  // may be x
    const int32_t* offsets;
    int64_t sequences, rows, threads;
};

// Spread elements of a tensor, and what they were.
struct Probe {
    const char *live, *saved;
    int64_t count, step, size;  // step: between live elements, in bytes; size: of an element
};

// Some queries of a sequence, and the keys that some of them see; positions in the sequence.
struct Task {
    int64_t sequence, first, end, low, high;
};
constexpr int64_t kQueries = 192;  // of a task, at most

// The tasks of a packed batch, those that take longest first; null if there is no memory. The caller frees them.
Task* tasks_of(const int32_t* offsets, int64_t sequences, int64_t left, int64_t right, int64_t* count);

// False if there was no memory. What ends in "_share" is called by every thread of a team, and each does its part: it returns
// when all have done theirs. Everything else makes a team of its own.
namespace avx512 {
bool attention(const Attention& a);
bool add_norm(const AddNorm& a);
Outcome embed_norm(const EmbedNorm& a);
bool linear(const Linear& a);
// One layer after the other; `rounded`: to bfloat16 behind each.
bool layers(const Layer* layers, int64_t number, bool rounded, const LayerCall& call);
int64_t panel_width();
}
namespace vnni {
bool linear_share(const Linear& a);  // of a weight of kFixed16, whose vectors are float32 or bfloat16
int64_t fixed_floats(int64_t rows, int64_t inputs);
void pack(const Packing& a);
int64_t packed_panel_size(int64_t inputs);
}
namespace avx2 {
bool attention(const Attention& a);
bool add_norm(const AddNorm& a);
Outcome embed_norm(const EmbedNorm& a);
bool linear(const Linear& a);
bool layers(const Layer* layers, int64_t number, bool rounded, const LayerCall& call);
int64_t panel_width();
}

}  // namespace fastencoder
