// Whether what was looked at is still the same. For unchanged.cpp, which has Python's header, and module.cpp.
#pragma once
#include <Python.h>

namespace fastencoder {

// False, with an error set, if there is no memory. Before the others.
bool prepare_unchanged();
// (probes): whether elements are still what they were, for the bytes of one Probe after the other.
PyObject* unchanged(PyObject*, PyObject* const* given, Py_ssize_t count);
// (modules, parameters, attributes, probes): whether layers are still what `layers/snapshot.py` saw.
PyObject* holds(PyObject*, PyObject* const* given, Py_ssize_t count);

}  // namespace fastencoder
