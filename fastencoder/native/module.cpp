// fastencoder._native: the kernels as functions on addresses. kernels/native.py is the only caller, and checks everything.
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <initializer_list>

#include "kernels.h"
#include "unchanged.h"

using namespace fastencoder;

namespace {

// Reads positional arguments in the order in which they are given; an error stays set until `ok` is asked.
class Arguments {
  public:
    Arguments(PyObject* const* given, Py_ssize_t count) : given_(given), count_(count) {}
    int64_t integer() {
        PyObject* x = next();
        return x ? PyLong_AsLongLong(x) : 0;
    }
    double real() {
        PyObject* x = next();
        return x ? PyFloat_AsDouble(x) : 0;
    }
    template <class T>
    void address(T*& to) {
        to = reinterpret_cast<T*>(integer());
    }
    // How many structures the bytes hold; `to` points to the first, for as long as the argument is there.
    template <class T>
    int64_t structures(const T*& to) {
        PyObject* x = next();
        char* from;
        Py_ssize_t length;
        if (!x || PyBytes_AsStringAndSize(x, &from, &length) != 0) return 0;
        if (length == 0 || length % sizeof(T) != 0) missing_ = true;
        to = reinterpret_cast<const T*>(from);
        return length / sizeof(T);
    }
    bool left() const { return at_ < count_ && !missing_; }
    bool ok() {
        if (!PyErr_Occurred() && (missing_ || at_ != count_)) PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
        return !PyErr_Occurred();
    }

  private:
    PyObject* next() {
        if (at_ < count_) return given_[at_++];
        missing_ = true;
        return nullptr;
    }
    PyObject* const* given_;
    Py_ssize_t count_, at_ = 0;
    bool missing_ = false;
};

enum Isa { kNone, kAvx2, kAvx512, kAvx512Vnni };

Isa best_isa() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return kNone;
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!wide) return kAvx2;
    return __builtin_cpu_supports("avx512vnni") ? kAvx512Vnni : kAvx512;
}

// Whether the sequences are inside of `rows` tokens and none is longer than `longest`: what follows reads and writes there.
bool inside(const int32_t* offsets, int64_t sequences, int64_t rows, int64_t longest) {
    bool fits = offsets[0] >= 0 && offsets[sequences] <= rows;
    for (int64_t b = 0; b < sequences; b++)
        fits = fits && offsets[b] <= offsets[b + 1] && offsets[b + 1] - offsets[b] <= longest;
    if (!fits) PyErr_SetString(PyExc_ValueError, "offsets must rise from 0 to the number of tokens, by at most max_seqlen");
    return fits;
}

// Runs a kernel while other Python threads run; it says whether there was memory enough.
template <class Kernel>
PyObject* unlocked(Kernel kernel) {
    bool enough_memory;
    Py_BEGIN_ALLOW_THREADS;
    enough_memory = kernel();
    Py_END_ALLOW_THREADS;
    if (!enough_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

// (isa, tokens, max_seqlen, q, k, v, out, ...): the members of Attention in their order.
PyObject* attention(PyObject*, PyObject* const* given, Py_ssize_t count) {
    Arguments from(given, count);
    Attention a;
    int64_t isa = from.integer(), tokens = from.integer(), longest = from.integer();
    from.address(a.q), from.address(a.k), from.address(a.v), from.address(a.out), from.address(a.offsets);
    for (int64_t* x : {&a.dtype, &a.sequences, &a.heads, &a.kv_heads, &a.dim, &a.q_token, &a.q_head, &a.k_token, &a.k_head,
                       &a.v_token, &a.v_head, &a.left, &a.right})
        *x = from.integer();
    a.scale = from.real();
    from.address(a.cos), from.address(a.sin);
    a.rotated = from.integer(), a.interleaved = from.integer();
    from.address(a.relative_bias), a.reach = from.integer();
    from.address(a.bias);
    a.bias_sequence = from.integer(), a.bias_head = from.integer(), a.bias_query = from.integer();
    from.address(a.c2p), from.address(a.p2c);
    for (int64_t* x : {&a.c2p_token, &a.c2p_head, &a.p2c_token, &a.p2c_head}) *x = from.integer();
    from.address(a.columns), a.column_reach = from.integer();
    from.address(a.rel_h), from.address(a.rel_w);
    for (int64_t* x : {&a.rel_h_token, &a.rel_h_head, &a.rel_w_token, &a.rel_w_head, &a.grid_width}) *x = from.integer();
    a.threads = from.integer();
    if (!from.ok() || !inside(a.offsets, a.sequences, tokens, longest)) return nullptr;
    return unlocked([&] { return (isa >= kAvx512 ? avx512::attention : avx2::attention)(a); });
}

// (isa, x, residual, ...): the members of AddNorm in their order.
PyObject* add_norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
    Arguments from(given, count);
    AddNorm a;
    int64_t isa = from.integer();
    from.address(a.x), from.address(a.residual), from.address(a.weight), from.address(a.bias), from.address(a.scale);
    from.address(a.x_bias), from.address(a.normed), from.address(a.sum);
    for (int64_t* x : {&a.dtype, &a.vector_dtype, &a.rows, &a.dim, &a.rms}) *x = from.integer();
    a.eps = from.real();
    a.threads = from.integer();
    if (!from.ok()) return nullptr;
    return unlocked([&] { return (isa >= kAvx512 ? avx512::add_norm : avx2::add_norm)(a); });
}

// (isa, dtype, vector_dtype, rows, dim, eps, threads, weight, bias, out), then for each table its members in their order.
PyObject* embed_norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
    Arguments from(given, count);
    EmbedNorm a = {};
    int64_t isa = from.integer();
    for (int64_t* x : {&a.dtype, &a.vector_dtype, &a.rows, &a.dim}) *x = from.integer();
    a.eps = from.real(), a.threads = from.integer();
    from.address(a.weight), from.address(a.bias), from.address(a.out);
    for (; a.tables < 3 && from.left(); a.tables++) {
        Table& table = a.table[a.tables];
        from.address(table.values), from.address(table.ids);
        for (int64_t* x : {&table.rows, &table.row, &table.wide}) *x = from.integer();
    }
    if (!from.ok()) return nullptr;
    Outcome outcome;
    PyObject* done = unlocked([&] {
        outcome = (isa >= kAvx512 ? avx512::embed_norm : avx2::embed_norm)(a);
        return outcome != kNoMemory;
    });
    if (!done || outcome == kDone) return done;
    Py_DECREF(done);
    PyErr_SetString(PyExc_IndexError, "an id is outside of its table of embeddings");
    return nullptr;
}

