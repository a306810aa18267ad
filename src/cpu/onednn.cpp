#include "cpu/onednn.h"

#include "core/check.h"

#ifndef MACHMOE_HAS_ONEDNN

namespace machmoe::cpu::onednn {
bool available() { return false; }
std::string description() { return "no oneDNN: built without its headers"; }
void matmul(const Gemm&) { throw Error(Status::Internal, "oneDNN was called in a build without it"); }
}  // namespace machmoe::cpu::onednn

#else

#include <dlfcn.h>
#include <dnnl.h>

#include <array>
#include <cstdlib>
#include <map>
#include <vector>

namespace machmoe::cpu::onednn {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr int kDlopenFlags = RTLD_NOW | RTLD_LOCAL;  // AddressSanitizer refuses DEEPBIND
#else
constexpr int kDlopenFlags = RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND;
#endif

// The functions that we call, of the major version whose headers were compiled in.
struct Library {
  void* handle = nullptr;
  std::string status;
  decltype(&dnnl_version) version = nullptr;
  decltype(&dnnl_engine_create) engine_create = nullptr;
  decltype(&dnnl_stream_create) stream_create = nullptr;
  decltype(&dnnl_primitive_attr_create) attr_create = nullptr;
  decltype(&dnnl_primitive_attr_destroy) attr_destroy = nullptr;
  decltype(&dnnl_primitive_attr_set_scratchpad_mode) attr_set_scratchpad_mode = nullptr;
  decltype(&dnnl_primitive_attr_set_post_ops) attr_set_post_ops = nullptr;
  decltype(&dnnl_post_ops_create) post_ops_create = nullptr;
  decltype(&dnnl_post_ops_destroy) post_ops_destroy = nullptr;
  decltype(&dnnl_post_ops_append_sum) post_ops_append_sum = nullptr;
  decltype(&dnnl_primitive_desc_destroy) primitive_desc_destroy = nullptr;
  decltype(&dnnl_primitive_desc_query_md) query_md = nullptr;
  decltype(&dnnl_memory_desc_get_size) desc_get_size = nullptr;
  decltype(&dnnl_primitive_create) primitive_create = nullptr;
  decltype(&dnnl_primitive_execute) primitive_execute = nullptr;
  decltype(&dnnl_memory_create) memory_create = nullptr;
  decltype(&dnnl_memory_set_data_handle) memory_set_data_handle = nullptr;
  decltype(&dnnl_primitive_destroy) primitive_destroy = nullptr;
  decltype(&dnnl_memory_destroy) memory_destroy = nullptr;
  decltype(&dnnl_stream_destroy) stream_destroy = nullptr;
  decltype(&dnnl_get_effective_cpu_isa) effective_cpu_isa = nullptr;
#if DNNL_VERSION_MAJOR >= 3
  decltype(&dnnl_memory_desc_create_with_strides) desc_create_with_strides = nullptr;
  decltype(&dnnl_memory_desc_destroy) desc_destroy = nullptr;
  decltype(&dnnl_matmul_primitive_desc_create) matmul_primitive_desc_create = nullptr;
#else
  decltype(&dnnl_memory_desc_init_by_strides) desc_init_by_strides = nullptr;
  decltype(&dnnl_matmul_desc_init) matmul_desc_init = nullptr;
  decltype(&dnnl_primitive_desc_create) primitive_desc_create = nullptr;
#endif
  int (*omp_get_max_threads)() = nullptr;  // absent in builds of oneDNN on another runtime
  void (*omp_set_num_threads)(int) = nullptr;
  dnnl_engine_t engine = nullptr;
  bool native_bf16 = false;

