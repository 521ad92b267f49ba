// The structs of cpu/kernels.h out of Python. Each comes as a tuple of its members, in the order in which `take` takes
// them, and is made in one place (ldm_fast/ops/cpu.py). To read a tuple takes half as long as to convert as many
// arguments.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>

#include "cpu/kernels.h"

namespace ldm {

// Takes the items of a tuple one after the other.
class Items {
  public:
    explicit Items(PyObject* tuple) : tuple_(tuple), size_(PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : 0) {}

    template <class T>
    Items& operator>>(T& member) {
        if (next_ == size_) {
            complete_ = false;
            return *this;
        }
        PyObject* const item = PyTuple_GET_ITEM(tuple_, next_++);
        if constexpr (std::is_pointer_v<T>) {
            member = static_cast<T>(PyLong_AsVoidPtr(item));
        } else if constexpr (std::is_floating_point_v<T>) {
            member = static_cast<T>(PyFloat_AsDouble(item));
        } else if constexpr (std::is_array_v<T>) {  // the strides that are needed, of all a tensor has
            Items items(item);
            for (auto& each : member) items >> each;
            complete_ = complete_ && items.complete_;
        } else if constexpr (std::is_class_v<T>) {
            Items items(item);
            take(items, member);
            complete_ = complete_ && items.finished();
        } else {
            member = static_cast<T>(PyLong_AsLongLong(item));
        }
        return *this;
    }

    // Whether there were neither too few items nor too many, and none of a wrong type.
    bool finished() const { return complete_ && next_ == size_ && !PyErr_Occurred(); }

  private:
    PyObject* tuple_;
    Py_ssize_t size_, next_ = 0;
    bool complete_ = true;
};

inline void take(Items& items, Norm& a) {
    items >> a.dtype >> a.channels_last >> a.silu >> a.batch >> a.channels >> a.spatial >> a.groups;
    items >> a.x >> a.weight >> a.bias >> a.scale >> a.shift >> a.eps >> a.threads;
}

inline void take(Items& items, Attention& a) {
    items >> a.dtype >> a.mask_kind >> a.batch >> a.heads >> a.rows >> a.keys >> a.width;
    items >> a.q >> a.k >> a.v >> a.mask >> a.out >> a.lse;
    items >> a.q_stride >> a.k_stride >> a.v_stride >> a.out_stride >> a.mask_stride >> a.scale >> a.threads;
}

inline void take(Items& items, AttentionBackward& a) {
    items >> a.forward >> a.grad >> a.grad_stride >> a.dq >> a.dk >> a.dv;
}

inline void take(Items& items, NearestCodebook& a) {
    items >> a.dtype >> a.search >> a.batch >> a.rows >> a.codes >> a.width;
    items >> a.z >> a.codebook >> a.z_stride >> a.codebook_stride >> a.index >> a.counts >> a.sums >> a.threads;
}

}  // namespace ldm

namespace pybind11::detail {

template <class Struct>
struct FromTuple {
    PYBIND11_TYPE_CASTER(Struct, const_name("tuple"));

    bool load(handle source, bool) {
        ldm::Items items(source.ptr());
        take(items, value);
        const bool finished = items.finished();
        PyErr_Clear();  // pybind11 raises a TypeError of its own
        return finished;
    }
};

template <>
struct type_caster<ldm::Norm> : FromTuple<ldm::Norm> {};
template <>
struct type_caster<ldm::Attention> : FromTuple<ldm::Attention> {};
template <>
struct type_caster<ldm::AttentionBackward> : FromTuple<ldm::AttentionBackward> {};
template <>
struct type_caster<ldm::NearestCodebook> : FromTuple<ldm::NearestCodebook> {};

}  // namespace pybind11::detail
