// Barriers.
#pragma once
static void join(const std::vector<int>& group) {
  std::vector<u32> all(count_threads + 1, 0);
  for (int i : group) {
    Thread& t = threads[i];
    if (!t.seen.empty())
      for (int u = 0; u <= count_threads; ++u) all[u] = std::max(all[u], t.seen[u]);
    all[i] = std::max(all[i], t.clock);
  }
  for (int i : group) {
    threads[i].seen = all;
    threads[i].clock++;
  }
}
extern "C" void simt_syncthreads(int line) {
  Thread& t = current();
  t.line = line;
  counters[2]++;
  if (++arrived < count_threads) {
    suspend(BARRIER);
    return;
  }
  u32 top = base_clock, copied = 0;
  for (int i = 0; i < count_threads; ++i) {
    Thread& o = threads[i];
    top = std::max(top, o.clock);
    if (!o.seen.empty()) copied = std::max(copied, o.seen[count_threads]);
  }
  for (int i = 0; i < count_threads; ++i) {
    Thread& o = threads[i];
    o.clock = top + 1;
    if (o.line != line)
      report("divergent barrier", 0, "threads meet at __syncthreads of lines %d and %d", line,
             o.line);
    if (o.state == BARRIER) o.state = READY;
    if (copied) {
      o.seen.resize(count_threads + 1);
      o.seen[count_threads] = copied;
    }
  }
  base_clock = top + 1;
  arrived = 0;
}
static void see(std::vector<u32>& into, const std::vector<u32>& from) {
  if (into.empty()) into.resize(count_threads + 1);
  if (!from.empty())
    for (int u = 0; u <= count_threads; ++u) into[u] = std::max(into[u], from[u]);
}
static void release(Thread& t, std::vector<u32>& to) {
  see(to, t.seen);
  to[t.number] = std::max(to[t.number], t.clock);
  t.clock++;
}  // what t did until now; later accesses have a newer clock
extern "C" void simt_named_barrier(int id, int count, bool waits, int line) {
  Thread& t = current();
  t.line = line;
  if (!count) count = count_threads;
  NamedBarrier& b = named[id];
  release(t, b.seen);
  b.arrived++;
  if (waits) b.waiting.push_back(t.number);
  if (b.arrived < count) {
    if (waits) suspend(NAMED);
    return;
  }
  NamedBarrier done = b;
  b = {};  // only those that wait see what the others did
  for (int i : done.waiting) {
    see(threads[i].seen, done.seen);
    if (threads[i].state == NAMED) threads[i].state = READY;
  }
}
static Pending* meet(int op, int group, u32 mask, int needed, int index, up line, int argument,
                     const void* in, size_t n) {
  Pending* p = nullptr;
  for (auto* q : pending)
    if (q->group == group && q->mask == mask && !q->done && !q->here[index]) {
      p = q;
      break;
    }
  if (!p) {
    if (spare.empty()) p = new Pending;
    else {
      p = spare.back();
      spare.pop_back();
    }
    memset(p->here, 0, sizeof p->here);
    p->op = op;
    p->group = group;
    p->mask = mask;
    p->count = p->left = needed;
    p->arrived = 0;
    p->argument = argument;
    p->line = line;
    p->done = false;
    pending.push_back(p);
  }
  if (p->op != op || p->line != line)
    report("divergent collective", op >= OP_MMA_BF16 ? line : 0,
           "lanes of one warp meet at different instructions (%s %lu and %lu)",
           op >= OP_MMA_BF16 ? "at" : "lines", p->line, line);
  p->here[index] = true;
  memcpy(p->in[index], in, n);
  p->arrived++;
  return p;
}
static void finish(Pending* p) {
  if (--p->left == 0) {
    pending.erase(std::find(pending.begin(), pending.end(), p));
    spare.push_back(p);
  }
}
static float bf16(uint16_t b) {
  u32 u = (u32)b << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static float f16(uint16_t b) { return _cvtsh_ss(b); }
template <int K, class Convert>
static void multiply(Pending* p, Convert convert) {
  // fragments: lane l has rows l/4 and l/4 + 8 of A, column l/4 of B, and of C rows l/4, l/4 + 8,
  // columns l%4*2, +1; registers pack K/8 values
  constexpr int per = K / 8;
  float A[16][K], B[K][8], C[16][8];
  u32 w[32][10];
  for (int l = 0; l < 32; ++l) memcpy(w[l], p->in[l], 40);
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 6; ++r)
      for (int e = 0; e < per; ++e) {
        int g = l / 4, t = l % 4;
        float v = convert(w[l][r], e);
        if (r < 4) A[g + (r & 1) * 8][t * per + e + (r >> 1) * K / 2] = v;
        else B[t * per + e + (r - 4) * K / 2][g] = v;
      }
  for (int m = 0; m < 16; ++m) {
    float row[8] = {};
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) row[n] += A[m][k] * B[k][n];
    memcpy(C[m], row, 32);
  }  // integer sums stay exact: below 2^24
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r) {
      float sum = C[l / 4 + (r >> 1) * 8][l % 4 * 2 + (r & 1)];
      u32* out = (u32*)p->out[l] + r;
      if (K == 32) {
        int c;
        memcpy(&c, &w[l][6 + r], 4);
        c += (int)sum;
        memcpy(out, &c, 4);
      } else {
        float c;
        memcpy(&c, &w[l][6 + r], 4);
        c += sum;
        memcpy(out, &c, 4);
      }
    }
}
static void mma(Pending* p) {
  if (p->op == OP_MMA_S8)
    multiply<32>(p, [](u32 r, int e) { return (float)(int8_t)(r >> (8 * e)); });
  else if (p->op == OP_MMA_BF16) multiply<16>(p, [](u32 r, int e) { return bf16(r >> (16 * e)); });
  else multiply<16>(p, [](u32 r, int e) { return f16(r >> (16 * e)); });
}
static int first_thread(int warp) { return warp * 32; }
static void ldmatrix(Pending* p) {
  int n = p->argument & 7;
  bool trans = p->argument & 8;
  int w = p->group;
  for (int i = 0; i < n; ++i) {
    char* row[8];
    for (int r = 0; r < 8; ++r) {
      u32 a = (u32)p->in[i * 8 + r][0];
      row[r] = (char*)simt_from_shared(a);
      access_as(threads[first_thread(w) + i * 8 + r], (up)row[r], 16, READ, p->line, true);
    }
    for (int l = 0; l < 32; ++l) {
      u32 v;
      if (!trans) memcpy(&v, row[l / 4] + l % 4 * 4, 4);
      else {
        uint16_t lo, hi;
        memcpy(&lo, row[l % 4 * 2] + l / 4 * 2, 2);
        memcpy(&hi, row[l % 4 * 2 + 1] + l / 4 * 2, 2);
        v = lo | (u32)hi << 16;
      }
      memcpy((u32*)p->out[l] + i, &v, 4);
    }
  }
}
static void compute(Pending* p) {
  if (p->op >= OP_MMA_BF16 && p->op <= OP_MMA_S8) return mma(p);
  if (p->op == OP_LDMATRIX) return ldmatrix(p);
  if (p->op == OP_BALLOT) {
    u64 b = 0;
    for (int l = 0; l < 32; ++l)
      if (p->here[l] && p->in[l][0]) b |= 1u << l;
    for (int l = 0; l < 32; ++l) p->out[l][0] = b;
    return;
  }
  for (int l = 0; l < 32; ++l)
    if (p->here[l]) {
      int by = (int)p->in[l][1], width = (int)p->in[l][2], s = l & ~(width - 1), src = l;
      if (p->op == OP_SHFL_XOR) {
        src = l ^ by;
        if (src >= s + width) src = l;
      } else if (p->op == OP_SHFL_IDX) src = s + (by & (width - 1));
      else if (p->op == OP_SHFL_UP) {
        src = l - by;
        if (src < s) src = l;
      } else {
        src = l + by;
        if (src >= s + width) src = l;
      }
      if (!p->here[src])
        report("divergent collective", 0, "lane %d shuffles from lane %d, which is not in the mask",
               l, src);
      p->out[l][0] = p->in[src][0];
    }
}
extern "C" void simt_collective(int op, u32 mask, int line, const void* in, size_t n, void* out,
                                size_t m, int argument) {
  Thread& t = current();
  counters[3]++;
  up where = op >= OP_MMA_BF16 ? (up)RA : (up)line;
  int warps = std::min(32, count_threads - t.warp * 32);
  u32 whole = warps == 32 ? ~0u : (1u << warps) - 1;
  mask &= whole;
  if (!(mask >> t.lane & 1)) {
    report("divergent collective", (up)RA, "lane %d is not in its own mask %x", t.lane, mask);
    fatal();
  }
  Pending* p = meet(op, t.warp, mask, __builtin_popcount(mask), t.lane, where, argument, in, n);
  if (p->arrived < p->count) suspend(COLLECTIVE);
  else {
    compute(p);
    p->done = true;
    for (int l = 0; l < 32; ++l)
      if (p->here[l]) threads[first_thread(t.warp) + l].state = READY;
  }
  memcpy(out, p->out[t.lane], m);
  finish(p);
}
extern "C" void simt_syncwarp(u32 mask, int line) {
  Thread& t = current();
  int warps = std::min(32, count_threads - t.warp * 32);
  mask &= warps == 32 ? ~0u : (1u << warps) - 1;
  u64 zero = 0;
  partial = true;
  Pending* p = meet(-1, t.warp, mask, __builtin_popcount(mask), t.lane, line, 0, &zero, 8);
  if (p->arrived < p->count) {
    suspend(COLLECTIVE);
    finish(p);
    return;
  }
  std::vector<int> group;
  for (int l = 0; l < 32; ++l)
    if (p->here[l]) {
      group.push_back(first_thread(t.warp) + l);
      threads[first_thread(t.warp) + l].state = READY;
    }
  join(group);
  p->done = true;
  finish(p);
}
