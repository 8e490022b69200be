// Mbarrier, tma, wgmma.
#pragma once
static void complete_phase(Mbarrier& b) {
  if (b.arrived < b.count || b.tx != 0) return;
  b.phase++;
  b.arrived = 0;
  b.done_seen = b.seen;
  for (int i = 0; i < count_threads; ++i)
    if (threads[i].state == MBARRIER && &mbarriers[threads[i].wait_address] == &b)
      threads[i].state = READY;
}
extern "C" void simt_mbarrier(int op, u32 a, u32 v, int) {
  Thread& t = current();
  up pc = (up)RA;
  partial = true;
  up p = (up)simt_from_shared(a);
  if (op == 0) {
    access_as(t, p, 8, WRITE, pc, true);
    mbarriers[a] = {v, 0, 0, 0, {}, {}, stamp(t.number, t.clock, false)};
    return;
  }
  access_as(t, p, 8, ATOMIC, pc, true);
  auto it = mbarriers.find(a);
  if (it == mbarriers.end()) {
    report("uninitialised", pc, "mbarrier was not initialised");
    fatal();
  }
  Mbarrier& b = it->second;
  Cell none{};
  if (!is_before(t, b.made, none))
    report("race", pc, "uses an mbarrier that thread %d made, with no barrier between",
           thread_of(b.made));
  if (op == 1 || op == 2) {
    release(t, b.seen);
    if (op == 2) b.tx += v;
    b.arrived++;
    if (b.arrived > b.count) report("race", pc, "more arrivals at an mbarrier than it counts");
    complete_phase(b);
    return;
  }
  while ((b.phase & 1) == (v & 1)) {
    t.wait_address = a;
    t.wait_parity = v;
    suspend(MBARRIER);
  }
  see(t.seen, b.done_seen);
}
static char* swizzled(u32 address, u32 swizzle) {
  u32 a = address - SHARED_WINDOW;
  if (swizzle == 3) a ^= (a >> 7 & 7) << 4;
  else if (swizzle == 2) a ^= (a >> 7 & 3) << 4;
  else if (swizzle == 1) a ^= (a >> 7 & 1) << 4;
  return dynamic_shared + a;
}
extern "C" void simt_tma_load(u32 dst, const void* map, int, const int* c, u32 bar) {
  Thread& t = current();
  const TensorMap& m = *(const TensorMap*)map;
  char* d = (char*)simt_from_shared(dst);
  size_t n = (size_t)m.box[0] * m.box[1] * m.element;
  if (m.magic != 0x7131337461) {
    report("out of bounds", (up)RA, "not a tensor map");
    fatal();
  }
  if ((dst - SHARED_WINDOW) % 128)
    report("misaligned", (up)RA, "TMA into shared memory that is not 128-byte aligned");
  access_as(t, (up)d, n, WRITE, (up)RA, false);
  set_flight(d, n, true);
  std::vector<u32> s;
  see(s, t.seen);
  s[t.number] = t.clock;
  tma.push_back({dst, map, {c[0], c[1]}, bar, s});
}
static void deliver() {
  size_t which = order_mode == 2 ? order_seed++ % tma.size() : 0;
  Tma x = tma[which];
  tma.erase(tma.begin() + which);
  const TensorMap& m = *(const TensorMap*)x.map;
  Cell* cells = dynamic_cells;
  u32 engine = ++engine_clock;
  set_flight((char*)simt_from_shared(x.dst), (size_t)m.box[0] * m.box[1] * m.element, false);
  for (u32 r = 0; r < m.box[1]; ++r)
    for (u32 e = 0; e < m.box[0]; ++e) {
      char* d = swizzled(x.dst + (r * m.box[0] + e) * m.element, m.swizzle);
      long col = x.c[0] + (long)e, row = x.c[1] + (long)r;
      if (col < 0 || row < 0 || (u64)col >= m.dim[0] || (u64)row >= m.dim[1])
        memset(d, 0, m.element);
      else memcpy(d, m.base + row * m.stride + col * m.element, m.element);
      Cell& cell = cells[(d - dynamic_shared) / 4];
      cell.w = stamp(ENGINE, engine, false);
      cell.wmask = 15;
      cell.init = 15;
      cell.r = 0;
    }
  Mbarrier& b = mbarriers[x.bar];
  see(b.seen, x.seen);
  b.seen[count_threads] = std::max(b.seen[count_threads], engine);
  b.tx -= (int)(m.box[0] * m.box[1] * m.element);
  complete_phase(b);
}
static void wg_tile(
    u64 desc, int rows, float* out,
    std::vector<char*>& touched) {  // K-major tile [rows][16] of bf16 behind a descriptor
  u32 start = (u32)(desc & 0x3fff) << 4, stride = (u32)(desc >> 32 & 0x3fff) << 4,
      layout = (u32)(desc >> 62);
  u32 swizzle = layout == 1 ? 3 : layout == 2 ? 2 : layout == 3 ? 1 : 0;
  u32 width = swizzle == 3 ? 128 : swizzle == 2 ? 64 : swizzle == 1 ? 32 : 16;
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < 16; ++k) {
      char* p = swizzled(start + r / 8 * stride + r % 8 * width + k * 2, swizzle);
      uint16_t v;
      memcpy(&v, p, 2);
      out[r * 16 + k] = bf16(v);
      if (k % 2 == 0) touched.push_back(p);
    }
}
static std::map<int, std::vector<std::pair<int, std::vector<char*>>>>
    wg_reads;  // of each warpgroup: group number, what it reads