// (isa, x, weight, ...): the members of Linear in their order.
PyObject* linear(PyObject*, PyObject* const* given, Py_ssize_t count) {
    Arguments from(given, count);
    Linear a;
    int64_t isa = from.integer();
    from.address(a.x), from.address(a.weight), from.address(a.bias), from.address(a.scale), from.address(a.residual);
    from.address(a.out);
    for (int64_t* x : {&a.weight_dtype, &a.vector_dtype, &a.weight_row, &a.packed, &a.rows, &a.outputs, &a.inputs, &a.activation,
                       &a.threads})
        *x = from.integer();
    if (!from.ok()) return nullptr;
    return unlocked([&] { return (isa >= kAvx512 ? avx512::linear : avx2::linear)(a); });
}

// (isa, layers, rounded, x, out, ...): the bytes of one Layer after the other, whether the tokens are rounded to bfloat16 behind
// each, and the members of LayerCall in their order.
PyObject* layers(PyObject*, PyObject* const* given, Py_ssize_t count) {
    Arguments from(given, count);
    LayerCall call;
    const Layer* layers = nullptr;
    int64_t isa = from.integer(), number = from.structures(layers), rounded = from.integer();
    from.address(call.x), from.address(call.out), from.address(call.offsets);
    for (int64_t* x : {&call.sequences, &call.rows, &call.threads}) *x = from.integer();
    if (!from.ok() || !inside(call.offsets, call.sequences, call.rows, call.rows)) return nullptr;
    return unlocked([&] { return (isa >= kAvx512 ? avx512::layers : avx2::layers)(layers, number, rounded, call); });
}

PyObject* panel_width(PyObject*, PyObject* isa) {
    int64_t wide = PyLong_AsLongLong(isa) >= kAvx512;
    return PyErr_Occurred() ? nullptr : PyLong_FromLong(wide ? avx512::panel_width() : avx2::panel_width());
}

// (weight, out, ...): the members of Packing in their order.
PyObject* pack(PyObject*, PyObject* const* given, Py_ssize_t count) {
    Arguments from(given, count);
    Packing a;
    from.address(a.weight), from.address(a.out);
    for (int64_t* x : {&a.dtype, &a.row, &a.count, &a.inputs, &a.first, &a.threads}) *x = from.integer();
    if (!from.ok()) return nullptr;
    return unlocked([&] { return vnni::pack(a), true; });
}

PyObject* packed_panel_size(PyObject*, PyObject* inputs) {
    int64_t size = vnni::packed_panel_size(PyLong_AsLongLong(inputs));
    return PyErr_Occurred() ? nullptr : PyLong_FromLong(size);
}

PyObject* isa(PyObject*, PyObject*) { return PyLong_FromLong(best_isa()); }

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The best instruction set of this processor: 0 none, 1 AVX2, 2 AVX-512, 3 with VNNI."},
    {"attention", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(attention)), METH_FASTCALL, nullptr},
    {"add_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(add_norm)), METH_FASTCALL, nullptr},
    {"embed_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(embed_norm)), METH_FASTCALL, nullptr},
    {"unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(unchanged)), METH_FASTCALL, nullptr},
    {"holds", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(holds)), METH_FASTCALL, nullptr},
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL, nullptr},
    {"layers", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(layers)), METH_FASTCALL, nullptr},
    {"pack", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(pack)), METH_FASTCALL, nullptr},
    {"packed_panel_size", packed_panel_size, METH_O, "Numbers of a panel in fixed point, given the inputs."},
    {"panel_width", panel_width, METH_O, "Columns of a panel of a packed weight, given the instruction set."},
    {},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return prepare_unchanged() ? PyModule_Create(&module) : nullptr; }
