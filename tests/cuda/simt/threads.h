// What the machine consists of: threads as fibers, cells of shadow memory, and how findings are
// reported.
#pragma once
#include "simt.h"
#include <sys/mman.h>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>
#undef threadIdx
typedef uint32_t u32;
typedef uint64_t u64;
typedef uintptr_t up;

extern "C" void simt_switch(void** save, void* to);
asm(R"(.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi); mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size simt_switch,.-simt_switch
)");

enum { READ, WRITE, ATOMIC };
enum State : uint8_t { READY, BARRIER, NAMED, COLLECTIVE, MBARRIER, DONE };
const size_t STACK = 128 << 10, GLOBAL_BYTES = 8ull << 30, PAGE = 4096, DYNAMIC_BYTES = 232448,
             STATIC_BYTES = 64 << 10;
const int THREADS = 1024,
          ENGINE = THREADS;  // one more clock, the last of `seen`: that of the copy engine (TMA)
const u32 SHARED_WINDOW = 1024,
          STATIC_WINDOW = 0x100000;  // sm_90 keeps 1 KB; static shared memory lies elsewhere here
struct Copy {
  u32 dst;
  const char* src;
  unsigned bytes, src_bytes;
  int group;
};
struct Accumulators {
  int group, n;
  float* d[128];
  float value[128];
};
struct Thread : SimtThread {
  void* sp;
  char* stack;
  State state;
  int line, wait_count;
  u32 clock;
  std::vector<u32> seen;  // seen[u]: newest clock of u ordered before now; empty: none beyond base
  std::vector<Copy> copies;
  int copy_group;
  std::vector<Accumulators> wg;
  int wg_group;
  bool fenced;
  up wait_address;
  u32 wait_parity;
};
struct Cell {
  u64 w, r;
  uint8_t init, wmask, flight, reading;
  u32 many;
};  // 4 bytes of memory; masks are of its bytes
struct Pending {
  int op, group, count, arrived, left, argument;
  up line;
  u32 mask;
  bool done;
  bool here[128];
  u64 in[128][8], out[128][4];
};
struct Mbarrier {
  u32 count, arrived;
  int tx;
  u32 phase;
  std::vector<u32> seen, done_seen;
  u64 made;
};
struct NamedBarrier {
  int arrived = 0;
  std::vector<int> waiting;
  std::vector<u32> seen;
};
struct Tma {
  u32 dst;
  const void* map;
  int c[2];
  u32 bar;
  std::vector<u32> seen;
};
struct TensorMap {
  u64 magic;
  char* base;
  u32 rank, element, swizzle, box[2];
  u64 dim[2], stride;
};
struct Known {
  u32 base, clock;
  int thread;
};
struct Allocation {
  char* begin;
  size_t bytes;
  bool read_only, is_free;
};

extern "C" {
SimtThread* simt_current;
uint3 simt_block_idx;
dim3 simt_block_dim, simt_grid_dim;
}
static Thread threads[THREADS];
static void* scheduler_sp;
static int count_threads, arrived, alive;
static u32 base_clock;
static bool partial, precise = true;
static char* global_base;
static Cell* global_cells;
static uint8_t* page_kind;
static size_t global_used;
alignas(1024) static char dynamic_shared[DYNAMIC_BYTES];
static Cell dynamic_cells[DYNAMIC_BYTES / 4], static_cells[STATIC_BYTES / 4];
static size_t dynamic_bytes;
static const SimtModule* module_;
static const SimtKernel* kernel_;
static u64 launch = 1, block;
static std::map<up, Allocation> allocations;
static std::vector<Pending*> pending;
static std::vector<Pending*> spare;
static std::vector<u32> many_pool;
static std::map<u32, Mbarrier> mbarriers;
static std::vector<Tma> tma;
static std::map<int, NamedBarrier> named;
static std::unordered_map<up, std::map<u64, Known>> releases;
static std::map<u64, Known> known;
static std::string reports;
static std::map<std::string, int> seen_reports;
static int order_mode;
static unsigned order_seed;
static bool failed;
static u64 counters[4];
static u32 engine_clock;
static inline Thread& current() { return *(Thread*)simt_current; }

static void report(const char* kind, up pc, const char* format, ...) {
  char text[400];
  va_list a;
  va_start(a, format);
  vsnprintf(text, sizeof text, format, a);
  va_end(a);
  char head[240];
  snprintf(head, sizeof head, "%s|%s|%lx", kind, kernel_ ? kernel_->name : "host",
           (unsigned long)pc);
  if (seen_reports[head]++) return;  // once for each place in the code
  Thread& t = current();
  char full[900];
  snprintf(full, sizeof full, "%s|%lx|kernel %s block (%u,%u,%u) thread %d: %s\n", kind,
           (unsigned long)pc, kernel_ ? kernel_->name : "-", simt_block_idx.x, simt_block_idx.y,
           simt_block_idx.z, simt_current ? t.number : -1, text);
  reports += full;
}
static void leave() {
  void* unused;
  simt_switch(&unused, scheduler_sp);
}
static void fatal() {
  failed = true;
  leave();
  __builtin_unreachable();
}
static void suspend(State s) {
  Thread& t = current();
  t.state = s;
  simt_switch(&t.sp, scheduler_sp);
}
