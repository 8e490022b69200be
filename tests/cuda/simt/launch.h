// Blocks and launches.
#pragma once
static void** launch_parameters;
static void fiber_main() {
  kernel_->call(launch_parameters);
  Thread& t = current();
  t.state = DONE;
  alive--;
  leave();
}
static void prepare(Thread& t, int i) {
  if (!t.stack) {
    t.stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  void** sp = (void**)(t.stack + STACK - 64);
  *--sp = nullptr;
  *--sp = (void*)fiber_main;
  sp -= 6;
  memset(sp, 0, 48);
  t.sp = sp;
  t.number = i;
  t.lane = i % 32;
  t.warp = i / 32;
  unsigned x = simt_block_dim.x, y = simt_block_dim.y;
  t.thread_idx = {i % x, i / x % y, i / (x * y)};
  t.state = READY;
  t.line = 0;
  t.clock = 1;
  t.seen.clear();
  t.copies.clear();
  t.copy_group = 0;
  t.wg.clear();
  t.wg_group = 0;
  t.fenced = false;
}
static void run_block() {
  base_clock = 1;
  arrived = 0;
  alive = count_threads;
  pending.clear();
  mbarriers.clear();
  tma.clear();
  named.clear();
  wg_reads.clear();
  known.clear();
  many_pool.assign(1, 0);
  engine_clock = 0;
  partial = false;
  size_t s = module_->shared_begin ? module_->shared_end - module_->shared_begin : 0;
  memset(dynamic_cells, 0, dynamic_bytes / 4 * sizeof(Cell) + sizeof(Cell));
  memset(dynamic_shared, 0xff, dynamic_bytes);
  if (s) {
    memset(static_cells, 0, (s / 4 + 1) * sizeof(Cell));
    memset(module_->shared_begin, 0xff, s);
  }  // NaN
  std::vector<int> order(count_threads);
  for (int i = 0; i < count_threads; ++i) order[i] = order_mode == 1 ? count_threads - 1 - i : i;
  std::mt19937 random(order_seed + (unsigned)block);
  for (int i = 0; i < count_threads; ++i) prepare(threads[i], i);
  while (alive && !failed) {
    bool progress = false;
    if (order_mode == 2) std::shuffle(order.begin(), order.end(), random);
    for (int i : order)
      if (threads[i].state == READY) {
        simt_current = &threads[i];
        progress = true;
        simt_switch(&scheduler_sp, threads[i].sp);
        if (failed) break;
      }
    if (!progress && !tma.empty()) {
      deliver();
      progress = true;
    }
    if (!progress && alive) {
      std::map<std::string, int> where;
      for (int i = 0; i < count_threads; ++i) {
        const char* names[] = {"ready",
                               "at __syncthreads",
                               "at a named barrier",
                               "at a warp collective",
                               "at an mbarrier",
                               "ended"};
        where[std::string(names[threads[i].state]) +
              (threads[i].state == BARRIER ? " line " + std::to_string(threads[i].line) : "")]++;
      }
      std::string text;
      for (auto& [k, n] : where)
        text += (text.empty() ? "" : ", ") + std::to_string(n) + " threads " + k;
      simt_current = &threads[0];
      report("divergent barrier", 0, "no thread can go on: %s", text.c_str());
      failed = true;
    }
  }
  simt_current = nullptr;
}
extern "C" {
int simt_launch(const SimtModule* m, const SimtKernel* k, dim3 grid, dim3 block_dim, size_t dynamic,
                void** parameters) {
  module_ = m;
  kernel_ = k;
  launch_parameters = parameters;
  simt_grid_dim = grid;
  simt_block_dim = block_dim;
  dynamic_bytes = dynamic;
  count_threads = block_dim.x * block_dim.y * block_dim.z;
  failed = false;
  launch = launch % 0xffff + 1;
  releases.clear();
  u64 n = (u64)grid.x * grid.y * grid.z;
  std::vector<u64> order(n);
  for (u64 i = 0; i < n; ++i) order[i] = order_mode == 1 ? n - 1 - i : i;
  std::mt19937 random(order_seed);
  if (order_mode == 2) std::shuffle(order.begin(), order.end(), random);
  for (u64 b : order) {
    block = b;
    simt_block_idx = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y),
                      (unsigned)(b / grid.x / grid.y)};
    run_block();
    if (counts_traffic) end_block_traffic();
    if (failed) break;
  }
  kernel_ = nullptr;
  return failed;
}
void simt_configure(int mode, unsigned seed) {
  order_mode = mode;
  order_seed = seed;
}
const char* simt_reports() { return reports.c_str(); }
void simt_clear() {
  reports.clear();
  seen_reports.clear();
  memset(counters, 0, sizeof counters);
}
const u64* simt_counters() { return counters; }
static void ready() {
  if (global_base) return;
  auto map = [](size_t n) {
    void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) {
      perror("simt: mmap");
      abort();
    }
    return p;
  };
  global_base = (char*)map(GLOBAL_BYTES);
  global_cells = (Cell*)map(GLOBAL_BYTES / 4 * sizeof(Cell));
  page_kind = (uint8_t*)map(GLOBAL_BYTES / PAGE);
  global_used = PAGE;
}
void* simt_alloc(size_t n) {
  ready();
  if (global_used + n + 2 * PAGE > GLOBAL_BYTES) return nullptr;
  char* p = global_base + global_used;
  allocations[(up)p] = {p, n, false, false};
  memset(page_kind + global_used / PAGE, 1, (n + PAGE - 1) / PAGE);
  global_used += (n + PAGE - 1) / PAGE * PAGE + PAGE;
  return p;  // a page of no man's land behind each
}
int simt_free(void* p) {
  auto it = allocations.find((up)p);
  if (it == allocations.end() || it->second.is_free) return 1;
  it->second.is_free = true;
  madvise(p, it->second.bytes, MADV_DONTNEED);
  return 0;
}
int simt_holds(const void* p, size_t n) {
  auto it = allocations.upper_bound((up)p);
  if (it == allocations.begin()) return 0;
  auto& a = std::prev(it)->second;
  return !a.is_free && (up)p + n <= (up)a.begin + a.bytes;
}
void simt_protect(void* p) {
  auto& a = allocations.at((up)p);
  a.read_only = true;
  memset(page_kind + (a.begin - global_base) / PAGE, 2, a.bytes / PAGE);
}
void simt_mark(const void* p, size_t n) {
  up g = (up)p - (up)global_base;
  for (up i = g / 4; i <= (g + n - 1) / 4; ++i) global_cells[i].init = 15;
}
int simt_encode_map(void* out, char* base, u32 element, const u64* dim, u64 stride, const u32* box,
                    u32 swizzle) {
  TensorMap m{0x7131337461, base, 2, element, swizzle, {box[0], box[1]}, {dim[0], dim[1]}, stride};
  memset(out, 0, 128);
  memcpy(out, &m, sizeof m);
  return 0;
}
}