  template <class F>
  bool find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(handle, name));
    if (!function) status = fmt::format("no oneDNN: {} lacks {}", "libdnnl", name);
    return function != nullptr;
  }

  Library() {
    const std::string file = fmt::format("libdnnl.so.{}", DNNL_VERSION_MAJOR);
    handle = dlopen(file.c_str(), kDlopenFlags);
    if (!handle) {
      status = fmt::format("no oneDNN: {} was not found", file);
      return;
    }
    bool ok = find(version, "dnnl_version") && find(engine_create, "dnnl_engine_create") && find(stream_create, "dnnl_stream_create") &&
              find(attr_create, "dnnl_primitive_attr_create") && find(attr_destroy, "dnnl_primitive_attr_destroy") &&
              find(attr_set_scratchpad_mode, "dnnl_primitive_attr_set_scratchpad_mode") &&
              find(attr_set_post_ops, "dnnl_primitive_attr_set_post_ops") && find(post_ops_create, "dnnl_post_ops_create") &&
              find(post_ops_destroy, "dnnl_post_ops_destroy") && find(post_ops_append_sum, "dnnl_post_ops_append_sum") &&
              find(primitive_desc_destroy, "dnnl_primitive_desc_destroy") && find(query_md, "dnnl_primitive_desc_query_md") &&
              find(desc_get_size, "dnnl_memory_desc_get_size") && find(primitive_create, "dnnl_primitive_create") &&
              find(primitive_execute, "dnnl_primitive_execute") && find(memory_create, "dnnl_memory_create") &&
              find(memory_set_data_handle, "dnnl_memory_set_data_handle") && find(effective_cpu_isa, "dnnl_get_effective_cpu_isa") &&
              find(primitive_destroy, "dnnl_primitive_destroy") && find(memory_destroy, "dnnl_memory_destroy") &&
              find(stream_destroy, "dnnl_stream_destroy");
#if DNNL_VERSION_MAJOR >= 3
    ok = ok && find(desc_create_with_strides, "dnnl_memory_desc_create_with_strides") && find(desc_destroy, "dnnl_memory_desc_destroy") &&
         find(matmul_primitive_desc_create, "dnnl_matmul_primitive_desc_create");
#else
    ok = ok && find(desc_init_by_strides, "dnnl_memory_desc_init_by_strides") && find(matmul_desc_init, "dnnl_matmul_desc_init") &&
         find(primitive_desc_create, "dnnl_primitive_desc_create");
#endif
    if (!ok) return;
    omp_get_max_threads = reinterpret_cast<int (*)()>(dlsym(handle, "omp_get_max_threads"));
    omp_set_num_threads = reinterpret_cast<void (*)(int)>(dlsym(handle, "omp_set_num_threads"));
    if (engine_create(&engine, dnnl_cpu, 0) != dnnl_success) {
      status = "no oneDNN: its CPU engine could not be created";
      engine = nullptr;
      return;
    }
    native_bf16 = (effective_cpu_isa() & dnnl_cpu_isa_avx512_core) == dnnl_cpu_isa_avx512_core;
    const dnnl_version_t* v = version();
    status = fmt::format("oneDNN {}.{}.{}", v->major, v->minor, v->patch);
  }
};
// Never destroyed: threads may still hold primitives when the process ends.
const Library& library() {
  static const Library* const lib = new Library;
  return *lib;
}

void check(dnnl_status_t status, const char* what) {
  if (status != dnnl_success) throw Error(Status::Backend, fmt::format("oneDNN failed in {} with status {}", what, static_cast<int>(status)));
}

// oneDNN's own OpenMP threads would change bits with their number: our threads call it with one.
class SingleThreaded {
 public:
  SingleThreaded() {
    const Library& lib = library();
    if (!lib.omp_get_max_threads || !lib.omp_set_num_threads) return;
    before_ = lib.omp_get_max_threads();
    if (before_ != 1) lib.omp_set_num_threads(1);
  }
  ~SingleThreaded() {
    if (before_ > 1) library().omp_set_num_threads(before_);
  }
  SingleThreaded(const SingleThreaded&) = delete;

 private:
  int before_ = 1;
};

