// Who did what when.
#pragma once
static inline u64 stamp(int thread, u32 clock, bool atomic) {
  return launch << 48 | block << 30 | (u64)thread << 19 | (u64)atomic << 18 | (clock & 0x3ffff);
}
static inline u64 launch_of(u64 r) { return r >> 48; }
static inline u64 block_of(u64 r) { return r >> 30 & 0x3ffff; }
static inline int thread_of(u64 r) { return r >> 19 & 0x7ff; }
static inline bool atomic_of(u64 r) { return r >> 18 & 1; }
static inline u32 clock_of(u64 r) { return r & 0x3ffff; }
const int MANY = 0x7ff, MANY_BLOCKS = 0x7fe;
static bool clock_is_before(const Thread& t, int u, u32 c) {
  if (u == ENGINE)
    return !t.seen.empty() &&
           c <= t.seen[count_threads];  // only a wait at the mbarrier orders a copy
  return c < base_clock || u == t.number || (!t.seen.empty() && c <= t.seen[u]);
}
static bool is_before(const Thread& t, u64 r, const Cell& cell) {
  if (!r || launch_of(r) != (launch & 0xffff)) return true;
  int u = thread_of(r);
  if (u == MANY_BLOCKS) return false;
  if (block_of(r) != block) {
    auto k = known.find(block_of(r));
    return k != known.end() && (clock_of(r) < k->second.base ||
                                (u == k->second.thread && clock_of(r) <= k->second.clock));
  }
  if (u != MANY) return clock_is_before(t, u, clock_of(r));
  if (clock_of(r) < base_clock) return true;
  if (!cell.many) return false;
  const u32* c = &many_pool[cell.many];
  for (int i = 0; i < count_threads; ++i)
    if (c[i] && !clock_is_before(t, i, c[i] - 1)) return false;
  return true;
}
static void remember_read(Cell& cell, const Thread& t, bool atomic, bool is_shared) {
  u64 now = stamp(t.number, t.clock, atomic);
  if (!cell.r || launch_of(cell.r) != (launch & 0xffff) ||
      (thread_of(cell.r) == t.number && block_of(cell.r) == block)) {
    cell.r = now;
    return;
  }
  if (block_of(cell.r) != block) {
    cell.r = is_shared ? now : stamp(MANY_BLOCKS, 0, false);
    return;
  }
  int u = thread_of(cell.r);
  if (u == MANY_BLOCKS) return;
  if (u != MANY && (clock_of(cell.r) < base_clock)) {
    cell.r = now;
    return;
  }
  if (is_shared && precise) {  // remember every reader of this epoch
    if (!cell.many) {
      cell.many = many_pool.size();
      many_pool.resize(many_pool.size() + count_threads);
    }
    u32* c = &many_pool[cell.many];
    if (u != MANY || clock_of(cell.r) < base_clock) {
      memset(c, 0, 4 * count_threads);
      if (u != MANY) c[u] = clock_of(cell.r) + 1;
    }
    c[t.number] = t.clock + 1;
  }
  cell.r = stamp(MANY, std::max(t.clock, clock_of(cell.r)), false);
}
static void touch(Thread& t, Cell& cell, uint8_t mask, int kind, up pc, bool is_shared,
                  const char* what, up offset) {
  if (cell.flight & mask)
    report("race", pc, "%s %s+%lu while an asynchronous copy into it is in flight",
           kind == READ ? "reads" : "writes", what, offset);
  if (kind != READ && cell.reading)
    report("race", pc, "writes %s+%lu while a wgmma still reads it", what, offset);
  if (kind != WRITE && (cell.init & mask) != mask) {
    report("uninitialised", pc, "reads %s+%lu, which nobody wrote", what, offset);
    cell.init |= mask;
  }
  if (!(kind == ATOMIC && atomic_of(cell.w)) && (cell.wmask & mask) && !is_before(t, cell.w, cell))
    report("race", pc, "%s %s+%lu, which thread %d of block %lu wrote with no barrier between",
           kind == READ ? "reads" : "writes", what, offset, thread_of(cell.w),
           (unsigned long)block_of(cell.w));
  if (kind != READ && !(kind == ATOMIC && atomic_of(cell.r)) && !is_before(t, cell.r, cell))
    report("race", pc, "writes %s+%lu, which %s read with no barrier between", what, offset,
           thread_of(cell.r) >= MANY_BLOCKS
               ? "other threads"
               : ("thread " + std::to_string(thread_of(cell.r))).c_str());
  if (kind == READ) remember_read(cell, t, false, is_shared);
  else {
    cell.wmask = thread_of(cell.w) == t.number && cell.w == stamp(t.number, t.clock, kind == ATOMIC)
                     ? cell.wmask | mask
                     : mask;
    cell.w = stamp(t.number, t.clock, kind == ATOMIC);
    cell.init |= mask;
    if (cell.r && is_before(t, cell.r, cell)) cell.r = 0;
  }
}
static void touch_all(Thread& t, Cell* cells, up offset, size_t n, int kind, up pc, bool is_shared,
                      const char* what, up shown) {
  for (up first = offset / 4, last = (offset + n - 1) / 4, i = first; i <= last; ++i) {
    uint8_t mask = 15;
    if (i == first) mask &= 15 << (offset & 3);
    if (i == last) mask &= 15 >> (3 - ((offset + n - 1) & 3));
    touch(t, cells[i], mask, kind, pc, is_shared, what, shown + (i - first) * 4);
  }
}
static void access_as(Thread& t, up p, size_t n, int kind, up pc, bool checks_alignment) {
  counters[kind == READ ? 0 : 1] += n;
  if (counts_traffic) count_access(t, p, n, pc);
  if (checks_alignment && (p & (n - 1)))
    report("misaligned", pc, "accesses %zu bytes at an address that is %lu past a multiple", n,
           (unsigned long)(p & (n - 1)));
  up g = p - (up)global_base;
  if (g < GLOBAL_BYTES) {
    uint8_t kind_of_page = page_kind[g / PAGE];
    if (kind_of_page == 2 && kind == READ && page_kind[(g + n - 1) / PAGE] == 2)
      return;  // constants, wholly inside
    auto it = allocations.upper_bound(p);
    const Allocation* a = it == allocations.begin() ? nullptr : &std::prev(it)->second;
    if (!a || p + n > (up)a->begin + a->bytes) {
      report("out of bounds", pc, "%s %zu bytes %ld past the end of a buffer of %zu bytes",
             kind == READ ? "reads" : "writes", n, a ? (long)(p - (up)a->begin - a->bytes) : -1L,
             a ? a->bytes : 0);
      if (kind_of_page == 0) fatal();
      return;
    }
    if (a->is_free) {
      report("use after free", pc, "touches a freed buffer");
      return;
    }
    if (a->read_only) {
      if (kind != READ) report("read only", pc, "writes constants");
      return;
    }
    touch_all(t, global_cells, g, n, kind, pc, false, "global memory", p - (up)a->begin);
    return;
  }
  up d = p - (up)dynamic_shared;
  if (d < DYNAMIC_BYTES) {
    if (d + n > dynamic_bytes) {
      report("out of bounds", pc, "%s shared memory at %lu of %zu dynamic bytes",
             kind == READ ? "reads" : "writes", d, dynamic_bytes);
      return;
    }
    touch_all(t, dynamic_cells, d, n, kind, pc, true, "shared memory", d);
    return;
  }
  up s = p - (up)module_->shared_begin;
  if (module_->shared_begin && s < (up)(module_->shared_end - module_->shared_begin)) {
    touch_all(t, static_cells, s, n, kind, pc, true, "static shared memory", s);
    return;
  }
  if (p < PAGE * 16) {
    report("out of bounds", pc, "null pointer");
    fatal();
  }
  for (int i = 0; i < count_threads; ++i)
    if (p - (up)threads[i].stack < STACK) {
      report("out of bounds", pc, "touches another thread's locals");
      return;
    }
  if (kind != READ) {
    report("out of bounds", pc, "writes memory that is not the device's");
    fatal();
  }  // reads: constants of the module itself
}
static inline void hook(void* p, size_t n, int kind, void* pc, bool aligned = true) {
  if (!simt_current || (up)p - (up)current().stack < STACK) return;  // locals
  access_as(current(), (up)p, n, kind, (up)pc, aligned);
}
#define RA __builtin_return_address(0)
#define HOOK(N)                                                                        \
  extern "C" void __tsan_read##N(void* p) { hook(p, N, READ, RA); }                    \
  extern "C" void __tsan_write##N(void* p) { hook(p, N, WRITE, RA); }                  \
  extern "C" void __tsan_unaligned_read##N(void* p) { hook(p, N, READ, RA, false); }   \
  extern "C" void __tsan_unaligned_write##N(void* p) { hook(p, N, WRITE, RA, false); } \
  extern "C" void __tsan_volatile_read##N(void* p) { hook(p, N, READ, RA); }           \
  extern "C" void __tsan_volatile_write##N(void* p) { hook(p, N, WRITE, RA); }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16) extern "C" void __tsan_read_range(void* p, size_t n) {
  hook(p, n, READ, RA, n == 8 || n == 16);
}  // uint4 is copied so
extern "C" void __tsan_write_range(void* p, size_t n) { hook(p, n, WRITE, RA, n == 8 || n == 16); }
// g++ -fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero calls these
// when a check fails; each gets its place in the text first.
struct Place {
  const char* file;
  u32 line, column;
};
#define UBSAN(NAME, KIND, TEXT)                                               \
  extern "C" void __ubsan_handle_##NAME(Place* at, up, up) {                  \
    report(KIND, (up)RA, TEXT " (line %u, column %u)", at->line, at->column); \
  }