extern "C" void simt_wgmma(int n, float** d, u64 a, u64 b, bool accumulate, int) {
  Thread& t = current();
  up pc = (up)RA;
  u64 in[2] = {a, b};
  int group = t.number / 128;
  Accumulators* mine = nullptr;
  for (auto& w : t.wg)
    if (w.d[0] == d[0]) mine = &w;
  if (!mine) {
    t.wg.push_back({});
    mine = &t.wg.back();
    mine->n = n;
    for (int i = 0; i < n / 2; ++i) {
      mine->d[i] = d[i];
      mine->value[i] = *d[i];
    }
  }
  mine->group = t.wg_group;
  if (!accumulate)
    for (int i = 0; i < n / 2; ++i) mine->value[i] = 0;
  for (int i = 0; i < n / 2; ++i) *d[i] = __builtin_nanf("");  // not to be read before the wait
  float* first = d[0];
  (void)first;
  Pending* p = meet(OP_WARPGROUP, 1000 + group, ~0u, 128, t.number % 128, pc, n, in, 16);
  if (p->arrived < 128) {
    suspend(COLLECTIVE);
    finish(p);
    return;
  }
  std::vector<float> A(64 * 16), B(n * 16);
  std::vector<char*> touched;
  wg_tile(a, 64, A.data(), touched);
  wg_tile(b, n, B.data(), touched);
  for (int w = 0; w < 4; ++w)
    for (char* q : touched) {
      Thread& l = threads[group * 128 + w * 32];
      Cell& cell = dynamic_cells[(q - dynamic_shared) / 4];
      if (cell.flight)
        report("race", pc, "wgmma reads shared memory+%ld while a copy into it is in flight",
               q - dynamic_shared);
      if (cell.init != 15)
        report("uninitialised", pc, "wgmma reads shared memory+%ld, which nobody wrote",
               q - dynamic_shared);
      if (!is_before(l, cell.w, cell))
        report("race", pc, "wgmma reads shared memory+%ld, written by %d with no barrier between",
               q - dynamic_shared, thread_of(cell.w));
      cell.reading++;
    }
  for (int w = 0; w < 4; ++w) wg_reads[group * 4 + w].push_back({t.wg_group, touched});
  for (int i = 0; i < 128; ++i) {
    Thread& o = threads[group * 128 + i];
    Accumulators* acc = nullptr;
    for (auto& x : o.wg)
      if (x.group == t.wg_group && x.n == n) acc = &x;
    for (int r = 0; r < n / 2; ++r) {
      int m = i / 32 * 16 + i % 32 / 4 + r / 2 % 2 * 8, c = r / 4 * 8 + i % 4 * 2 + r % 2;
      double s = 0;
      for (int k = 0; k < 16; ++k) s += (double)A[m * 16 + k] * B[c * 16 + k];
      acc->value[r] = (float)(acc->value[r] + s);
    }
    o.state = READY;
  }
  p->done = true;
  finish(p);
}
extern "C" void simt_wgmma_commit() { current().wg_group++; }
extern "C" void simt_wgmma_wait(int left) {
  Thread& t = current();
  int done = t.wg_group - left;
  for (size_t i = 0; i < t.wg.size();)
    if (t.wg[i].group < done) {
      for (int r = 0; r < t.wg[i].n / 2; ++r) *t.wg[i].d[r] = t.wg[i].value[r];
      t.wg.erase(t.wg.begin() + i);
    } else ++i;
  if (t.lane == 0) {
    auto& list = wg_reads[t.warp];
    for (size_t i = 0; i < list.size();)
      if (list[i].first < done) {
        for (char* q : list[i].second) {
          Cell& c = dynamic_cells[(q - dynamic_shared) / 4];
          c.reading--;
          remember_read(c, t, false, true);
        }
        list.erase(list.begin() + i);
      } else ++i;
  }
}
