// Kernel side of a SIMT machine on a CPU: what generated CUDA C needs, so that g++ compiles the
// very text that nvcc compiles. Threads of a block are fibers of one OS thread; simt.cpp schedules
// them and checks every access to memory.
#pragma once
#include <immintrin.h>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ \
  static __attribute__((section("simt_shared")))  // "extern __shared__" is rewritten by simt.py
#define alignas(n) __attribute__((aligned(n)))    // TVM writes "__shared__ alignas(64) float x[8]"
using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
#define V2(T, N)                                                   \
  struct __attribute__((aligned(2 * sizeof(T)))) N##2 { T x, y; }; \
  static inline N##2 make_##N##2(T x, T y) { return {x, y}; }
#define V4(T, N)                                                                               \
  struct __attribute__((aligned(sizeof(T) == 8 ? 16 : 4 * sizeof(T)))) N##4 { T x, y, z, w; }; \
  static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define V(T, N) V2(T, N) V4(T, N)
V(int8_t, char)
V(uint8_t, uchar) V(int16_t, short) V(uint16_t, ushort) V(int32_t, int) V(uint32_t, uint)
    V(float, float) V(int64_t, longlong) V(uint64_t, ulonglong) V(double, double)

    // --- the machine (simt.cpp) ---
    struct SimtThread {
  uint3 thread_idx;
  int number, lane, warp;
};
extern "C" {
extern SimtThread* simt_current;
extern uint3 simt_block_idx;
extern dim3 simt_block_dim, simt_grid_dim;
void* simt_dynamic_shared(size_t align);
void simt_syncthreads(int line);
void simt_named_barrier(int id, int count, bool waits, int line);
void simt_syncwarp(uint32_t mask, int line);
void simt_fence();
void simt_collective(int op, uint32_t mask, int line, const void* in, size_t in_bytes, void* out,
                     size_t out_bytes, int argument);
uint32_t simt_to_shared(const void* p);
void* simt_from_shared(uint32_t offset);
void simt_access(const void* p, size_t bytes, int kind);  // 0 read, 1 write, 2 atomic
void simt_async_copy(uint32_t dst, const void* src, unsigned bytes, unsigned src_bytes);
void simt_async_commit();
void simt_async_wait(int left);
void simt_mbarrier(int op, uint32_t address, uint32_t value,
                   int line);  // 0 init, 1 arrive, 2 arrive.expect_tx, 3 wait parity
void simt_tma_load(uint32_t dst, const void* map, int dims, const int* coordinates,
                   uint32_t mbarrier);
void simt_wgmma(int n, float** d, uint64_t a, uint64_t b, bool accumulate, int line);
void simt_wgmma_commit();
void simt_wgmma_wait(int left);
[[noreturn]] void simt_trap(const char* why, int line);
}
enum {
  OP_SHFL_IDX,
  OP_SHFL_XOR,
  OP_SHFL_UP,
  OP_SHFL_DOWN,
  OP_BALLOT,
  OP_MMA_BF16,
  OP_MMA_F16,
  OP_MMA_S8,
  OP_LDMATRIX,
  OP_REDUCE_ADD,
  OP_REDUCE_MAX,
  OP_REDUCE_MIN,
  OP_WARPGROUP
};
#define threadIdx (simt_current->thread_idx)
#define blockIdx simt_block_idx
#define blockDim simt_block_dim
#define gridDim simt_grid_dim
#define warpSize 32
#define __syncthreads() simt_syncthreads(__LINE__)
#define __syncwarp(...) simt_syncwarp(simt_mask(__VA_ARGS__), __LINE__)
static inline uint32_t simt_mask(uint32_t m = 0xffffffffu) { return m; }
static inline void __threadfence() { simt_fence(); }
static inline void __threadfence_block() {}
template <class T>
static inline T simt_shuffle(int op, uint32_t mask, T v, int by, int width, int line) {
  T out;
  static_assert(sizeof(T) <= 8);
  uint64_t packed[3] = {0, (uint64_t)(uint32_t)by, (uint64_t)(uint32_t)width}, result = 0;
  memcpy(packed, &v, sizeof v);
  simt_collective(op, mask, line, packed, sizeof packed, &result, 8, 0);
  memcpy(&out, &result, sizeof out);
  return out;
}
#define __shfl_xor_sync(m, v, b, ...) \
  simt_shuffle(OP_SHFL_XOR, m, v, b, simt_width(__VA_ARGS__), __LINE__)