// A matmul of one shape with its memory objects; lives in one thread.
class Matmul {
 public:
  Matmul(const Gemm& g, dnnl_data_type_t type) {
    const Library& lib = library();
    const bool b_transposed = g.layout == GemmLayout::NT, a_transposed = g.layout == GemmLayout::TN;
    Desc a(g.M, g.K, a_transposed ? 1 : g.lda, a_transposed ? g.lda : 1, type), b(g.K, g.N, b_transposed ? 1 : g.ldb, b_transposed ? g.ldb : 1, type),
        c(g.M, g.N, g.ldc, 1, dnnl_f32);
    dnnl_primitive_attr_t attr = nullptr;
    check(lib.attr_create(&attr), "primitive_attr_create");
    check(lib.attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user), "set_scratchpad_mode");
    if (g.accumulate) {
      dnnl_post_ops_t post = nullptr;
      check(lib.post_ops_create(&post), "post_ops_create");
#if DNNL_VERSION_MAJOR >= 3
      check(lib.post_ops_append_sum(post, 1.f, 0, dnnl_data_type_undef), "append_sum");
#else
      check(lib.post_ops_append_sum(post, 1.f), "append_sum");
#endif
      check(lib.attr_set_post_ops(attr, post), "set_post_ops");
      lib.post_ops_destroy(post);
    }
    dnnl_primitive_desc_t desc = nullptr;
#if DNNL_VERSION_MAJOR >= 3
    check(lib.matmul_primitive_desc_create(&desc, lib.engine, a.get(), b.get(), nullptr, c.get(), attr), "matmul_primitive_desc_create");
#else
    dnnl_matmul_desc_t matmul;
    check(lib.matmul_desc_init(&matmul, a.get(), b.get(), nullptr, c.get()), "matmul_desc_init");
    check(lib.primitive_desc_create(&desc, &matmul, attr, lib.engine, nullptr), "primitive_desc_create");
#endif
    lib.attr_destroy(attr);
    check(lib.primitive_create(&primitive_, desc), "primitive_create");
    const auto scratch = lib.query_md(desc, dnnl_query_scratchpad_md, 0);
    scratch_.resize(lib.desc_get_size(scratch) + 64);
    check(lib.memory_create(&memory_[3], scratch, lib.engine, aligned(scratch_.data())), "memory_create");
    lib.primitive_desc_destroy(desc);
    for (auto [memory, d] : {std::pair{&memory_[0], &a}, {&memory_[1], &b}, {&memory_[2], &c}})
      check(lib.memory_create(memory, d->get(), lib.engine, nullptr), "memory_create");
    check(lib.stream_create(&stream_, lib.engine, dnnl_stream_default_flags), "stream_create");
  }

  ~Matmul() {
    const Library& lib = library();
    for (dnnl_memory_t memory : memory_) lib.memory_destroy(memory);
    lib.stream_destroy(stream_);
    lib.primitive_destroy(primitive_);
  }
  Matmul(const Matmul&) = delete;

  void run(const void* a, const void* b, void* c) {
    const Library& lib = library();
    check(lib.memory_set_data_handle(memory_[0], const_cast<void*>(a)), "set_data_handle");
    check(lib.memory_set_data_handle(memory_[1], const_cast<void*>(b)), "set_data_handle");
    check(lib.memory_set_data_handle(memory_[2], c), "set_data_handle");
    const dnnl_exec_arg_t args[] = {
        {DNNL_ARG_SRC, memory_[0]}, {DNNL_ARG_WEIGHTS, memory_[1]}, {DNNL_ARG_DST, memory_[2]}, {DNNL_ARG_SCRATCHPAD, memory_[3]}};
    check(lib.primitive_execute(primitive_, stream_, 4, args), "primitive_execute");
  }

 private:
  // A matrix of logical size rows x cols.
  class Desc {
   public:
    Desc(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, dnnl_data_type_t type) {
      const dnnl_dims_t dims = {rows, cols}, strides = {row_stride, col_stride};
#if DNNL_VERSION_MAJOR >= 3
      check(library().desc_create_with_strides(&desc_, 2, dims, type, strides), "memory_desc_create_with_strides");
#else
      check(library().desc_init_by_strides(&desc_, 2, dims, type, strides), "memory_desc_init_by_strides");
#endif
    }
    Desc(const Desc&) = delete;
#if DNNL_VERSION_MAJOR >= 3
    ~Desc() { library().desc_destroy(desc_); }
    dnnl_memory_desc_t get() { return desc_; }
#else
    dnnl_memory_desc_t* get() { return &desc_; }
#endif

   private:
    dnnl_memory_desc_t desc_{};
  };
  static void* aligned(uint8_t* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }

  dnnl_primitive_t primitive_ = nullptr;
  dnnl_stream_t stream_ = nullptr;
  std::array<dnnl_memory_t, 4> memory_{};  // A, B, C, scratchpad
  std::vector<uint8_t> scratch_;
};

// fp32 copies of bf16 operands, for CPUs whose oneDNN has no fast bf16.
const float* widen(const void* data, int64_t rows, int64_t cols, int64_t ld, std::vector<float>& out) {
  out.resize(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i * ld + j]) << 16;
      __builtin_memcpy(&out[static_cast<size_t>(i * cols + j)], &bits, sizeof bits);
    }
  return out.data();
}

}  // namespace

bool available() { return library().engine != nullptr; }
std::string description() { return library().status; }

void matmul(const Gemm& g) {
  if (g.dtype == DType::BF16 && !library().native_bf16) {
    static thread_local std::vector<float> a, b;
    Gemm wide = g;
    wide.dtype = DType::F32;
    wide.a = g.layout == GemmLayout::TN ? widen(g.a, g.K, wide.lda = g.M, g.lda, a) : widen(g.a, g.M, wide.lda = g.K, g.lda, a);
    wide.b = g.layout == GemmLayout::NT ? widen(g.b, g.N, wide.ldb = g.K, g.ldb, b) : widen(g.b, g.K, wide.ldb = g.N, g.ldb, b);
    return matmul(wide);
  }
  using Key = std::array<int64_t, 9>;
  static thread_local std::map<Key, Matmul> cache;
  const SingleThreaded one;
  const Key key = {static_cast<int64_t>(g.layout), static_cast<int64_t>(g.dtype), g.accumulate, g.M, g.N, g.K, g.lda, g.ldb, g.ldc};
  auto found = cache.find(key);
  if (found == cache.end()) found = cache.try_emplace(key, g, g.dtype == DType::BF16 ? dnnl_bf16 : dnnl_f32).first;
  found->second.run(g.a, g.b, g.c);
}

}  // namespace machmoe::cpu::onednn

#endif