extern "C" void __ubsan_handle_type_mismatch_v1(Place* at, up p, up) {
  report("misaligned", (up)RA, "vector access at an unaligned address (line %u)", at->line);
  fatal();
}  // the host would fault, too
UBSAN(out_of_bounds, "out of bounds", "index outside a local array")
UBSAN(add_overflow, "overflow", "signed addition overflows")
    UBSAN(sub_overflow, "overflow", "signed subtraction overflows")
        UBSAN(mul_overflow, "overflow", "signed product overflows")
            UBSAN(negate_overflow, "overflow", "negation overflows")
                UBSAN(shift_out_of_bounds, "overflow", "shift by more than the width")
                    UBSAN(divrem_overflow, "overflow",
                          "division by zero or overflow") extern "C" void __tsan_func_entry(void*) {
}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void simt_access(const void* p, size_t n, int kind) {
  hook((void*)p, n, kind, RA);
  if (kind != ATOMIC || !simt_current || (up)p - (up)global_base >= GLOBAL_BYTES) return;
  Thread& t = current();
  auto& r = releases[(up)p];  // an atomic acquires what earlier ones released behind a fence
  for (auto& [b, k] : r) {
    Known& mine = known[b];
    if (k.base >= mine.base) mine = k;
  }
  if (t.fenced) {
    for (auto& k : known) r[k.first] = k.second;
    r[block] = {base_clock, t.clock, t.number};
    t.clock++;
    partial = true;
  }
}
extern "C" void simt_fence() { current().fenced = true; }
extern "C" [[noreturn]] void simt_trap(const char* why, int line) {
  report("trap", 0, "%s at line %d", why, line);
  fatal();
  __builtin_unreachable();
}