#define __shfl_down_sync(m, v, b, ...) \
  simt_shuffle(OP_SHFL_DOWN, m, v, b, simt_width(__VA_ARGS__), __LINE__)
#define __shfl_up_sync(m, v, b, ...) \
  simt_shuffle(OP_SHFL_UP, m, v, b, simt_width(__VA_ARGS__), __LINE__)
#define __shfl_sync(m, v, b, ...) \
  simt_shuffle(OP_SHFL_IDX, m, v, b, simt_width(__VA_ARGS__), __LINE__)
static inline int simt_width(int w = 32) { return w; }
static inline uint32_t simt_ballot(uint32_t mask, int p, int line) {
  uint64_t in = p != 0, out;
  simt_collective(OP_BALLOT, mask, line, &in, 8, &out, 8, 0);
  return (uint32_t)out;
}
#define __ballot_sync(m, p) simt_ballot(m, p, __LINE__)
#define __any_sync(m, p) (simt_ballot(m, p, __LINE__) != 0)
#define __all_sync(m, p) (simt_ballot(m, p, __LINE__) == (uint32_t)(m))
static inline uint32_t __activemask() { return 0xffffffffu; }

// --- scalar intrinsics ---
static inline int __dp4a(int a, int b, int c) {
  int8_t x[4], y[4];
  memcpy(x, &a, 4);
  memcpy(y, &b, 4);
  for (int i = 0; i < 4; ++i) c += x[i] * y[i];
  return c;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline float __int_as_float(int x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}
static inline int __float_as_int(float f) {
  int x;
  memcpy(&x, &f, 4);
  return x;
}
static inline unsigned __float_as_uint(float f) {
  unsigned x;
  memcpy(&x, &f, 4);
  return x;
}
static inline float __uint_as_float(unsigned x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fdividef(float a, float b) { return a / b; }
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __exp2f(x) exp2f(x)
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  uint64_t v = ((uint64_t)b << 32) | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= (unsigned)((v >> (8 * ((s >> (4 * i)) & 7))) & 255) << (8 * i);
  return r;
}
template <class T>
static inline T __ldg(const T* p) {
  return *p;
}
template <class T>
static inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
static inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
static inline void __stcs(T* p, T v) {
  *p = v;
}
static inline size_t __cvta_generic_to_shared(const void* p) { return simt_to_shared(p); }
static inline void __trap_at(int line) { simt_trap("__trap", line); }
#define __trap() __trap_at(__LINE__)
template <class T, class F>
__attribute__((no_sanitize("thread"))) static inline T simt_rmw(T* p, F f) {
  simt_access(p, sizeof(T), 2);
  T old = *p;
  *p = f(old);
  return old;
}
template <class T, class U>
static inline T atomicAdd(T* p, U v) {
  return simt_rmw(p, [=](T o) { return (T)(o + (T)v); });
}
template <class T, class U>
static inline T atomicMax(T* p, U v) {
  return simt_rmw(p, [=](T o) { return o > (T)v ? o : (T)v; });
}
template <class T, class U>
static inline T atomicMin(T* p, U v) {
  return simt_rmw(p, [=](T o) { return o < (T)v ? o : (T)v; });
}
template <class T, class U>
static inline T atomicExch(T* p, U v) {
  return simt_rmw(p, [=](T) { return (T)v; });
}
template <class T, class U, class W>
static inline T atomicCAS(T* p, U c, W v) {
  return simt_rmw(p, [=](T o) { return o == (T)c ? (T)v : o; });
}
static inline unsigned atomicInc(unsigned* p, unsigned v) {
  return simt_rmw(p, [=](unsigned o) { return o >= v ? 0u : o + 1; });
}

// --- half and bfloat16: storage types, arithmetic in float (round to nearest even) ---
struct half {
  uint16_t bits;
  half() = default;
  half(float f) : bits(_cvtss_sh(f, 0)) {}
  half(double f) : half((float)f) {}
  half(int i) : half((float)i) {}
  operator float() const { return _cvtsh_ss(bits); }
};
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    bits =
        (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  nv_bfloat16(double f) : nv_bfloat16((float)f) {}
  nv_bfloat16(int i) : nv_bfloat16((float)i) {}
  operator float() const {
    uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};
using __half = half;
using __nv_bfloat16 = nv_bfloat16;
#define PAIR(T)                     \
  struct alignas(4) T##2_ {         \
    T x, y;                         \
    T##2_() = default;              \
    T##2_(T a, T b) : x(a), y(b) {} \
  };
PAIR(half) PAIR(nv_bfloat16) using half2 = half2_;
using __half2 = half2_;
using nv_bfloat162 = nv_bfloat162_;
using __nv_bfloat162 = nv_bfloat162_;
#define OPS(T)                                                           \
  static inline T operator+(T a, T b) { return T((float)a + (float)b); } \
  static inline T operator-(T a, T b) { return T((float)a - (float)b); } \
  static inline T operator*(T a, T b) { return T((float)a * (float)b); } \
  static inline T operator/(T a, T b) { return T((float)a / (float)b); } \
  static inline bool __hgt(T a, T b) { return (float)a > (float)b; }     \
  static inline bool __hlt(T a, T b) { return (float)a < (float)b; }
OPS(half) OPS(nv_bfloat16) static inline float __half2float(half h) { return h; }
static inline half __float2half(float f) { return half(f); }
static inline half __float2half_rn(float f) { return half(f); }
static inline float __bfloat162float(nv_bfloat16 h) { return h; }
static inline nv_bfloat16 __float2bfloat16(float f) { return nv_bfloat16(f); }
static inline nv_bfloat16 __float2bfloat16_rn(float f) { return nv_bfloat16(f); }
static inline unsigned short __bfloat16_as_ushort(nv_bfloat16 h) { return h.bits; }
static inline nv_bfloat16 __ushort_as_bfloat16(unsigned short u) {
  nv_bfloat16 h;
  h.bits = u;
  return h;
}
static inline nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {nv_bfloat16(a), nv_bfloat16(b)};
}
static inline half2 __halves2half2(half a, half b) { return {a, b}; }

