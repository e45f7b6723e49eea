// Whether layers are still made of what they were made of. This is asked before every call, and for few tokens it takes Python
// longer than some of the layers' operations.
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include "unchanged.h"

#include <cstring>

#include "kernels.h"

namespace fastencoder {
namespace {

PyObject *kForward, *kHooks, *kPreHooks, *kTraining, *kModules, *kParameters, *kDataPtr, *kVersion, *kDtype;

// An item of a tuple that Python made for this; null, with an error set, if it is none or too short.
PyObject* item(PyObject* tuple, Py_ssize_t i) { return PyTuple_GetItem(tuple, i); }

bool is_empty(PyObject* state, PyObject* name) {
    PyObject* hooks = PyDict_GetItemWithError(state, name);
    return hooks && PyDict_Check(hooks) && PyDict_Size(hooks) == 0;
}

// Whether the values of a dictionary in `state` are those of a tuple, by `same`.
template <class Same>
bool same_values(PyObject* state, PyObject* name, PyObject* expected, Same same) {
    PyObject* values = PyDict_GetItemWithError(state, name);
    if (!values || !PyDict_Check(values) || PyDict_Size(values) != PyTuple_Size(expected)) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(values, &position, &key, &value); i++) {
        Py_IncRef(value);  // what a subclass of Tensor runs to answer may replace it
        bool is_same = same(value, item(expected, i));
        Py_DecRef(value);
        if (!is_same) return false;
    }
    return true;
}

// (module, its attributes, class, children, whether hooks count)
bool same_module(PyObject* entry) {
    PyObject *module = item(entry, 0), *state = item(entry, 1), *cls = item(entry, 2);
    PyObject *children = item(entry, 3), *hooks_count = item(entry, 4);
    if (!hooks_count || !PyDict_Check(state)) return false;
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != cls || PyDict_Contains(state, kForward) != 0) return false;
    if (PyDict_GetItemWithError(state, kTraining) != Py_False) return false;
    if (hooks_count == Py_True && !(is_empty(state, kHooks) && is_empty(state, kPreHooks))) return false;
    return same_values(state, kModules, children, [](PyObject* child, PyObject* known) { return child == known; });
}

bool equal(PyObject* found, PyObject* known) {  // takes the reference to `found`
    if (!found) return false;
    int same = PyObject_RichCompareBool(found, known, Py_EQ);
    Py_DecRef(found);
    return same == 1;
}

// Of (address, version, dtype), or None.
bool same_parameter(PyObject* parameter, PyObject* known) {
    if (!known || known == Py_None || parameter == Py_None) return parameter == known;
    return equal(PyObject_CallMethodObjArgs(parameter, kDataPtr, nullptr), item(known, 0)) &&
           equal(PyObject_GetAttr(parameter, kVersion), item(known, 1)) &&
           equal(PyObject_GetAttr(parameter, kDtype), item(known, 2));
}

// (a module's attributes, what its parameters were)
bool same_parameters(PyObject* entry) {
    PyObject *state = item(entry, 0), *known = item(entry, 1);
    return known && same_values(state, kParameters, known, same_parameter);
}

// (a module's attributes, name, value): the very same object; None stands for one that is not there.
bool same_attribute(PyObject* entry) {
    PyObject *state = item(entry, 0), *name = item(entry, 1), *known = item(entry, 2);
    if (!known) return false;
    PyObject* found = PyDict_GetItemWithError(state, name);
    return found ? found == known : known == Py_None;
}

template <class Same>
bool all(PyObject* entries, Same same) {
    Py_ssize_t count = PyTuple_Size(entries);
    for (Py_ssize_t i = 0; i < count; i++)
        if (!same(item(entries, i))) return false;
    return count >= 0;
}

// The elements are far apart: those of the next tensor are on their way while these are compared.
template <class T>
bool same_elements(const Probe& probe, const Probe* next) {
    bool same = true;
    for (int64_t i = 0; i < probe.count; i++) {
        if (next) __builtin_prefetch(next->live + i * next->step);
        T live, saved;
        std::memcpy(&live, probe.live + i * probe.step, sizeof(T));
        std::memcpy(&saved, probe.saved + i * sizeof(T), sizeof(T));
        same &= live == saved;
    }
    return same;
}

bool same_elements(PyObject* probes) {
    char* from;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(probes, &from, &length) != 0) return false;
    auto probe = reinterpret_cast<const Probe*>(from);
    for (const Probe* end = probe + length / sizeof(Probe); probe < end; probe++) {
        const Probe* next = probe + 1 < end ? probe + 1 : nullptr;
        switch (probe->size) {
            case 1: if (!same_elements<uint8_t>(*probe, next)) return false; break;
            case 2: if (!same_elements<uint16_t>(*probe, next)) return false; break;
            case 4: if (!same_elements<uint32_t>(*probe, next)) return false; break;
            case 8: if (!same_elements<uint64_t>(*probe, next)) return false; break;
            default: return false;
        }
    }
    return true;
}

PyObject* wrong_number() {
    PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
    return nullptr;
}

}  // namespace

bool prepare_unchanged() {
    struct {
        PyObject*& to;
        const char* name;
    } names[] = {{kForward, "forward"},    {kHooks, "_forward_hooks"}, {kPreHooks, "_forward_pre_hooks"},
                 {kTraining, "training"},  {kModules, "_modules"},     {kParameters, "_parameters"},
                 {kDataPtr, "data_ptr"},   {kVersion, "_version"},     {kDtype, "dtype"}};
    for (auto& [to, name] : names)
        if (!(to = PyUnicode_InternFromString(name))) return false;
    return true;
}

PyObject* unchanged(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 1) return wrong_number();
    bool same = same_elements(given[0]);
    return PyErr_Occurred() ? nullptr : PyBool_FromLong(same);
}

PyObject* holds(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 4) return wrong_number();
    bool same = all(given[0], same_module) && all(given[1], same_parameters) && all(given[2], same_attribute) &&
                same_elements(given[3]);
    PyErr_Clear();  // whatever cannot be looked at is not the same
    return PyBool_FromLong(same);
}

}  // namespace fastencoder
