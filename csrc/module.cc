// The extension module `sparsejax.sparse_ops._native`: handlers for XLA's foreign function interface, in capsules as
// `jax.ffi.register_ffi_target` takes them. Python's stable ABI: one build serves every Python from 3.11 on.
#include <Python.h>

#include <algorithm>
#include <new>
#include <string>

#include "pool.h"
#include "sparse_ops.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using sparse_ops::Options;
using sparse_ops::Status;
using sparse_ops::Structure;
using sparse_ops::Values;
using sparse_ops::Window;

using F32 = ffi::Buffer<ffi::F32>;
using U16 = ffi::Buffer<ffi::U16>;
using S32 = ffi::Buffer<ffi::S32>;
using Shape = ffi::Span<const int64_t>;

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("sparsejax: " + what); }

std::string text(Shape shape) {
  std::string all = "[";
  for (const int64_t size : shape) all += (all.size() > 1 ? ", " : "") + std::to_string(size);
  return all + "]";
}

// What both products have, as XLA hands it over.
struct Weights {
  int64_t kb, nt, width, isa, threads;
  ffi::AnyBuffer values;
  U16 offs, cnt, col;
  S32 base;

  bool floating() const {
    return values.element_type() == ffi::DataType::F32 || values.element_type() == ffi::DataType::BF16;
  }
  Structure structure(int64_t K, int64_t N) const {
    const auto count = [](const auto& buffer) { return static_cast<int64_t>(buffer.element_count()); };
    return {K,
            N,
            kb,
            nt,
            width,
            offs.typed_data(),
            cnt.typed_data(),
            col.typed_data(),
            base.typed_data(),
            count(offs),
            count(cnt),
            count(col),
            count(base)};
  }
  Values numbers() const {
    return {values.untyped_data(), values.element_type() == ffi::DataType::BF16,
            static_cast<int64_t>(values.element_count())};
  }
};

template <class Product>
ffi::Error answer(Product product) {
  Status status;
  try {
    status = product();
  } catch (const std::bad_alloc&) {
    status = "there is not enough memory for this product.";
  }
  return status ? wrong(status) : ffi::Error::Success();
}

ffi::Error Matmul(int64_t kb, int64_t nt, int64_t width, int64_t isa, int64_t threads, F32 x, ffi::AnyBuffer values,
                  U16 offs, U16 cnt, U16 col, S32 base, ffi::ResultBuffer<ffi::F32> y) {
  const Weights weights{kb, nt, width, isa, threads, values, offs, cnt, col, base};
  const Shape in = x.dimensions(), out = y->dimensions();
  if (!weights.floating()) return wrong("values must be float32 or bfloat16.");
  if (in.size() != 2 || out.size() != 2 || in[0] != out[0])
    return wrong("x must be [B, K] and y [B, N], got " + text(in) + " and " + text(out) + ".");
  return answer([&] {
    return sparse_ops::matmul(weights.structure(in[1], out[1]), weights.numbers(), x.typed_data(), in[0],
                              y->typed_data(), Options{isa, threads});
  });
}

ffi::Error Conv(int64_t kb, int64_t nt, int64_t width, int64_t isa, int64_t threads, int64_t kh, int64_t kw,
                int64_t stride_h, int64_t stride_w, int64_t dilation_h, int64_t dilation_w, int64_t pad_top,
                int64_t pad_left, F32 x, ffi::AnyBuffer values, U16 offs, U16 cnt, U16 col, S32 base,
                ffi::ResultBuffer<ffi::F32> y) {
  const Weights weights{kb, nt, width, isa, threads, values, offs, cnt, col, base};
  const Shape in = x.dimensions(), out = y->dimensions();
  if (!weights.floating()) return wrong("values must be float32 or bfloat16.");
  if (in.size() != 4 || out.size() != 4 || in[0] != out[0])
    return wrong("x must be [n, h, w, c] and y [n, oh, ow, N], got " + text(in) + " and " + text(out) + ".");
  const int64_t most = int64_t{1} << 31;
  const int64_t parameters[] = {kh, kw, stride_h, stride_w, dilation_h, dilation_w};
  if (!std::all_of(std::begin(parameters), std::end(parameters), [&](int64_t p) { return p >= 1 && p < most; }) ||
      std::max(pad_top, pad_left) >= most || std::min(pad_top, pad_left) <= -most)
    return wrong("windows, strides and dilations must be >= 1, and they and the padding below 2**31.");
  int64_t K = 0;
  if (__builtin_mul_overflow(kh * kw, in[3], &K)) return wrong("the kernel is too large.");
  const Window window{in[0],      in[1],      in[2],   in[3],    kh,     kw,    stride_h, stride_w,
                      dilation_h, dilation_w, pad_top, pad_left, out[1], out[2]};
  return answer([&] {
    return sparse_ops::conv(weights.structure(K, out[3]), weights.numbers(), window, x.typed_data(), y->typed_data(),
                            Options{isa, threads});
  });
}

#define WEIGHTS_ATTRIBUTES \
  Attr<int64_t>("kb").Attr<int64_t>("nt").Attr<int64_t>("width").Attr<int64_t>("isa").Attr<int64_t>("threads")
#define ARGUMENTS \
  Arg<F32>().Arg<ffi::AnyBuffer>().Arg<U16>().Arg<U16>().Arg<U16>().Arg<S32>().Ret<ffi::Buffer<ffi::F32>>()

XLA_FFI_DEFINE_HANDLER(matmul_handler, Matmul, ffi::Ffi::Bind().WEIGHTS_ATTRIBUTES.ARGUMENTS);
XLA_FFI_DEFINE_HANDLER(conv_handler, Conv,
                       ffi::Ffi::Bind()
                           .WEIGHTS_ATTRIBUTES.Attr<int64_t>("kh")
                           .Attr<int64_t>("kw")
                           .Attr<int64_t>("stride_h")
                           .Attr<int64_t>("stride_w")
                           .Attr<int64_t>("dilation_h")
                           .Attr<int64_t>("dilation_w")
                           .Attr<int64_t>("pad_top")
                           .Attr<int64_t>("pad_left")
                           .ARGUMENTS);

// ---- The Python module ------------------------------------------------------------------------------------

template <class Handler>
bool add_handler(PyObject* handlers, const char* target, Handler* handler) {
  PyObject* capsule = PyCapsule_New(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET", nullptr);
  const bool added = capsule && !PyDict_SetItemString(handlers, target, capsule);
  Py_XDECREF(capsule);
  return added;
}

PyObject* py_handlers(PyObject*, PyObject*) {
  PyObject* handlers = PyDict_New();
  if (!handlers || !add_handler(handlers, "sparsejax_matmul", matmul_handler) ||
      !add_handler(handlers, "sparsejax_conv", conv_handler)) {
    Py_XDECREF(handlers);
    return nullptr;
  }
  return handlers;
}

PyObject* py_best_isa(PyObject*, PyObject*) { return PyLong_FromLongLong(sparse_ops::best_isa()); }

PyObject* py_allowed_threads(PyObject*, PyObject*) { return PyLong_FromLong(sparse_ops::allowed_threads()); }

PyMethodDef methods[] = {
    {"handlers", py_handlers, METH_NOARGS, "The handler of each target, in a capsule."},
    {"best_isa", py_best_isa, METH_NOARGS, "The best instruction set here: 1 plain, 2 AVX2, 3 AVX-512."},
    {"allowed_threads", py_allowed_threads, METH_NOARGS, "How many threads a product called from here may have."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "The compiled kernels.", 0, methods, slots, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&definition); }