// --- PTX: simt.py turns `asm volatile("a.b.c {%0}, [%1], 16;" : ...)` into PTX(a_b_c)(operand 0,
// operand 1, 16) ---
template <class A, class... X>
static inline void ptx_mma(int op, A& d0, A& d1, A& d2, A& d3, X... x) {
  uint32_t in[16];
  int i = 0;
  auto put = [&](auto v) { memcpy(&in[i++], &v, 4); };
  (put(x), ...);
  uint32_t out[4];
  simt_collective(op, 0xffffffffu, 0, in, 4 * i, out, 16, i);
  memcpy(&d0, out, 4);
  memcpy(&d1, out + 1, 4);
  memcpy(&d2, out + 2, 4);
  memcpy(&d3, out + 3, 4);
}
#define MMA(NAME, OP)                 \
  template <class... X>               \
  static inline void NAME(X&&... x) { \
    ptx_mma(OP, x...);                \
  }
MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, OP_MMA_BF16)
MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, OP_MMA_F16)
MMA(ptx_mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32, OP_MMA_S8)
static inline void ptx_ldmatrix(uint32_t* r, int n, bool transposed, uint32_t address) {
  uint32_t in[1] = {address};
  simt_collective(OP_LDMATRIX, 0xffffffffu, 0, in, 4, r, 4 * n, n | (transposed ? 8 : 0));
}
#define LDM4(NAME, T)                                                                       \
  static inline void NAME(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t p) { \
    uint32_t r[4];                                                                          \
    ptx_ldmatrix(r, 4, T, p);                                                               \
    a = r[0];                                                                               \
    b = r[1];                                                                               \
    c = r[2];                                                                               \
    d = r[3];                                                                               \
  }
#define LDM2(NAME, T)                                             \
  static inline void NAME(uint32_t& a, uint32_t& b, uint32_t p) { \
    uint32_t r[2];                                                \
    ptx_ldmatrix(r, 2, T, p);                                     \
    a = r[0];                                                     \
    b = r[1];                                                     \
  }
LDM4(ptx_ldmatrix_sync_aligned_m8n8_x4_shared_b16, false)
LDM4(ptx_ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16, true)
    LDM2(ptx_ldmatrix_sync_aligned_m8n8_x2_shared_b16, false)
        LDM2(ptx_ldmatrix_sync_aligned_m8n8_x2_trans_shared_b16,
             true) static inline void ptx_cp_async_cg_shared_global(uint32_t d, const void* s,
                                                                    unsigned n, unsigned m = ~0u) {
  simt_async_copy(d, s, n, m == ~0u ? n : m);
}
static inline void ptx_cp_async_ca_shared_global(uint32_t d, const void* s, unsigned n,
                                                 unsigned m = ~0u) {
  simt_async_copy(d, s, n, m == ~0u ? n : m);
}
static inline void ptx_cp_async_commit_group() { simt_async_commit(); }
static inline void ptx_cp_async_wait_group(int n) { simt_async_wait(n); }
static inline void ptx_cp_async_wait_all() {
  simt_async_commit();
  simt_async_wait(0);
}
static inline void ptx_mbarrier_init_shared_b64(uint32_t a, uint32_t n) {
  simt_mbarrier(0, a, n, 0);
}
static inline void ptx_mbarrier_arrive_shared_b64(uint32_t a) { simt_mbarrier(1, a, 1, 0); }
static inline void ptx_mbarrier_arrive_expect_tx_shared_b64(uint32_t a, uint32_t n) {
  simt_mbarrier(2, a, n, 0);
}
static inline void ptx_mbarrier_wait_parity(uint32_t a, uint32_t phase) {
  simt_mbarrier(3, a, phase, 0);
}
template <class... X>
static inline void ptx_bar_sync(int id, X... count) {
  int c[] = {count..., 0};
  simt_named_barrier(id, c[0], true, 0);
}
static inline void ptx_bar_arrive(int id, int count) { simt_named_barrier(id, count, false, 0); }
static inline void ptx_cp_async_bulk_tensor_2d_shared__cluster_global_mbarrier__complete_tx__bytes(
    uint32_t d, const void* map, int x, int y, uint32_t bar) {
  int c[] = {x, y};
  simt_tma_load(d, map, 2, c, bar);
}
static inline void ptx_wgmma_fence_sync_aligned() {}
static inline void ptx_wgmma_commit_group_sync_aligned() { simt_wgmma_commit(); }
static inline void ptx_wgmma_wait_group_sync_aligned(int n) { simt_wgmma_wait(n); }
template <int N, class... X, size_t... I>
static inline void ptx_wgmma_ss(std::index_sequence<I...>, std::tuple<X&...> t) {
  constexpr int R = N / 2;
  float* d[] = {(I < R ? (float*)&std::get<(I < R ? I : 0)>(t) : nullptr)...};
  simt_wgmma(N, d, std::get<R>(t), std::get<R + 1>(t), std::get<R + 2>(t), 0);
}
#define WGMMA(N)                                                                             \
  template <class... X>                                                                      \
  static inline void ptx_wgmma_mma_async_sync_aligned_m64n##N##k16_f32_bf16_bf16(X&&... x) { \
    ptx_wgmma_ss<N>(std::make_index_sequence<N / 2>{},                                       \
                    std::tuple<std::remove_reference_t<X>&...>(x...));                       \
  }
WGMMA(8)
WGMMA(16) WGMMA(32) WGMMA(64) WGMMA(128) WGMMA(256)

    // --- module table: simt.py appends SIMT_MODULE with the kernels' names ---
    struct SimtKernel {
  const char* name;
  void (*call)(void**);
  int parameters;
  const int* sizes;
};
struct SimtModule {
  int version;
  int kernels;
  const SimtKernel* kernel;
  char *shared_begin, *shared_end;
};
template <class... A, size_t... I>
static inline void simt_call(void (*f)(A...), void** p, std::index_sequence<I...>) {
  f(*(std::remove_cv_t<A>*)p[I]...);
}
template <class... A>
static inline void simt_unpack(void (*f)(A...), void** p) {
  simt_call(f, p, std::index_sequence_for<A...>{});
}
template <class... A>
struct SimtSizes {
  static inline const int sizes[sizeof...(A) + 1] = {(int)sizeof(A)..., 0};
};
template <class... A>
static inline SimtKernel simt_describe(const char* name, void (*)(A...), void (*call)(void**)) {
  return {name, call, (int)sizeof...(A), SimtSizes<A...>::sizes};
}
